"""MSMT17: lists, versions, repacks. The record rule (list line, third field = camera) is torchreid's."""

from __future__ import annotations

from pathlib import Path

import pytest
import trees

from lda.data import load_dataset
from lda.errors import UsageError


def _peer_records(list_file: Path) -> list[tuple[str, int, int]]:
    """(relative path, pid, camid) by torchreid's rule: id from the list, camera = third field of the path - 1."""
    lines = [line.split(" ") for line in list_file.read_text().splitlines()]
    return sorted((path, int(pid), int(path.split("_")[2]) - 1) for path, pid in lines)


def _relative(records: tuple, base: Path) -> list[tuple[str, int, int]]:
    return [(r.path.relative_to(base).as_posix(), r.pid, r.camid) for r in records]


def test_records_equal_those_of_the_public_loaders(tiny_sets: Path) -> None:
    dataset = load_dataset("msmt17", tiny_sets)
    base = tiny_sets / "MSMT17_V1"
    assert _relative(dataset.train, base / "train") == _peer_records(base / "list_train.txt")
    assert _relative(dataset.query, base / "test") == _peer_records(base / "list_query.txt")
    assert _relative(dataset.gallery, base / "test") == _peer_records(base / "list_gallery.txt")
    assert dataset.version == "MSMT17_V1"
    both = load_dataset("msmt17", tiny_sets, msmt17_train="train+val")
    val = _peer_records(base / "list_val.txt")
    assert sorted(_relative(both.train, base / "train")) == sorted(_peer_records(base / "list_train.txt") + val)
    assert {r.camid for r in both.train} == {0, 7, 14}


@pytest.mark.parametrize(
    ("folder", "train", "test", "version"),
    [
        ("MSMT17_V2", "mask_train_v2", "mask_test_v2", "MSMT17_V2"),
        ("msmt17/MSMT17_V1", "train", "test", "MSMT17_V1"),
        ("MSMT17", "train", "test", "MSMT17_V1"),
        ("MSMT17", "mask_train_v2", "mask_test_v2", "MSMT17_V2"),
        ("MSMT17_V2/MSMT17_V2", "mask_train_v2", "mask_test_v2", "MSMT17_V2"),
        (".", "train", "test", "MSMT17_V1"),
    ],
)
def test_accepted_folders(tmp_path: Path, folder: str, train: str, test: str, version: str) -> None:
    trees.mark(tmp_path, msmt17=trees.msmt17(tmp_path, folder, train, test))
    for root in (tmp_path, tmp_path / folder):
        dataset = load_dataset("msmt17", root)
        assert (dataset.version, len(dataset.train), len(dataset.query)) == (version, 12, 4)


def test_both_versions_warn_and_the_first_is_taken(tmp_path: Path) -> None:
    trees.msmt17(tmp_path, "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    trees.mark(tmp_path, msmt17=trees.msmt17(tmp_path))
    with pytest.warns(UserWarning, match=r"using .*MSMT17_V1.* not .*MSMT17_V2"):
        assert load_dataset("msmt17", tmp_path).version == "MSMT17_V1"


def test_missing_lists_are_named(tmp_path: Path) -> None:
    trees.msmt17(tmp_path)
    for part in ("query", "val"):
        (tmp_path / f"MSMT17_V1/list_{part}.txt").unlink()
    with pytest.raises(UsageError, match=r"incomplete: .*MSMT17_V1 lacks list_query\.txt; expected .*list_gallery"):
        load_dataset("msmt17", tmp_path)


def test_list_val_is_needed_only_for_training_on_it(tmp_path: Path) -> None:
    trees.mark(tmp_path, msmt17=trees.msmt17(tmp_path))
    (tmp_path / "MSMT17_V1/list_val.txt").unlink()
    assert len(load_dataset("msmt17", tmp_path).train) == 12
    with pytest.raises(UsageError, match=r"lacks list_val\.txt"):
        load_dataset("msmt17", tmp_path, msmt17_train="train+val")


def test_listed_file_that_is_not_there(tmp_path: Path) -> None:
    trees.mark(tmp_path, msmt17=trees.msmt17(tmp_path))
    (tmp_path / "MSMT17_V1/train/0001/0001_002_01_0303morning_0002_0.jpg").unlink()
    with pytest.raises(UsageError, match=r"list_train\.txt: 1 of its files are not in .*: 0001/0001_002_01"):
        load_dataset("msmt17", tmp_path)
    with pytest.warns(UserWarning, match="of its files are not in"):
        assert len(load_dataset("msmt17", tmp_path, strict=False).train) == 11


def test_list_with_windows_ends_tabs_and_spaces(tmp_path: Path) -> None:
    trees.mark(tmp_path, msmt17=trees.msmt17(tmp_path))
    path = tmp_path / "MSMT17_V1/list_train.txt"
    lines = path.read_text().splitlines()
    path.write_bytes(
        ("\r\n".join([lines[0].replace(" ", "\t"), lines[1].replace(" ", "   "), *lines[2:], ""])).encode()
    )
    assert len(load_dataset("msmt17", tmp_path).train) == 12


def test_lines_that_do_not_fit(tmp_path: Path) -> None:
    trees.mark(tmp_path, msmt17=trees.msmt17(tmp_path))
    path = tmp_path / "MSMT17_V1/list_gallery.txt"
    good = path.read_text()
    path.write_text(good + "0000/holiday.jpg 0\n")
    with pytest.raises(UsageError, match=r"list_gallery\.txt: 1 line\(s\) do not look like .*line 5 '0000/holiday"):
        load_dataset("msmt17", tmp_path)
    path.write_text(good.replace("_03_", "_16_", 1))
    with pytest.raises(UsageError, match=r"list_gallery\.txt: 1 line\(s\) with a camera outside 1\.\.15: line 1 "):
        load_dataset("msmt17", tmp_path)


def _flat(root: Path, folder: str) -> None:
    for part, pids in (("bounding_box_train", (0, 1)), ("query", (0, 2)), ("bounding_box_test", (0, 2))):
        for pid in pids:
            for camera in (1, 12):
                trees.image(root / folder / part / f"{pid:04d}_c{camera:02d}_{len(part):04d}.jpg")


@pytest.mark.parametrize("folder", ["MSMT17_V1", "MSMT17", "msmt17/MSMT17_V2"])
def test_flat_repack(tmp_path: Path, folder: str) -> None:
    _flat(tmp_path, folder)
    part = {"ids": 2, "images": 4, "cameras": 2}
    parts = {
        "train": {**part, "images": 3},
        "val": {"ids": 1, "images": 1, "cameras": 1},
        "query": part,
        "gallery": part,
    }
    trees.mark(tmp_path, msmt17={**parts, "train+val": part})
    with pytest.raises(UsageError, match=r"no list_val\.txt.* set msmt17_train to train\+val"):
        load_dataset("msmt17", tmp_path)
    dataset = load_dataset("msmt17", tmp_path, msmt17_train="train+val")
    assert [(r.pid, r.camid) for r in dataset.train] == [(0, 0), (0, 11), (1, 0), (1, 11)]
    assert dataset.version == f"{folder.rpartition('/')[2]} flat"
    (tmp_path / folder / "list_val.txt").write_text("0001_c12_0018.jpg 1\n")
    assert [(r.pid, r.camid) for r in load_dataset("msmt17", tmp_path).train] == [(0, 0), (0, 11), (1, 0)]
    assert len(load_dataset("msmt17", tmp_path, msmt17_train="train+val").train) == 4
