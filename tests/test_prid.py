"""PRID2011: the roles of persons 1-200, 201-385 and 201-749 (torchreid's rule), lost files."""

from __future__ import annotations

from pathlib import Path

import pytest
import trees

from lda.data import load_dataset
from lda.errors import UsageError


@pytest.mark.parametrize("folder", ["prid_2011/single_shot", "prid2011/prid_2011/single_shot", "PRID_2011/single_shot"])
def test_ten_splits_of_100_and_649(tmp_path: Path, folder: str) -> None:
    trees.prid(tmp_path, folder)
    dataset = load_dataset("prid", tmp_path)  # real numbers of files: the published counts hold
    assert dataset.train == ()
    assert len(dataset.splits) == 10
    assert (dataset.query, dataset.gallery) == (dataset.splits[0].query, dataset.splits[0].gallery)
    for split in dataset.splits:
        tested = [record.pid for record in split.query]
        assert tested == sorted(set(tested))
        assert len(tested) == 100
        assert set(tested) <= set(range(1, 201))
        assert sorted(record.pid for record in split.gallery) == sorted([*tested, *range(201, 750)])
        assert all(r.camid == 0 and r.path.parent.name == "cam_a" for r in split.query)
        assert all(r.camid == 1 and r.path.parent.name == "cam_b" for r in split.gallery)
        assert all(r.path.name == f"person_{r.pid:04d}.png" for r in (*split.query, *split.gallery))
    assert len({split.query for split in dataset.splits}) == 10
    for root in (tmp_path / folder, (tmp_path / folder).parent):
        assert load_dataset("prid", root).splits == dataset.splits


def test_a_lost_file_shifts_nobody(tmp_path: Path) -> None:
    trees.prid(tmp_path)
    whole = load_dataset("prid", tmp_path)
    lost = whole.query[3].pid
    (tmp_path / f"prid_2011/single_shot/cam_b/person_{lost:04d}.png").unlink()
    with pytest.raises(UsageError, match=rf"1 of persons 1 to 200 lack a camera: person_{lost:04d}"):
        load_dataset("prid", tmp_path)
    with pytest.warns(UserWarning, match="lack a camera"):
        rest = load_dataset("prid", tmp_path, strict=False)
    before, after = ({record.pid for record in dataset.query} for dataset in (whole, rest))
    assert len(after) == 100
    assert len(before & after) == 99


def test_missing_camera(tmp_path: Path) -> None:
    trees.prid(tmp_path)
    (tmp_path / "prid_2011/single_shot/cam_b").rename(tmp_path / "prid_2011/single_shot/b")
    with pytest.raises(UsageError, match=r"PRID2011 is incomplete: .*single_shot lacks cam_b"):
        load_dataset("prid", tmp_path)
