"""GRID: the official partitions (torchreid's reading of the .mat), distractors, the fallback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trees
from scipy.io import savemat

from lda.data import load_dataset
from lda.errors import UsageError


@pytest.mark.parametrize("folder", ["underground_reid", "grid/underground_reid", "GRID", "Grid"])
def test_ten_official_partitions_of_125_and_900(tmp_path: Path, folder: str) -> None:
    trees.grid(tmp_path, folder)
    dataset = load_dataset("grid", tmp_path)
    assert dataset.version == "official partitions"
    assert dataset.distractor_pids == {0}
    base = tmp_path / folder
    for split, trained in zip(dataset.splits, trees.grid_partitions(), strict=True):
        for records, part in ((split.query, "probe"), (split.gallery, "gallery")):
            names = sorted(path.name for path in (base / part).iterdir())
            assert [(r.path.name, r.pid, r.camid) for r in records] == [
                (name, int(name.split("_")[0]), int(name.split("_")[1]) - 1)
                for name in names
                if int(name.split("_")[0]) not in trained
            ]
        assert (len(split.query), len(split.gallery)) == (125, 900)
        assert sum(record.pid == 0 for record in split.gallery) == 775
        cameras = {record.pid: record.camid for record in split.query}
        assert all(cameras[r.pid] != r.camid for r in split.gallery if r.pid)  # nothing for the camera rule to drop
    assert load_dataset("grid", base).splits == dataset.splits


def test_without_partitions(tmp_path: Path) -> None:
    trees.grid(tmp_path)
    (tmp_path / "underground_reid/features_and_partitions.mat").unlink()
    with pytest.raises(UsageError, match=r"lacks features_and_partitions\.mat with the official partitions"):
        load_dataset("grid", tmp_path)
    with pytest.warns(UserWarning, match="do not compare with published results"):
        dataset = load_dataset("grid", tmp_path, strict=False)
    assert dataset.version == "shipped partitions"
    assert [(len(split.query), len(split.gallery)) for split in dataset.splits] == [(125, 900)] * 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": 1}, r"holds no partitions \(KeyError: 'trainIdxAll'\)"),
        ({"trainIdxAll": np.zeros((1, 10))}, "holds no partitions"),
    ],
)
def test_mat_file_of_another_kind(tmp_path: Path, content: dict, message: str) -> None:
    trees.grid(tmp_path)
    savemat(tmp_path / "underground_reid/features_and_partitions.mat", content)
    with pytest.raises(UsageError, match=message):
        load_dataset("grid", tmp_path)


def test_partitions_of_another_size(tmp_path: Path) -> None:
    trees.grid(tmp_path)
    cells = np.empty((1, 9), dtype=object)
    for split in range(9):
        cells[0, split] = {"a": 0.0, "b": 0.0, "c": np.arange(1.0, 101.0)}
    savemat(tmp_path / "underground_reid/features_and_partitions.mat", {"trainIdxAll": cells})
    with pytest.raises(UsageError, match=r"expected 10 partitions of 125 persons out of 250, got 9 of \[100\]"):
        load_dataset("grid", tmp_path)


def test_person_without_its_gallery_image(tmp_path: Path) -> None:
    trees.grid(tmp_path)
    next((tmp_path / "underground_reid/gallery").glob("0007_*")).unlink()
    with pytest.raises(UsageError, match=r"1 person\(s\) lack probe or gallery image: 0007"):
        load_dataset("grid", tmp_path)
    with pytest.warns(UserWarning, match="0007"):
        dataset = load_dataset("grid", tmp_path, strict=False)
    assert all(record.pid != 7 for split in dataset.splits for record in (*split.query, *split.gallery))
