"""The images of a data set of your own: a CSV file, one line an image.

    path,pid,camid,split

path     of the image, relative to the data set's folder, and below it
pid      whole number of the person, from 1; 0 is nobody, such as a background box: in the gallery, never trained on
camid    whole number of the camera, from 0; equal numbers mean one camera
split    train, query or gallery; a person either trains or is tested

Further columns are left alone. Every mistake is told with its line; of many alike, the first and their number.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lda import arguments
from lda.data.options import DataOptions
from lda.data.own import OwnSet
from lda.data.records import ImageRecord, ReidDataset
from lda.data.survey import Found, Layout, Survey, read_standin
from lda.errors import UsageError, unknown

COLUMNS = ("path", "pid", "camid", "split")
SPLITS = ("train", "query", "gallery")
NOBODY = 0

T = TypeVar("T")

_read_pid = arguments.whole(NOBODY, 10**9)
_read_camid = arguments.whole(0, 10**6)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    line: int
    record: ImageRecord
    split: str


class _Mistakes:
    """What is wrong in a table: of each kind the first line that shows it, and how many there are."""

    def __init__(self, table: Path) -> None:
        self._table = table
        self._found: dict[str, tuple[str, int]] = {}

    def add(self, kind: str, line: int, text: str) -> None:
        first, number = self._found.get(kind, (f"{self._table}:{line}: {text}", 0))
        self._found[kind] = first, number + 1

    def __iter__(self) -> Iterator[str]:
        for first, number in self._found.values():
            yield first if number == 1 else f"{first} (and {number - 1} more line(s) alike)"


def read(own: OwnSet, survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set; None if it is not there, or wrong. Everything wrong is in `survey.findings`.

    Its hashes are those of `lda.data.survey.content_hash`, also where its images are the stand-in's, with the camera
    rule, which is the table's to say.
    """
    if not own.folder.is_dir():
        survey.absent = True
        survey.error(f"{survey.title} not found: there is no folder {own.folder}; {own.place} says where it is (root)")
        return None
    survey.found = Found(Layout(f"table {own.table.name}", (str(own.folder),)), own.folder)
    mistakes = _Mistakes(own.table)
    rows = _rows(own, mistakes)
    _check_rows(rows, mistakes)
    if own.cameras:
        _check_cameras(rows, mistakes)
    parts = {split: [row.record for row in rows if row.split == split] for split in SPLITS}
    for split, records in parts.items():
        survey.check_count(split, records, None, ignored_pids=(NOBODY,))
    for mistake in mistakes:
        survey.error(mistake)
    if survey.refused():
        return None
    if own.cameras:
        survey.check_queries(parts["query"], parts["gallery"])
    dataset = survey.dataset(own.version, parts["train"], parts["query"], parts["gallery"], distractor_pids=(NOBODY,))
    if standin := _is_drawn(own.folder, rows):
        survey.note(f"{own.table.name} names images of the stand-in")
    data_hash, test_hash = (_with_rule(own.cameras, content) for content in (dataset.data_hash, dataset.test_hash))
    return replace(dataset, standin=standin, data_hash=data_hash, test_hash=test_hash)


def _with_rule(cameras: bool, content: str) -> str:
    return hashlib.sha256(f"cameras {cameras}\n{content}\n".encode()).hexdigest()


def _is_drawn(folder: Path, rows: Sequence[Row]) -> bool:
    """Whether any folder of the images lies in a stand-in."""
    folders = {folder}
    for parent in {row.record.path.parent for row in rows}:
        while parent not in folders:  # each is below `folder`
            folders.add(parent)
            parent = parent.parent
    return any(read_standin(place) is not None for place in folders)


# --- lines -----------------------------------------------------------------------------------------------------------


def _rows(own: OwnSet, mistakes: _Mistakes) -> list[Row]:
    """The lines that are sound. Raises UsageError for a file that is no table."""
    try:
        with own.table.open(encoding="utf-8-sig", newline="") as file:
            return list(_sound_rows(own, csv.reader(file, strict=True), mistakes))
    except FileNotFoundError:
        raise UsageError(f"{own.table}: there is no such file; it lists the images of {own.place}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{own.table}: expected text in UTF-8") from None


def _sound_rows(own: OwnSet, lines: Any, mistakes: _Mistakes) -> Iterator[Row]:
    try:
        head = [name.strip() for name in next(lines, [])]
        if missing := [name for name in COLUMNS if name not in head]:
            raise UsageError(f"{own.table}:1: lacks the column {', '.join(missing)}; expected {','.join(COLUMNS)}")
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(head):
                mistakes.add("cells", lines.line_num, f"expected {len(head)} cells as in line 1, got {len(cells)}")
                continue
            row = _row(own.folder, lines.line_num, dict(zip(head, cells, strict=True)), mistakes)
            if row is not None:
                yield row
    except csv.Error as error:
        raise UsageError(f"{own.table}:{lines.line_num}: not valid CSV: {error}") from None


def _row(folder: Path, line: int, cells: Mapping[str, str], mistakes: _Mistakes) -> Row | None:
    path = _value("path", line, lambda: _path(folder, cells["path"]), mistakes)
    pid = _value("pid", line, lambda: _read_pid(cells["pid"].strip()), mistakes)
    camid = _value("camid", line, lambda: _read_camid(cells["camid"].strip()), mistakes)
    split = _value("split", line, lambda: _split(cells["split"].strip()), mistakes)
    if path is None or pid is None or camid is None or split is None:
        return None
    return Row(line, ImageRecord(path, pid, camid), split)


def _value(column: str, line: int, read: Callable[[], T], mistakes: _Mistakes) -> T | None:
    try:
        return read()
    except UsageError as error:
        mistakes.add(column, line, f"{column}: {error}")
        return None


def _path(folder: Path, given: str) -> Path:
    inside = PurePosixPath(given)
    if not given or inside.is_absolute() or ".." in inside.parts:
        raise UsageError(f"expected a path below {folder}, relative to it, got {arguments.shown(given)}")
    path = folder / inside
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {path}")
    return path


def _split(given: str) -> str:
    if given not in SPLITS:
        raise UsageError(unknown("split", given, SPLITS))
    return given


# --- lines together --------------------------------------------------------------------------------------------------


def _check_rows(rows: Sequence[Row], mistakes: _Mistakes) -> None:
    """Mistakes that no line shows alone."""
    if not rows:
        mistakes.add("empty", 1, "lists no image")
    known: dict[Path, Row] = {}
    trained = {row.record.pid: row.line for row in reversed(rows) if row.split == "train"}
    searched = {row.record.pid for row in rows if row.split == "gallery"}
    asked = any(row.split == "query" for row in rows)
    for row in rows:
        pid, path = row.record.pid, row.record.path
        if (first := known.setdefault(path, row)) is not row:
            mistakes.add("twice", row.line, f"path: {path.name} stands in line {first.line} already")
        if pid == NOBODY and row.split != "gallery":
            mistakes.add("nobody", row.line, "pid: 0 is nobody, who can only be in the gallery; number persons from 1")
        elif row.split != "train" and pid in trained:
            why = f"trains in line {trained[pid]}; give other people other numbers"
            mistakes.add("both", row.line, f"pid: person {pid} is in {row.split}, and {why}")
        if row.split == "query" and pid not in searched:
            mistakes.add("unmatched", row.line, f"pid: a query without a match, the gallery lacks person {pid}")
        if row.split == "gallery" and not asked:
            mistakes.add("unasked", row.line, "split: a gallery without any query")


def _check_cameras(rows: Sequence[Row], mistakes: _Mistakes) -> None:
    """Where the camera rule would leave no query: the cameras say nothing."""
    found = {(row.record.pid, row.record.camid) for row in rows if row.split == "gallery"}
    cameras: dict[int, set[int]] = {}
    for pid, camid in found:
        cameras.setdefault(pid, set()).add(camid)
    asked = [row for row in rows if row.split == "query" and row.record.pid in cameras]
    if asked and all(cameras[row.record.pid] == {row.record.camid} for row in asked):
        text = "camid: no query has a match in another camera; where cameras are unknown say cameras: false"
        mistakes.add("cameras", asked[0].line, text)
