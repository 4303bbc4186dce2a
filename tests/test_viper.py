"""VIPeR: pairs by person number, never by position."""

from __future__ import annotations

from pathlib import Path

import pytest
import trees

from lda.data import load_dataset
from lda.errors import UsageError


@pytest.mark.parametrize("folder", ["VIPeR", "viper/VIPeR", "viper"])
def test_ten_splits_of_316_pairs(tmp_path: Path, folder: str) -> None:
    trees.viper(tmp_path, folder)
    dataset = load_dataset("viper", tmp_path)
    assert len(dataset.splits) == 10
    for split in dataset.splits:
        assert len(split.query) == len(split.gallery) == 316
        assert [r.pid for r in split.query] == [r.pid for r in split.gallery]
        for query, gallery in zip(split.query, split.gallery, strict=True):
            assert int(query.path.name[:3]) == int(gallery.path.name[:3]) == query.pid
            assert (query.camid, gallery.camid) == (0, 1)
            assert (query.path.parent.name, gallery.path.parent.name) == ("cam_a", "cam_b")
    tested = [{record.pid for record in split.query} for split in dataset.splits]
    assert len(set.union(*tested)) > 620  # halves: after ten splits nearly everybody was tested
    assert load_dataset("viper", tmp_path / folder).splits == dataset.splits


def test_a_lost_file_shifts_nobody(tmp_path: Path) -> None:
    """torchreid pairs by position: one file less and every later pair is of two people."""
    trees.viper(tmp_path)
    pid = trees.viper_numbers()[100]
    next((tmp_path / "VIPeR/cam_b").glob(f"{pid:03d}_*")).unlink()
    with pytest.raises(UsageError, match=rf"1 person\(s\) lack one of the two cameras: {pid:03d}"):
        load_dataset("viper", tmp_path)
    with pytest.warns(UserWarning, match="lack one of the two cameras"):
        dataset = load_dataset("viper", tmp_path, strict=False)
    for split in dataset.splits:
        assert [r.path.name[:3] for r in split.query] == [r.path.name[:3] for r in split.gallery]
        assert pid not in {r.pid for r in split.query}
        assert len(split.query) == 316


def test_two_images_of_one_person_in_a_view(tmp_path: Path) -> None:
    trees.viper(tmp_path)
    pid = trees.viper_numbers()[0]
    trees.touch(tmp_path / f"VIPeR/cam_a/{pid:03d}_180.bmp")
    with pytest.raises(UsageError, match=r"1 person\(s\) have more than one image in cam_a"):
        load_dataset("viper", tmp_path)


def test_split_folders_of_metabin(tmp_path: Path) -> None:
    """All images lie in any one of the folders; the split is ours."""
    trees.viper(tmp_path / "original")
    original = load_dataset("viper", tmp_path / "original")
    tested = {record.pid for record in original.splits[4].query}
    for pid in trees.viper_numbers():
        for camera in (1, 2):
            part = "train" if pid not in tested else ("query", "gallery")[camera - 1]
            trees.touch(tmp_path / f"data/viper/split_1a/{part}/p{pid:03d}_c{camera}_d045.png")
    repack = load_dataset("viper", tmp_path / "data")
    for ours, theirs in zip(repack.splits, original.splits, strict=True):
        assert [(r.pid, r.camid) for r in ours.query] == [(r.pid, r.camid) for r in theirs.query]
        assert [(r.pid, r.camid) for r in ours.gallery] == [(r.pid, r.camid) for r in theirs.gallery]
