"""The doctor on trees made broken on purpose: one test per case of bad data that public loaders trip over.

The comment above a test says what those do. Cases that must change nothing compare with the sound tree.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import h5py
import pytest
import trees
from PIL import Image
from test_cuhk03 import _counts, _torchreid_images, _write_protocol, _write_release

from lda.data import load_dataset
from lda.data.cache import cache_dir
from lda.data.doctor import main
from lda.data.packed import pack
from lda.data.sources import build_task
from lda.errors import UsageError

MARKET = "Market-1501-v15.09.15"


class Answer(NamedTuple):
    code: int
    text: str

    def line(self, pattern: str) -> str:
        """The line that a pattern is found in."""
        lines = [line for line in self.text.splitlines() if re.search(pattern, line)]
        assert lines, f"{pattern!r} not in:\n{self.text}"
        return lines[0]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("LDA_CACHE_DIR", str(tmp_path / "cache"))

    def examine(root: Path, *options: str) -> Answer:
        capsys.readouterr()
        code = main(["--data-root", str(root), *options])
        output = capsys.readouterr()
        return Answer(code, output.out + output.err)

    return examine


@pytest.fixture
def root(tiny_sets: Path, tmp_path: Path) -> Path:
    """A copy of the sets of Protocol-2 and 3, to be broken."""
    return Path(shutil.copytree(tiny_sets, tmp_path / "data"))


@pytest.fixture
def single_shot(tmp_path: Path) -> Path:
    """The four targets of Protocol-1, to be broken."""
    folder = tmp_path / "single-shot"
    for build in (trees.prid, trees.grid, trees.viper, trees.ilids):
        build(folder)
    return folder


@pytest.fixture
def raw_cuhk03(tmp_path: Path) -> Path:
    """CUHK03 as downloaded."""
    _write_release(tmp_path / "data/cuhk03/cuhk03_release/cuhk-03.mat")
    for boxes in ("labeled", "detected"):
        _write_protocol(tmp_path / f"data/cuhk03/cuhk03_new_protocol_config_{boxes}.mat", boxes)
    trees.mark(tmp_path / "data", cuhk03=_counts())
    return tmp_path / "data"


# --- sound trees -----------------------------------------------------------------------------------------------------
def test_sound_trees(doctor, root: Path, single_shot: Path, standin_tiny: Path) -> None:
    answer = doctor(root, "--verify")
    assert answer.code == 0
    assert answer.text.splitlines()[-1] == "6 ok, 4 absent"
    assert re.search(r"train +4 +24 +2 +4, 24, 2", answer.text)
    assert "stand-in 0123abcd" in answer.line("^MSMT17 +ok")
    answer = doctor(single_shot)
    assert answer.code == 0
    assert answer.text.splitlines()[-1] == "4 ok, 6 absent"
    assert re.search(r"gallery +250 +1025 +6 +250, 1025, -", answer.text)
    assert doctor(standin_tiny, "--verify").code == 0


def test_as_a_command(root: Path) -> None:
    command = [sys.executable, "-m", "lda.data.doctor", "--data-root", str(root)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    result = subprocess.run([*command, "--dataset", "market"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown data set 'market' (did you mean 'market1501'?)")


def test_a_set_that_was_asked_for_must_be_there(doctor, root: Path) -> None:
    answer = doctor(root, "--dataset", "viper", "market1501")
    assert answer.code == 1
    assert "VIPeR not found in" in answer.line("error: ")
    assert answer.text.splitlines()[-1] == "1 ok, 1 wrong"


def test_damaged_packed_images(doctor, root: Path) -> None:
    images = pack(load_dataset("cuhk_sysu", root).train, 8, 4, cache_dir())
    assert doctor(root, "--verify").code == 0
    images.path.write_bytes(bytes(images.path.stat().st_size))
    answer = doctor(root, "--verify")
    assert answer.code == 1
    assert f"{images.path}: damaged packed images; delete it" in answer.text


# --- the cases -------------------------------------------------------------------------------------------------------
# Public loaders name the first missing path, or silently give an empty list.
def test_01_missing_folders(doctor, root: Path, tmp_path: Path) -> None:
    for part in ("query", "bounding_box_test"):
        (root / MARKET / part).rename(root / part[:3])
    shutil.move(root / "cuhk_sysu", root / "cuhk-sysu-crops")
    (root / "MSMT17_V1").rename(root / "MSMT17-V1")
    answer = doctor(root)
    assert answer.code == 1
    assert f"{MARKET} lacks query, bounding_box_test" in answer.line("^    error: Market-1501 is incomplete")
    assert "similar names there: MSMT17-V1" in answer.line("^    error: MSMT17 not found")
    assert "expected cuhk_sysu/cropped_images" in answer.line("CUHK-SYSU not found")
    assert doctor(tmp_path / "nowhere") == (2, f"error: --data-root: {tmp_path}/nowhere: there is no such folder\n")
    assert doctor(tmp_path / "data" / "MSMT17-V1" / "train").code == 1  # nothing at all there


# glob gives fewer files without complaint.
def test_02_empty_or_half_extracted(doctor, root: Path) -> None:
    removed = sorted((root / MARKET / "bounding_box_train").glob("*.jpg"))[::2]
    for path in removed:
        path.unlink()
    answer = doctor(root)
    assert answer.code == 1
    assert "found 4 ids, 12 images, expected 4 ids, 24 images" in answer.line("error: ")
    answer = doctor(root, "--lenient")
    assert answer.code == 0
    assert "found 4 ids, 12 images" in answer.line("warning: ")
    shutil.rmtree(root / MARKET / "query")
    (root / MARKET / "query").mkdir()
    answer = doctor(root, "--lenient")
    assert answer.code == 1
    assert "query holds no image named like 0001_c1s1" in answer.line("error: ")


# Not found.
def test_03_nested_twice(doctor, root: Path) -> None:
    expected = load_dataset("msmt17", root)
    for name in (MARKET, "MSMT17_V1"):
        (root / name).rename(root / "moved")
        (root / name).mkdir()
        (root / "moved").rename(root / name / name)
    assert doctor(root).code == 0
    assert len(load_dataset("msmt17", root).train) == len(expected.train)


# `._x.jpg` matches *.jpg and fails on decoding; folder listings become classes.
def test_04_clutter(doctor, root: Path) -> None:
    for folder in (f"{MARKET}/query", "cuhk_sysu/cropped_images", "cuhk02/Dataset/P1/cam1", "MSMT17_V1/train/0000"):
        for name in ("Thumbs.db", ".DS_Store", "._0001_c1s1_000001_00.jpg", "desktop.ini"):
            (root / folder / name).write_bytes(b"clutter")
    (root / "cuhk02/Dataset/__MACOSX").mkdir()
    (root / MARKET / "__MACOSX/query").mkdir(parents=True)
    answer = doctor(root, "--verify")
    assert answer.code == 0
    assert "skipped 4 clutter file(s)" in answer.line(r"note: .*query: skipped")


# AttributeError: 'NoneType' object has no attribute 'groups'.
def test_05_names_that_do_not_match(doctor, root: Path) -> None:
    for name in ("holiday.jpg", "0001.jpg", "copy.jpg", "x.jpg"):
        trees.touch(root / MARKET / "query" / name)
    answer = doctor(root)
    assert answer.code == 1
    assert "4 name(s) do not look like" in answer.line("error: ")
    assert "0001.jpg, copy.jpg, holiday.jpg, ..." in answer.line("error: ")
    assert doctor(root, "--lenient").code == 0


# The pattern is searched in the whole path: wrong person, wrong camera.
def test_06_folder_that_looks_like_a_name(doctor, root: Path, tmp_path: Path) -> None:
    inner = tmp_path / "run-3_c1" / "0009_c5s1_000000_00.jpg"
    shutil.copytree(root, inner)
    assert doctor(inner).code == 0
    assert [(r.pid, r.camid) for r in load_dataset("market1501", inner).train] == [
        (r.pid, r.camid) for r in load_dataset("market1501", root).train
    ]


# Kept as junk or dropped; META lets id 0 through into training.
def test_07_08_junk_and_background(doctor, root: Path) -> None:
    assert "gallery: 2 junk images (id -1) left out, 2 of background (id 0)" in doctor(root).text
    assert {r.pid for r in load_dataset("market1501", root).gallery} == {0, 1, 3, 5}
    market = build_task("protocol3", "cuhk03", root).sources[0]
    assert {r.pid for r in market.records} == {1, 2, 3, 5, 7, 11, 30}
    trees.image(root / MARKET / "bounding_box_train/0000_c1s1_000000_00.jpg")
    assert "of id -1 or 0 in train or query, e.g. 0000_c1s1" in doctor(root).line("error: ")


# Silently missed by exact globs.
def test_09_other_endings(doctor, root: Path) -> None:
    for ending, path in zip((".JPG", ".jpeg", ".jpg.jpg", ".Jpg"), sorted((root / MARKET / "query").iterdir())):  # noqa: B905
        path.rename(path.with_name(path.stem + ending))
    answer = doctor(root)
    assert answer.code == 0
    assert "4 file(s) do not end in .jpg" in answer.line("note: .*query")


# torchreid and others try for ever; TransReID trains on grey areas; a worker dies.
@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", None])
def test_10_13_damaged_images(doctor, root: Path, content: bytes | None) -> None:
    train = sorted((root / MARKET / "bounding_box_train").glob("*.jpg"))[5]
    damaged = train.read_bytes()[:-200] if content is None else content
    train.write_bytes(damaged)
    assert doctor(root).code == 0  # it has to be decoded to be seen
    answer = doctor(root, "--verify")
    assert answer.code == 1
    assert f"{train}: cannot be decoded" in answer.line("error: ")
    assert doctor(root, "--verify", "--lenient").code == 1  # no run could read it
    with pytest.raises(UsageError, match=rf"{train.name}: cannot be decoded"):
        pack(build_task("protocol2", "cuhk03", root).sources[0].records, 8, 4, cache_dir())
    query = sorted((root / MARKET / "query").glob("*.jpg"))[0]
    query.write_bytes(damaged)
    answer = doctor(root, "--verify", "--lenient")
    assert answer.code == 1
    assert "cannot be decoded" in answer.line(f"error: {query}")


# fast-reid repeats grey channels but not RGBA; torchreid ignores EXIF rotation.
def test_11_12_modes_and_rotation(doctor, root: Path) -> None:
    folder = root / "cuhk02/Dataset/P1/cam1"
    names = ("001_0001.png", "001_0002.png", "002_0001.png")
    for name, mode in zip(names, ("L", "RGBA", "P"), strict=True):
        with Image.open(folder / name) as image:
            image.convert(mode).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (8, 16)).save(folder / "002_0002.png", exif=exif)
    answer = doctor(root, "--verify")
    assert answer.code == 0
    assert "images converted to RGB: 1 of mode L, 1 of mode P, 1 of mode RGBA" in answer.text
    assert "1 image(s) are turned as their EXIF data say: 002_0002.png" in answer.text
    batch = pack(load_dataset("cuhk02", root).train, 16, 8, cache_dir())
    assert batch.shape == (40, 3, 16, 8)


# Both .mat files demanded although one is used.
def test_14_only_the_chosen_protocol_file(doctor, raw_cuhk03: Path) -> None:
    assert doctor(raw_cuhk03).code == 0
    (raw_cuhk03 / "cuhk03/cuhk03_new_protocol_config_detected.mat").unlink()
    answer = doctor(raw_cuhk03)
    assert answer.code == 0
    assert "absent" in answer.line("CUHK03 detected")
    (raw_cuhk03 / "cuhk03/cuhk03_new_protocol_config_labeled.mat").unlink()
    answer = doctor(raw_cuhk03)
    assert answer.code == 1
    assert "lacks cuhk03_new_protocol_config_labeled.mat" in answer.line("error: CUHK03 is incomplete")


# scipy: "unknown mat file type".
def test_15_protocol_file_that_is_a_web_page(doctor, raw_cuhk03: Path) -> None:
    path = raw_cuhk03 / "cuhk03/cuhk03_new_protocol_config_labeled.mat"
    path.write_text("<!DOCTYPE html><html>")
    answer = doctor(raw_cuhk03)
    assert answer.code == 1
    assert f"{path}: not a MAT file, its first bytes are b'<!DOCTYPE html><html>'; download" in answer.line("error: ")


# h5py: "truncated file".
def test_16_truncated_release(doctor, raw_cuhk03: Path) -> None:
    path = raw_cuhk03 / "cuhk03/cuhk03_release/cuhk-03.mat"
    path.write_bytes(path.read_bytes()[:3000])
    answer = doctor(raw_cuhk03)
    assert answer.code == 1
    assert re.search(r"cuhk-03\.mat: cannot be read .* truncated or another file, .* \(md5 728939e5", answer.text)


# ImportError, late.
def test_17_without_h5py(doctor, raw_cuhk03: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    answer = doctor(raw_cuhk03)
    assert answer.code == 1
    assert "pip install h5py" in answer.line("error: ")
    monkeypatch.undo()
    assert h5py is not None
    _torchreid_images(raw_cuhk03, "labeled")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert load_dataset("cuhk03", raw_cuhk03).version == "labeled"  # unpacked images need no h5py


# A half-written PNG stays and is skipped by the next run.
def test_18_interrupted_unpacking_by_another_tool(doctor, tmp_path: Path) -> None:
    _torchreid_images(tmp_path / "data", "labeled")
    trees.mark(tmp_path / "data", cuhk03=_counts())
    assert doctor(tmp_path / "data").code == 0
    images = sorted((tmp_path / "data/cuhk03/images_labeled").iterdir())
    images[-1].unlink()
    answer = doctor(tmp_path / "data")
    assert answer.code == 1
    assert f"are not there: {images[-1].name}; unpack again" in answer.line("error: ")


# Cached lists with absolute paths break when data move.
def test_19_stale_absolute_paths(doctor, tmp_path: Path) -> None:
    _torchreid_images(tmp_path / "data", "labeled")  # its lists point to /somewhere/else
    trees.mark(tmp_path / "data", cuhk03=_counts())
    assert doctor(tmp_path / "data").code == 0
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert doctor(tmp_path / "moved", "--verify").code == 0


# Split files are written into the data folder.
def test_20_nothing_is_written_into_the_data(doctor, raw_cuhk03: Path, single_shot: Path, tmp_path: Path) -> None:
    def listing() -> list[tuple[str, int]]:
        places = (raw_cuhk03, single_shot)
        return sorted((str(p), p.stat().st_mtime_ns) for place in places for p in (place, *place.rglob("*")))

    before = listing()
    for place in (raw_cuhk03, single_shot):
        doctor(place, "--verify")
    pack(load_dataset("cuhk03", raw_cuhk03).train, 8, 4, cache_dir())
    assert listing() == before
    assert (tmp_path / "cache/cuhk03").is_dir()


# assert "Dataset folder not found".
@pytest.mark.parametrize("name", ["MSMT17", "msmt17/MSMT17_V1", "MSMT17_V2"])
def test_21_other_folder_names(doctor, root: Path, name: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / "MSMT17_V1").rename(root / name)
    if name == "MSMT17_V2":
        for old, new in (("train", "mask_train_v2"), ("test", "mask_test_v2")):
            (root / name / old).rename(root / name / new)
    answer = doctor(root)
    assert answer.code == 0
    assert f"version {'MSMT17_V2' if name == 'MSMT17_V2' else 'MSMT17_V1'}" in answer.line("^MSMT17 +ok")


# V1 wins silently.
def test_22_both_versions(doctor, root: Path) -> None:
    trees.msmt17(root, "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    answer = doctor(root)
    assert answer.code == 0
    assert "pixels differ between versions" in answer.line("warning: MSMT17: using .*MSMT17_V1")


# FileNotFoundError.
def test_23_lists_missing(doctor, root: Path) -> None:
    for part in ("train", "query", "gallery"):
        (root / f"MSMT17_V1/list_{part}.txt").unlink()
    answer = doctor(root)
    assert answer.code == 1
    assert "lacks list_train.txt, list_query.txt, list_gallery.txt" in answer.line("error: MSMT17 is incomplete")


# Crash at load time, perhaps hours later.
def test_24_listed_file_missing(doctor, root: Path) -> None:
    (root / "MSMT17_V1/test/0001/0001_002_03_0303morning_0002_0.jpg").unlink()
    answer = doctor(root)
    assert answer.code == 1
    assert "list_gallery.txt: 1 of its files are not in" in answer.line("error: .*0001_002_03")


# split(" ") fails on tabs.
def test_25_list_lines_with_tabs_and_carriage_returns(doctor, root: Path) -> None:
    path = root / "MSMT17_V1/list_query.txt"
    path.write_bytes(path.read_bytes().replace(b" ", b"\t").replace(b"\n", b"\r\n") + b"\r\n")
    assert doctor(root).code == 0


# torchreid pairs VIPeR by position: all later pairs are of two people.
def test_26_lost_pair(doctor, single_shot: Path) -> None:
    pid = trees.viper_numbers()[7]
    next((single_shot / "VIPeR/cam_a").glob(f"{pid:03d}_*")).unlink()
    (single_shot / "prid_2011/single_shot/cam_b/person_0005.png").unlink()
    answer = doctor(single_shot)
    assert answer.code == 1
    assert f"1 person(s) lack one of the two cameras: {pid:03d}" in answer.text
    assert "1 of persons 1 to 200 lack a camera: person_0005" in answer.text


# An assertion with the count.
def test_27_28_ilids(doctor, single_shot: Path) -> None:
    folder = single_shot / "i-LIDS_Pedestrian/Persons"
    for path in sorted(folder.glob("0004*.jpg"))[1:]:
        path.unlink()
    answer = doctor(single_shot)
    assert answer.code == 1
    assert "i-LIDS persons: found 119 ids" in answer.line("error: .*expected 119 ids, 476 images")
    assert "1 person(s) with a single image are left out: 0004" in answer.text
    images = len(list(folder.iterdir()))
    trees.mark(single_shot / "i-LIDS_Pedestrian", ilids={"persons": {"ids": 119, "images": images, "cameras": 8}})
    assert "expected 119 ids, 476" not in doctor(single_shot).text  # a stand-in may differ


# Error.
def test_29_grid_without_partitions(doctor, single_shot: Path) -> None:
    (single_shot / "underground_reid/features_and_partitions.mat").unlink()
    answer = doctor(single_shot)
    assert answer.code == 1
    assert "lacks features_and_partitions.mat with the official partitions" in answer.line("error: ")
    answer = doctor(single_shot, "--lenient")
    assert answer.code == 0
    assert "version shipped partitions" in answer.line("^GRID +warnings")


# The query finds itself at rank 1.
def test_30_query_that_lies_in_the_gallery(doctor, root: Path) -> None:
    query = root / MARKET / "query/0003_c2s1_000050_00.jpg"
    twin = root / MARKET / "bounding_box_test/0003_c6s2_000060_01.jpg"
    shutil.copy(query, twin)
    answer = doctor(root, "--verify")
    assert answer.code == 1
    assert f"1 query image(s) lie in the gallery under another camera, e.g. {query} and {twin}" in answer.text


# An assertion without the file's name.
def test_31_camera_out_of_range(doctor, root: Path) -> None:
    trees.image(root / MARKET / "query/0001_c9s1_000000_00.jpg")
    path = root / "MSMT17_V1/list_query.txt"
    path.write_text(path.read_text().replace("_03_", "_16_", 1))
    answer = doctor(root, "--lenient")
    assert answer.code == 1
    assert "camera outside 1..6: 0001_c9s1_000000_00.jpg" in answer.line("error: .*query")
    assert "camera outside 1..15: line 1 0000/0000_000_16" in answer.line("error: .*list_query")


# Skipped silently: the average runs over fewer queries.
def test_32_query_without_match(doctor, root: Path) -> None:
    for path in (root / "cuhk03-np/labeled/bounding_box_test").glob("0003_*"):
        path.unlink()
    answer = doctor(root)
    assert answer.code == 1
    assert "2 query image(s) of persons that the gallery lacks, e.g. 0003_c1_1.png" in answer.text


# Person 0 of train and person 0 of test become one.
def test_33_equal_numbers_across_parts(root: Path) -> None:
    source = build_task("protocol3", "cuhk03", root).sources[1]
    assert source.num_ids == 3 + 2
    assert len({(r.path.parts[-3], r.pid) for r in source.records}) == 5


# 34 and 35, order of files and of sets: test_records.py::test_order_does_not_depend_on_the_file_system runs every
# loader over reversed listings; here, another hash seed.
def test_34_35_labels_do_not_depend_on_the_hash_seed(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lda.data.sources import build_task\n"
        "task = build_task('protocol3', 'cuhk03', Path(sys.argv[1]), validation_fraction=0.3)\n"
        "print([[(str(r.path), int(l)) for r, l in zip(s.records, s.labels)] for s in task.sources], task.validation)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(root)], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# Split on "/" only.
def test_36_lists_with_backslashes(doctor, root: Path) -> None:
    path = root / "MSMT17_V1/list_train.txt"
    path.write_text(path.read_text().replace("/", "\\"))
    assert doctor(root).code == 0


# Works; loops must not hang.
def test_37_links(doctor, root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert doctor(tmp_path / "link").code == 0
    (root / "VIPeR").symlink_to(root / "VIPeR")
    (root / "cuhk02/Dataset/loop").symlink_to(root)
    answer = doctor(root)
    assert answer.code == 1
    assert "VIPeR" in answer.line("error: .*Too many levels of symbolic links")


# Not found.
def test_38_other_case(doctor, root: Path) -> None:
    (root / MARKET).rename(root / MARKET.upper())
    (root / MARKET.upper() / "query").rename(root / MARKET.upper() / "Query")
    (root / "cuhk02/Dataset/P3/cam1").rename(root / "cuhk02/Dataset/P3/Cam1")
    assert doctor(root).code == 0


# Passes silently.
def test_39_tiny_image(doctor, root: Path) -> None:
    path = root / "cuhk_sysu/cropped_images/p1_s11_1.jpg"
    Image.new("RGB", (3, 40)).save(path)
    answer = doctor(root, "--verify")
    assert answer.code == 0
    assert f"{path}: only 3 x 40 pixels" in answer.line("warning: ")


# Paths of the author's machine in the code.
def test_40_the_root_is_the_argument_alone(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load_dataset("market1501", root)
    assert load_dataset("market1501", Path("data")) == expected  # relative to where the user is
    assert all(record.path.is_absolute() for record in expected.train)
    sources = (Path(__file__).parent.parent / "lda/data").glob("*.py")
    assert not [path.name for path in sources if re.search(r"[\"'](/home|/data|/mnt|/root|[A-Z]:\\)", path.read_text())]
