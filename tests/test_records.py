"""Records, `load_dataset`'s arguments, and the shared looking-up and counting of lda/data/survey.py."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import trees

from lda.data import ImageRecord, load_dataset
from lda.data.survey import Count, Grammar, Severity, Survey, child, content_hash, is_clutter
from lda.errors import UsageError


def test_record_is_a_frozen_value() -> None:
    record = ImageRecord(Path("a.jpg"), 3, 0)
    assert record == ImageRecord(Path("a.jpg"), 3, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.pid = 4  # type: ignore[misc]


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown data set 'market' \(did you mean 'market1501'\?\)"):
        load_dataset("market", ".")
    with pytest.raises(UsageError, match=r"msmt17_train: unknown value 'val'"):
        load_dataset("msmt17", ".", msmt17_train="val")


@pytest.mark.parametrize("name", ["market1501", "msmt17", "cuhk_sysu", "cuhk02", "cuhk03"])
def test_root_that_does_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"data root .*nowhere does not exist or is not a folder"):
        load_dataset(name, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="does not exist or is not a folder"):
        load_dataset(name, tmp_path / "file")


@pytest.mark.parametrize("name", ["market1501", "msmt17", "cuhk_sysu", "cuhk02", "cuhk03"])
def test_order_does_not_depend_on_the_file_system(tiny_sets: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_dataset(name, tiny_sets)
    scandir, list_folder = os.scandir, os.listdir

    class Reversed:
        def __init__(self, folder: Path) -> None:
            self.entries = scandir(folder)

        def __enter__(self) -> list:
            return list(self.entries)[::-1]

        def __exit__(self, *details: object) -> None:
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    monkeypatch.setattr(os, "listdir", lambda folder: list_folder(folder)[::-1])
    assert load_dataset(name, tiny_sets) == expected


def test_symlinked_root_and_loop(tiny_sets: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_sets)
    linked = load_dataset("market1501", tmp_path / "link")
    assert [r.path.name for r in linked.train] == [r.path.name for r in load_dataset("market1501", tiny_sets).train]
    (tmp_path / "Market-1501-v15.09.15").symlink_to(tmp_path / "Market-1501-v15.09.15")
    with pytest.raises(UsageError, match=r"Market-1501: cannot read .*15\.09\.15: Too many levels of symbolic links"):
        load_dataset("market1501", tmp_path)


def test_marker_that_is_damaged(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    (tmp_path / "STANDIN.json").write_text('{"hash": ')
    with pytest.raises(UsageError, match=r"STANDIN\.json: not a stand-in marker"):
        load_dataset("market1501", tmp_path)
    (tmp_path / "STANDIN.json").write_text(json.dumps({"hash": "ab", "counts": {}}))
    with pytest.raises(UsageError, match=r"Market-1501 train: STANDIN\.json states no counts for it"):
        load_dataset("market1501", tmp_path)


def test_stand_in_with_a_lost_file(tmp_path: Path) -> None:
    trees.mark(tmp_path, market1501=trees.market1501(tmp_path))
    (tmp_path / "Market-1501-v15.09.15/query/0001_c2s1_000050_00.jpg").unlink()
    with pytest.raises(UsageError, match=r"query: found 3 ids, 5 images, expected 3 ids, 6 images \(STANDIN\.json\)"):
        load_dataset("market1501", tmp_path)


@pytest.mark.parametrize("name", ["market1501", "msmt17", "cuhk_sysu", "cuhk02", "cuhk03"])
def test_stand_in_is_read_strictly(standin_tiny: Path, name: str) -> None:
    """The generator's own counts: nothing is refused, nothing even warned."""
    dataset = load_dataset(name, standin_tiny)
    assert dataset.standin
    assert len(dataset.data_hash) == 64
    assert all(record.path.is_file() for record in (*dataset.train, *dataset.query, *dataset.gallery))


@pytest.mark.parametrize("name", ["Thumbs.db", "thumbs.DB", ".DS_Store", "._0001.jpg", "__MACOSX", "Desktop.ini"])
def test_clutter(name: str) -> None:
    assert is_clutter(name)


@pytest.mark.parametrize("name", ["0001.jpg", "P1", "macosx", "thumbs.jpg"])
def test_not_clutter(name: str) -> None:
    assert not is_clutter(name)


def test_grammar_is_anchored() -> None:
    grammar = Grammar(r"(?P<pid>\d+)|x(?P<other>\d)", ".jpg", "1.jpg")
    assert all(grammar.match(name) for name in ("12.jpg", "12.JPG", "12.jpg.jpg", "12.jpeg", "12.png", "x1.bmp"))
    assert not any(grammar.match(name) for name in ("a12.jpg", "12.jpg ", "12.jpg.txt", "12", "12_jpg", "x1"))


def test_child_prefers_the_exact_spelling(tmp_path: Path) -> None:
    (tmp_path / "Data").mkdir()
    assert child(tmp_path, "data") == tmp_path / "Data"
    if not (tmp_path / "data").exists():  # a file system that tells cases apart
        (tmp_path / "data").mkdir()
        assert child(tmp_path, "data") == tmp_path / "data"
        assert child(tmp_path, "Data") == tmp_path / "Data"
    assert child(tmp_path, "data/none") is None
    (tmp_path / "Ame\u0301lie").mkdir()  # decomposed, as some archives store it
    assert child(tmp_path, "Am\u00e9lie") is not None


def test_count_of_records() -> None:
    records = [ImageRecord(Path("a"), 0, 0), ImageRecord(Path("b"), 1, 0), ImageRecord(Path("c"), 1, 2)]
    assert Count.of(records) == Count(2, 3, 2)
    assert Count.of(records, ignored_pids=(0,)) == Count(1, 3, 2)


def test_what_is_refused_depends_on_strictness(tmp_path: Path) -> None:
    survey = Survey("market1501", "Market-1501", tmp_path)
    survey.note("a")
    survey.warn("b")
    survey.strict("c")
    survey.error("d")
    assert [finding.text for finding in survey.refused()] == ["c", "d"]
    assert [finding.text for finding in survey.refused(strict=False)] == ["d"]
    assert max(finding.severity for finding in survey.findings) is Severity.ERROR


def test_same_file_in_query_and_gallery_under_two_cameras(tmp_path: Path) -> None:
    survey = Survey("market1501", "Market-1501", tmp_path)
    path = tmp_path / "a.jpg"
    survey.check_queries([ImageRecord(path, 1, 0)], [ImageRecord(path, 1, 1), ImageRecord(tmp_path / "b.jpg", 1, 1)])
    assert [finding.severity for finding in survey.findings] == [Severity.ERROR]
    assert "query and gallery image under different cameras" in survey.findings[0].text


# --- content hash of real data ---------------------------------------------------------------------------------------
MARKET_PARTS = ("bounding_box_train", "query", "bounding_box_test")


def _hashes(root: Path) -> tuple[str, str]:
    with pytest.warns(UserWarning, match="expected"):
        dataset = load_dataset("market1501", root, strict=False)
    assert not dataset.standin
    return dataset.data_hash, dataset.test_hash


def test_content_hash_by_hand(tmp_path: Path) -> None:
    """The lines of the docstring, written by hand."""
    trees.market1501(tmp_path)
    folder = tmp_path / "Market-1501-v15.09.15"
    lines: dict[str, list[str]] = {}
    for part in MARKET_PARTS:
        for path in (folder / part).glob("*_c*.jpg"):
            pid, camera = path.name.split("_")[0], path.name.split("_")[1][1]
            if pid != "-1":
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                lines.setdefault(part, []).append(f"{part}/{path.name} {digest} {int(pid)} {int(camera) - 1}\n")
    texts = [f"{len(lines[part])}\n{''.join(sorted(lines[part]))}" for part in MARKET_PARTS]
    expected = [hashlib.sha256("".join(chosen).encode()).hexdigest() for chosen in (texts, texts[1:])]
    assert _hashes(tmp_path) == tuple(expected)


def test_content_hash_knows_names_and_sizes_and_nothing_of_the_place(tmp_path: Path) -> None:
    trees.market1501(tmp_path / "here")
    before = _hashes(tmp_path / "here")
    folder = tmp_path / "here/Market-1501-v15.09.15"
    assert _hashes(folder) == before  # the set's own folder as root
    for path in folder.rglob("*.jpg"):
        os.utime(path, ns=(1, 1))
    (folder / "bounding_box_test/.DS_Store").write_bytes(b"clutter")
    shutil.copytree(tmp_path / "here", tmp_path / "there/deeper")
    (tmp_path / "link").symlink_to(tmp_path / "there/deeper")
    assert _hashes(tmp_path / "there/deeper") == _hashes(tmp_path / "link") == before


@pytest.mark.parametrize("part", MARKET_PARTS)
@pytest.mark.parametrize("change", ["added", "removed", "resized", "renamed"])
def test_content_hash_changes_with_the_files(tmp_path: Path, part: str, change: str) -> None:
    trees.market1501(tmp_path)
    before = _hashes(tmp_path)
    path = sorted((tmp_path / "Market-1501-v15.09.15" / part).glob("0*_c1*.jpg" if part != "query" else "*.jpg"))[0]
    other = path.with_name(path.name.replace("_00.jpg", "_07.jpg").replace("_01.jpg", "_07.jpg"))
    if change == "added":
        shutil.copy(path, other)
    elif change == "renamed":
        path.rename(other)
    elif change == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"x")
    after = _hashes(tmp_path)
    assert after[0] != before[0]
    assert (after[1] == before[1]) == (part == "bounding_box_train")


def test_content_hash_knows_who_is_where(tmp_path: Path) -> None:
    """The same images divided otherwise, or of another person, are other data."""
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(b"image")
    one, two = (ImageRecord(path, 1, 0) for path in paths)
    lists = [[[one], [two]], [[two], [one]], [[one, two], []], [[one], [dataclasses.replace(two, pid=2)]]]
    assert len({content_hash(parts, tmp_path) for parts in lists}) == 4
    assert content_hash([[one, two]], tmp_path) == content_hash([[two, one]], tmp_path)


def test_content_hash_of_unpacked_images_is_that_of_their_archive(tmp_path: Path) -> None:
    """PNG files written here differ in size between machines; the release does not."""
    archive = tmp_path / "set/release.mat"
    archive.parent.mkdir()
    archive.write_bytes(b"release")
    hashes = set()
    for place, size in (("cache-1", 1), ("cache-2", 2)):
        path = tmp_path / place / "1.png"
        path.parent.mkdir()
        path.write_bytes(bytes(size))
        hashes.add(content_hash([[ImageRecord(path, 1, 0)]], tmp_path / "set", archive))
    assert len(hashes) == 1
    archive.write_bytes(b"another release")
    assert content_hash([[ImageRecord(path, 1, 0)]], tmp_path / "set", archive) not in hashes


def test_images_of_the_same_size_with_other_pixels_are_other_data(tmp_path: Path) -> None:
    """As a re-encoded copy may be; the folder's own place says nothing."""
    hashes = []
    for place, content in (("here", b"one!"), ("there", b"one!"), ("coded", b"two!")):
        path = tmp_path / place / "a.jpg"
        path.parent.mkdir()
        path.write_bytes(content)
        hashes.append(content_hash([[ImageRecord(path, 1, 0)]], path.parent))
    assert hashes[0] == hashes[1] != hashes[2]
