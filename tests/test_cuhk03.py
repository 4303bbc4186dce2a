"""CUHK03: folders, torchreid's unpacked images, and the raw MATLAB files, all giving the same lists."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import trees
from PIL import Image
from scipy.io import savemat

from lda.data import load_dataset
from lda.errors import UsageError

PAIRS = (3, 2, 1, 1, 1)  # persons of the five camera pairs
CLASSIC = [[(1, 2), (3, 1)], [(2, 1), (5, 1), (1, 3)]]  # test persons of two splits of the classic protocol
TRAIN, TEST = (1, 3, 5, 7), (2, 4, 6, 8)  # person numbers, counted through the pairs


def _persons() -> list[tuple[int, int]]:
    return [(pair, person) for pair, count in enumerate(PAIRS, 1) for person in range(1, count + 1)]


def _picture(boxes: str, name: str) -> np.ndarray:
    rng = np.random.default_rng(list(f"{boxes}/{name}".encode()))
    return rng.integers(0, 256, (12, 6, 3), dtype=np.uint8)


def _columns(boxes: str, number: int) -> list[int]:
    """The filled columns (0-9) of a person's row: two or three images in view 1, two in view 2."""
    third = [2] if boxes == "labeled" and number == 1 else []
    return [0, 1, *third, 5, 6]


def _names(boxes: str) -> list[tuple[str, int]]:
    return [
        (f"{pair}_{person:03d}_{column // 5 + 1}_{column + 1:02d}.png", number)
        for number, (pair, person) in enumerate(_persons(), 1)
        for column in _columns(boxes, number)
    ]


def _part_of(name: str, number: int) -> str:
    if number in TRAIN:
        return "train"
    return "query" if name[-6:-4] in ("01", "06") else "gallery"


def _write_release(path: Path) -> None:
    """cuhk-03.mat as MATLAB 7.3 stores it: tables of references, images as 3 x W x H, empty cells as two zeros."""
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        cells = file.create_group("#refs#")
        for boxes in ("labeled", "detected"):
            pairs = file.create_dataset(boxes, (1, 5), dtype=h5py.ref_dtype)
            for pair, count in enumerate(PAIRS, 1):
                table = cells.create_dataset(f"{boxes}{pair}", (10, count), dtype=h5py.ref_dtype)
                for person in range(1, count + 1):
                    number = _persons().index((pair, person)) + 1
                    for column in range(10):
                        name = f"{pair}_{person:03d}_{column // 5 + 1}_{column + 1:02d}.png"
                        filled = column in _columns(boxes, number)
                        data = _picture(boxes, name).transpose(2, 1, 0) if filled else np.zeros(2, np.uint64)
                        table[column, person - 1] = cells.create_dataset(f"{boxes}/{name}", data=data).ref
                pairs[0, pair - 1] = table.ref


def _write_testsets(path: Path) -> None:
    """The classic splits: 2 x K tables of (pair, person), as torchreid finds them after transposing."""
    with h5py.File(path, "r+") as file:
        references = file.create_dataset("testsets", (1, len(CLASSIC)), dtype=h5py.ref_dtype)
        for split, persons in enumerate(CLASSIC):
            table = np.array(persons, dtype=np.float64).T
            references[0, split] = file["#refs#"].create_dataset(f"testset{split}", data=table).ref


def _write_protocol(path: Path, boxes: str) -> None:
    names = _names(boxes)
    cells = np.empty((len(names), 1), dtype=object)
    cells[:, 0] = [name for name, _ in names]
    parts = {
        f"{part}_idx": np.array([[row] for row, item in enumerate(names, 1) if _part_of(*item) == part])
        for part in ("train", "query", "gallery")
    }
    labels = np.array([[number] for _, number in names])
    cameras = np.array([[int(name.split("_")[2])] for name, _ in names])
    savemat(path, {"filelist": cells, "labels": labels, "camId": cameras, **parts})


def _counts() -> trees.Counts:
    counts: trees.Counts = {}
    for boxes in ("labeled", "detected"):
        for part in ("train", "query", "gallery"):
            images = [item for item in _names(boxes) if _part_of(*item) == part]
            counts[f"{boxes}/{part}"] = {"ids": 4, "images": len(images), "cameras": 2}
        counts[f"{boxes}/all"] = {"ids": 8, "images": len(_names(boxes)), "cameras": 2}
    return counts


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The release and both protocol files, as downloaded."""
    _write_release(tmp_path / "cuhk03/cuhk03_release/cuhk-03.mat")
    for boxes in ("labeled", "detected"):
        _write_protocol(tmp_path / f"cuhk03/cuhk03_new_protocol_config_{boxes}.mat", boxes)
    trees.mark(tmp_path, cuhk03=_counts())
    return tmp_path


@pytest.mark.parametrize("boxes", ["labeled", "detected"])
@pytest.mark.parametrize("folder", ["cuhk03-np", "cuhknp", "CUHK03-NP"])
def test_folders(tmp_path: Path, boxes: str, folder: str) -> None:
    trees.mark(tmp_path, cuhk03=trees.cuhk03_np(tmp_path, folder))
    dataset = load_dataset("cuhk03", tmp_path, cuhk03_boxes=boxes)
    assert dataset.root == tmp_path / folder / boxes
    assert dataset.version == boxes
    for records, part in ((dataset.train, "bounding_box_train"), (dataset.query, "query"),
                          (dataset.gallery, "bounding_box_test")):  # fmt: skip
        names = sorted(path.name for path in (dataset.root / part).iterdir())
        assert [(r.path.name, r.pid, r.camid) for r in records] == [
            (name, int(name.split("_")[0]), int(name.split("_")[1][1]) - 1) for name in names
        ]
    assert load_dataset("cuhk03", tmp_path / folder, cuhk03_boxes=boxes).train == dataset.train


@pytest.mark.parametrize("boxes", ["labeled", "detected"])
def test_raw_release(raw: Path, boxes: str) -> None:
    dataset = load_dataset("cuhk03", raw, cuhk03_boxes=boxes)
    for part in ("train", "query", "gallery"):
        records = getattr(dataset, part)
        expected = sorted(item for item in _names(boxes) if _part_of(*item) == part)
        assert [(r.path.name, r.pid) for r in records] == expected
        assert [r.camid for r in records] == [int(name.split("_")[2]) - 1 for name, _ in expected]
        for record in records:
            with Image.open(record.path) as picture:
                assert np.array_equal(np.asarray(picture), _picture(boxes, record.path.name))
    assert raw not in dataset.train[0].path.parents  # unpacked into the cache: the data folder may be read-only
    first = dataset.train[0].path.stat().st_mtime_ns
    assert load_dataset("cuhk03", raw, cuhk03_boxes=boxes).train[0].path.stat().st_mtime_ns == first


def test_protocol_file_beside_the_release(raw: Path) -> None:
    for path in (raw / "cuhk03").glob("*.mat"):
        path.rename(path.parent / "cuhk03_release" / path.name)
    for root in (raw, raw / "cuhk03/cuhk03_release"):
        assert len(load_dataset("cuhk03", root).query) == 8


def test_only_the_chosen_boxes_are_needed(raw: Path) -> None:
    (raw / "cuhk03/cuhk03_new_protocol_config_detected.mat").unlink()
    assert load_dataset("cuhk03", raw).version == "labeled"
    with pytest.raises(UsageError, match=r"lacks cuhk03_new_protocol_config_detected\.mat"):
        load_dataset("cuhk03", raw, cuhk03_boxes="detected")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>\n<html>", b"version https://git-lfs.github.com/spec/v1\n", b""])
def test_protocol_file_that_is_no_mat_file(raw: Path, content: bytes) -> None:
    (raw / "cuhk03/cuhk03_new_protocol_config_labeled.mat").write_bytes(content)
    with pytest.raises(UsageError, match=r"config_labeled\.mat: not a MAT file, its first bytes are b'"):
        load_dataset("cuhk03", raw)


def test_protocol_file_of_another_kind(raw: Path) -> None:
    savemat(raw / "cuhk03/cuhk03_new_protocol_config_labeled.mat", {"a": 1})
    with pytest.raises(UsageError, match=r"not a CUHK03 new-protocol file \(KeyError: 'filelist'\)"):
        load_dataset("cuhk03", raw)


def test_truncated_release(raw: Path) -> None:
    path = raw / "cuhk03/cuhk03_release/cuhk-03.mat"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match=r"cuhk-03\.mat: cannot be read .*truncated.*md5 728939e58ad9f0ff53e521857d"):
        load_dataset("cuhk03", raw)


def test_unpacking_that_was_interrupted_leaves_nothing(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = raw / "cache"
    monkeypatch.setenv("LDA_CACHE_DIR", str(cache))
    save, saved = Image.Image.save, []

    def interrupted(self: Image.Image, path: Path) -> None:
        saved.append(path)
        if len(saved) == 5:
            raise KeyboardInterrupt
        save(self, path)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("cuhk03", raw)
    assert not list(cache.rglob("*.png"))
    monkeypatch.setattr(Image.Image, "save", save)
    assert len(load_dataset("cuhk03", raw).query) == 8


def test_without_h5py(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDA_CACHE_DIR", str(raw / "cache"))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r"cuhk-03\.mat: reading it needs h5py: pip install h5py"):
        load_dataset("cuhk03", raw)


def _torchreid_images(root: Path, boxes: str) -> None:
    """What torchreid leaves behind: PNG images, and a split with absolute paths and relabelled training ids."""
    parts: dict[str, list] = {"train": [], "query": [], "gallery": []}
    folder = root / "cuhk03" / f"images_{boxes}"
    folder.mkdir(parents=True)
    for name, number in _names(boxes):
        Image.fromarray(_picture(boxes, name)).save(folder / name)
        part = _part_of(name, number)
        pid = TRAIN.index(number) if part == "train" else number
        parts[part].append([f"/somewhere/else/cuhk03/images_{boxes}/{name}", pid, int(name.split("_")[2]) - 1])
    (root / f"cuhk03/splits_new_{boxes}.json").write_text(json.dumps([parts]))


def test_images_unpacked_by_torchreid(tmp_path: Path) -> None:
    _torchreid_images(tmp_path, "labeled")
    trees.mark(tmp_path, cuhk03=_counts())
    dataset = load_dataset("cuhk03", tmp_path)
    for part in ("train", "query", "gallery"):
        expected = sorted(name for name, number in _names("labeled") if _part_of(name, number) == part)
        assert [r.path.name for r in getattr(dataset, part)] == expected
    by_name = {name: _persons()[number - 1] for name, number in _names("labeled")}
    assert all(r.pid == 1000 * by_name[r.path.name][0] + by_name[r.path.name][1] for r in dataset.train)
    # With the protocol's own file beside them, person numbers are those of the release.
    _write_protocol(tmp_path / "cuhk03/cuhk03_new_protocol_config_labeled.mat", "labeled")
    assert {r.pid for r in load_dataset("cuhk03", tmp_path).train} == set(TRAIN)


def test_unpacked_image_that_is_missing(tmp_path: Path) -> None:
    _torchreid_images(tmp_path, "labeled")
    trees.mark(tmp_path, cuhk03=_counts())
    (tmp_path / "cuhk03/images_labeled/1_001_2_06.png").unlink()
    with pytest.raises(UsageError, match=r"1 image\(s\) of train are not there: 1_001_2_06\.png"):
        load_dataset("cuhk03", tmp_path)
    (tmp_path / "cuhk03/splits_new_labeled.json").write_text("[]")
    with pytest.raises(UsageError, match=r"splits_new_labeled\.json: not a CUHK03 split file"):
        load_dataset("cuhk03", tmp_path)


def test_nothing_there_names_every_layout(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cuhk03-np/labeled/\{bounding_box_train.*images_labeled.*cuhk-03\.mat"):
        load_dataset("cuhk03", tmp_path)


def test_unknown_boxes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cuhk03_boxes: unknown value 'labelled' \(did you mean 'labeled'\?\)"):
        load_dataset("cuhk03", tmp_path, cuhk03_boxes="labelled")


def test_new_protocol_lists_do_not_depend_on_the_layout(raw: Path) -> None:
    """The same persons and views from the raw files and from folders written the CUHK03-NP way."""
    by_raw = load_dataset("cuhk03", raw)
    folder = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    for part, name in folder.items():
        for count, record in enumerate(getattr(by_raw, part)):
            target = raw / "cuhk03-np/labeled" / name / f"{record.pid:04d}_c{record.camid + 1}_{count + 1}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(record.path, target)
    by_folder = load_dataset("cuhk03", raw)
    assert by_folder.root.name == "labeled"
    for part in folder:
        first, second = getattr(by_raw, part), getattr(by_folder, part)
        assert sorted((r.pid, r.camid) for r in first) == sorted((r.pid, r.camid) for r in second)


# --- the classic protocol ---------------------------------------------------------------------------------------------


def _classic(root: Path) -> list[tuple[list[str], list[str]]]:
    """(query names, gallery names) of every split."""
    dataset = load_dataset("cuhk03", root, cuhk03_protocol="classic")
    assert dataset.version == "labeled, classic"
    assert all(split.single_gallery_shot for split in dataset.test_splits)
    return [([r.path.name for r in s.query], [r.path.name for r in s.gallery]) for s in dataset.test_splits]


def _classic_names(split: int) -> list[str]:
    """torchreid's rule: every image of a test person asks and answers."""
    wanted = set(CLASSIC[split])
    return sorted(name for name, number in _names("labeled") if _persons()[number - 1] in wanted)


def test_classic_splits_of_the_release(raw: Path) -> None:
    for path in (raw / "cuhk03").glob("*.mat"):
        path.unlink()  # the new protocol's files are not needed
    _write_testsets(raw / "cuhk03/cuhk03_release/cuhk-03.mat")
    assert _classic(raw) == [(_classic_names(split),) * 2 for split in range(2)]
    dataset = load_dataset("cuhk03", raw, cuhk03_protocol="classic")
    assert {r.pid for r in dataset.train} == {1001, 1003, 2001, 2002, 4001, 5001}
    assert {(r.pid, r.camid) for r in dataset.query} == {(1002, 0), (1002, 1), (3001, 0), (3001, 1)}


def test_classic_splits_unpacked_by_torchreid(tmp_path: Path) -> None:
    _torchreid_images(tmp_path, "labeled")
    trees.mark(tmp_path, cuhk03=_counts())
    splits = [{"query": [[f"C:\\data\\{name}", 0, 0] for name in _classic_names(split)]} for split in range(2)]
    (tmp_path / "cuhk03/splits_classic_labeled.json").write_text(json.dumps(splits))
    assert _classic(tmp_path) == [(_classic_names(split),) * 2 for split in range(2)]
    (tmp_path / "cuhk03/images_labeled/3_001_1_01.png").unlink()
    with pytest.raises(UsageError, match=r"CUHK03 all: found 8 ids, 32 images, .*expected 8 ids, 33 images"):
        load_dataset("cuhk03", tmp_path, cuhk03_protocol="classic")


def test_classic_splits_are_not_in_the_folders(tmp_path: Path, raw: Path) -> None:
    (raw / "cuhk03").rename(raw / "elsewhere")
    trees.mark(tmp_path, cuhk03=trees.cuhk03_np(tmp_path))
    with pytest.raises(UsageError, match=r"CUHK03 .*cuhk-03\.mat.*splits_classic_labeled\.json"):
        load_dataset("cuhk03", tmp_path, cuhk03_protocol="classic")
    with pytest.raises(UsageError, match=r"cuhk03_protocol: unknown value 'old'"):
        load_dataset("cuhk03", tmp_path, cuhk03_protocol="old")


def test_release_without_testsets(raw: Path) -> None:
    with pytest.raises(UsageError, match=r"cuhk-03\.mat: cannot be read as cuhk-03\.mat .*testsets"):
        load_dataset("cuhk03", raw, cuhk03_protocol="classic")
