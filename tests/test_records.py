"""Records, `load_dataset`'s arguments, and the shared looking-up and counting of lda/data/tree.py."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import trees

from lda.data import ImageRecord, load_dataset
from lda.data.survey import Count, Grammar, Severity, Survey, child, is_clutter
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
    survey = Survey("market1501", tmp_path)
    survey.note("a")
    survey.warn("b")
    survey.strict("c")
    survey.error("d")
    assert [finding.text for finding in survey.refused()] == ["c", "d"]
    assert [finding.text for finding in survey.refused(strict=False)] == ["d"]
    assert max(finding.severity for finding in survey.findings) is Severity.ERROR


def test_same_file_in_query_and_gallery_under_two_cameras(tmp_path: Path) -> None:
    survey = Survey("market1501", tmp_path)
    path = tmp_path / "a.jpg"
    survey.check_queries([ImageRecord(path, 1, 0)], [ImageRecord(path, 1, 1), ImageRecord(tmp_path / "b.jpg", 1, 1)])
    assert [finding.severity for finding in survey.findings] == [Severity.ERROR]
    assert "query and gallery image under different cameras" in survey.findings[0].text
