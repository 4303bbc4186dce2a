"""Market-1501: names, junk and background, accepted folders. The record rules are torchreid's and fast-reid's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trees

from lda.data import load_dataset
from lda.errors import UsageError


def _peer_records(folder: Path) -> list[tuple[str, int, int]]:
    """(name, pid, camid) by the rule of torchreid and fast-reid: -1 dropped, camera from 0."""
    found = []
    for path in sorted(folder.glob("*.jpg")):
        match = re.search(r"([-\d]+)_c(\d)", path.name)
        assert match is not None
        pid, camera = map(int, match.groups())
        if pid != -1:
            found.append((path.name, pid, camera - 1))
    return found


def test_records_equal_those_of_the_public_loaders(tiny_sets: Path) -> None:
    dataset = load_dataset("market1501", tiny_sets)
    base = tiny_sets / "Market-1501-v15.09.15"
    for records, folder in ((dataset.train, "bounding_box_train"), (dataset.query, "query"),
                            (dataset.gallery, "bounding_box_test")):  # fmt: skip
        assert [(r.path.name, r.pid, r.camid) for r in records] == _peer_records(base / folder)
        assert all(r.path.is_file() for r in records)
    assert dataset.standin
    assert dataset.data_hash == "0123abcd"
    assert dataset.distractor_pids == {0}


def test_background_only_in_gallery(tiny_sets: Path) -> None:
    dataset = load_dataset("market1501", tiny_sets)
    assert sum(r.pid == 0 for r in dataset.gallery) == 2
    assert all(r.pid > 0 for r in (*dataset.train, *dataset.query))


@pytest.mark.parametrize(
    "folder",
    ["Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "market1501", "MARKET1501/market1501",
     "Market-1501-v15.09.15/Market-1501-v15.09.15"],
)  # fmt: skip
def test_accepted_folders(tmp_path: Path, folder: str) -> None:
    trees.mark(tmp_path, market1501=trees.market1501(tmp_path, folder))
    dataset = load_dataset("market1501", tmp_path)
    assert dataset.root == tmp_path / folder
    assert load_dataset("market1501", tmp_path / folder).train == dataset.train  # root = the data folder itself
    assert len(dataset.train) == 24


def test_parent_folder_that_looks_like_a_name_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "run-3_c1" / "0009_c5s1_000000_00.jpg"
    counts = trees.market1501(root)
    trees.mark(root, market1501=counts)
    dataset = load_dataset("market1501", root)
    assert {r.pid for r in dataset.train} == {2, 7, 11, 30}
    assert {r.camid for r in dataset.train} == {0, 3}


def test_counts_are_compared_with_the_published_ones(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    with pytest.raises(UsageError, match=r"Market-1501 train: found 4 ids, 24 images, expected 751 ids, 12936 images"):
        load_dataset("market1501", tmp_path)
    with pytest.warns(UserWarning, match="expected"):
        dataset = load_dataset("market1501", tmp_path, strict=False)
    assert len(dataset.train) == 24
    assert not dataset.standin
    assert len(dataset.data_hash) == 64


def test_missing_parts_and_similar_names(tmp_path: Path) -> None:
    trees.market1501(tmp_path, "Market-1501-v15")
    with pytest.raises(
        UsageError, match=r"Market-1501 not found in .*bounding_box_train.*similar names.*Market-1501-v15"
    ):
        load_dataset("market1501", tmp_path)
    trees.market1501(tmp_path)
    for part in ("query", "bounding_box_test"):
        (tmp_path / "Market-1501-v15.09.15" / part).rename(tmp_path / part[:2])
    with pytest.raises(UsageError, match=r"is incomplete: .*15\.09\.15 lacks query, bounding_box_test"):
        load_dataset("market1501", tmp_path)
    with pytest.raises(UsageError, match=r"is incomplete: .*lacks query, bounding_box_test"):
        load_dataset("market1501", tmp_path / "Market-1501-v15.09.15")


def test_wrong_names_are_listed(tmp_path: Path) -> None:
    trees.mark(tmp_path, market1501=trees.market1501(tmp_path))
    folder = tmp_path / "Market-1501-v15.09.15/bounding_box_train"
    for name in ("copy of 0002.jpg", "0002_c1s1_000000_00 (1).jpg", "notes.txt", "0002.jpg"):
        (folder / name).write_bytes(b"")
    (folder / "._0002_c1s1_000000_00.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"4 name\(s\) do not look like .*: 0002.jpg, 0002_c1s1_000000_00 \(1\)"):
        load_dataset("market1501", tmp_path)
    with pytest.warns(UserWarning, match="notes.txt|copy of"):
        assert len(load_dataset("market1501", tmp_path, strict=False).train) == 24


def test_camera_out_of_range_names_the_file(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    trees.image(tmp_path / "Market-1501-v15.09.15/query/0001_c7s1_000000_00.jpg")
    with pytest.raises(UsageError, match=r"camera outside 1\.\.6: 0001_c7s1_000000_00.jpg"):
        load_dataset("market1501", tmp_path, strict=False)


@pytest.mark.parametrize("ending", [".jpg.jpg", ".JPG", ".jpeg", ".png"])
def test_other_endings_are_read(tmp_path: Path, ending: str) -> None:
    trees.mark(tmp_path, market1501=trees.market1501(tmp_path))
    for path in (tmp_path / "Market-1501-v15.09.15/query").iterdir():
        path.rename(path.parent / (path.stem + ending))
    assert len(load_dataset("market1501", tmp_path).query) == 6


def test_query_without_its_person_in_the_gallery(tmp_path: Path) -> None:
    counts = trees.market1501(tmp_path)
    for path in (tmp_path / "Market-1501-v15.09.15/bounding_box_test").glob("0005_*"):
        path.unlink()
    counts["gallery"] = {"ids": 2, "images": 6, "cameras": 4}
    trees.mark(tmp_path, market1501=counts)
    with pytest.raises(UsageError, match=r"2 query image\(s\) of persons that the gallery lacks, e\.g\. 0005_c2s1"):
        load_dataset("market1501", tmp_path)


def test_query_with_matches_in_its_own_camera_only(tmp_path: Path) -> None:
    counts = trees.market1501(tmp_path)
    (tmp_path / "Market-1501-v15.09.15/bounding_box_test/0005_c2s2_000060_01.jpg").unlink()
    counts["gallery"]["images"] = 7
    trees.mark(tmp_path, market1501=counts)
    with pytest.warns(UserWarning, match=r"1 query image\(s\) have matches in their own camera only"):
        load_dataset("market1501", tmp_path)
