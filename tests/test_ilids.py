"""i-LIDS: two images of each test person, pseudo-cameras that always differ (torchreid's rule)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import trees
from scipy.stats import chisquare

from lda.data import load_dataset
from lda.data.splits import DRAWS, Draw
from lda.errors import UsageError


@pytest.mark.parametrize(
    "folder",
    ["i-LIDS_Pedestrian/Persons", "ilids/i-LIDS_Pedestrian/Persons", "QMUL-iLIDS/images",
     "QMUL-iLIDS/i-LIDS_Pedestrian/Persons"],
)  # fmt: skip
def test_ten_splits_of_60_pairs(tmp_path: Path, folder: str) -> None:
    trees.ilids(tmp_path, folder)
    dataset = load_dataset("ilids", tmp_path)
    assert len(dataset.splits) == 10
    for split in dataset.splits:
        assert len({record.pid for record in split.query}) == len(split.query) == len(split.gallery) == 60
        for query, gallery in zip(split.query, split.gallery, strict=True):
            assert query.pid == gallery.pid == int(query.path.name[:4])
            assert query.path != gallery.path
            assert query.camid != gallery.camid  # else the same-camera rule would drop every match
            assert query.camid == int(query.path.name[4:7]) - 1
    assert load_dataset("ilids", tmp_path / folder).splits == dataset.splits


def test_every_pair_of_images_is_equally_likely() -> None:
    for images in range(2, 9):
        pairs = Counter(
            Draw((1,), (query,), (gallery,)).pair(1, images)
            for query in range(DRAWS)
            for gallery in range(0, DRAWS, 60)
        )
        assert all(first != second for first, second in pairs)
        assert {first for first, _ in pairs} == set(range(images))
    pairs = Counter(Draw((1,), (q,), (g,)).pair(1, 4) for q in range(DRAWS) for g in range(DRAWS))
    assert len(pairs) == 4 * 3
    assert len(set(pairs.values())) == 1


def test_shipped_draws_use_all_images(tmp_path: Path) -> None:
    trees.ilids(tmp_path)
    numbers = Counter(record.camid for split in load_dataset("ilids", tmp_path).splits for record in split.query)
    assert chisquare([numbers[0], numbers[1]]).pvalue > 1e-3


def test_person_with_a_single_image_is_left_out(tmp_path: Path) -> None:
    trees.ilids(tmp_path)
    pid = load_dataset("ilids", tmp_path).query[0].pid
    images = sorted((tmp_path / "i-LIDS_Pedestrian/Persons").glob(f"{pid:04d}*.jpg"))
    for path in images[1:]:
        path.unlink()
    with pytest.raises(UsageError, match=rf"1 person\(s\) with a single image are left out: {pid:04d}"):
        load_dataset("ilids", tmp_path)
    with pytest.warns(UserWarning, match="single image"):
        dataset = load_dataset("ilids", tmp_path, strict=False)
    assert all(len(split.query) == 60 for split in dataset.splits)
    assert pid not in {record.pid for split in dataset.splits for record in split.query}


def test_counts_are_compared_and_the_marker_decides(tmp_path: Path) -> None:
    trees.ilids(tmp_path)
    (tmp_path / "i-LIDS_Pedestrian/Persons/0001001.jpg").rename(tmp_path / "0001001.jpg")
    with pytest.raises(UsageError, match=r"persons: found 119 ids, 475 images, expected 119 ids, 476 images"):
        load_dataset("ilids", tmp_path)
    trees.mark(tmp_path, ilids={"persons": {"ids": 119, "images": 475, "cameras": 8}})
    assert load_dataset("ilids", tmp_path).standin


def test_person_number_beyond_the_splits(tmp_path: Path) -> None:
    trees.ilids(tmp_path)
    for path in (tmp_path / "i-LIDS_Pedestrian/Persons").glob("0119*.jpg"):
        path.rename(path.with_name("0999" + path.name[4:]))
    with pytest.raises(UsageError, match=r"1 person number\(s\) beyond 200 are in no split: 0999"):
        load_dataset("ilids", tmp_path)
