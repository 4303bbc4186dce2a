"""CUHK02: identity = (pair, number), ten cameras (torchreid's and META's numbering)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trees

from lda.data import load_dataset
from lda.errors import UsageError


@pytest.mark.parametrize("folder", ["cuhk02/Dataset", "cuhk02", "CUHK02/dataset"])
def test_records(tmp_path: Path, folder: str) -> None:
    trees.mark(tmp_path, cuhk02=trees.cuhk02(tmp_path, folder))
    dataset = load_dataset("cuhk02", tmp_path)
    assert len({r.pid for r in dataset.train}) == 10
    for record in dataset.train:
        pair, view = int(record.path.parts[-3][1]), int(record.path.parts[-2][3])
        assert record.pid == pair * 10_000 + int(record.path.name[:3])
        assert record.camid == 2 * (pair - 1) + view - 1
    assert load_dataset("cuhk02", tmp_path / folder).train == dataset.train


def test_stray_entries_are_not_pairs(tmp_path: Path) -> None:
    """MetaBIN takes every entry of the folder as a pair."""
    trees.mark(tmp_path, cuhk02=trees.cuhk02(tmp_path))
    (tmp_path / "cuhk02/Dataset/__MACOSX").mkdir()
    (tmp_path / "cuhk02/Dataset/.DS_Store").write_bytes(b"")
    trees.image(tmp_path / "cuhk02/Dataset/P6/cam1/001_0001.png")
    assert len(load_dataset("cuhk02", tmp_path).train) == 40


def test_missing_pairs_and_views_are_named(tmp_path: Path) -> None:
    trees.cuhk02(tmp_path)
    base = tmp_path / "cuhk02/Dataset"
    (base / "P2/cam1").rename(base / "P2/camera1")
    (base / "P5/cam2").rename(base / "P5/camera2")
    with pytest.raises(UsageError, match=r"CUHK02 is incomplete: .*Dataset lacks P2/cam1, P5/cam2"):
        load_dataset("cuhk02", tmp_path)
    (base / "P4").rename(base / "Pair4")
    with pytest.raises(UsageError, match=r"CUHK02 is incomplete: .*Dataset lacks P4; expected cuhk02/Dataset/\{P1,"):
        load_dataset("cuhk02", tmp_path)
