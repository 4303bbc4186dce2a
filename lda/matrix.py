"""A matrix of results, checkpoints by targets, as `python -m lda.evaluate --output STEM` writes it. No torch.

STEM.json: {"format": 2} and the fields of `Matrix`; written anew after every cell
STEM.csv: one line a cell, fractions, see `COLUMNS`

A number on a data set that a checkpoint was trained on says nothing of generalisation: such cells are marked wherever
they are shown. Checkpoints know their sources by name: the same images under another name pass unnoticed.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lda.files import atomic, write_json
from lda.runs import CHECKPOINT, FORMAT, print_method, read_record

SOURCE_MARK = "*"
SOURCE_NOTE = f"{SOURCE_MARK} a source of that checkpoint: no generalisation"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A checkpoint.

    Attributes:
        label: what tells it from the others, a tail of its path.
        path: of the file, as it was given.
        sha256: of its bytes.
        method, title, reconstructed, target_data, protocol, seed: see `lda.runs.Result`.
        trained_for: the target of its run.
        sources: the data sets that it was trained on.
        settings: of the test, by their flat names.
    """

    label: str
    path: str
    sha256: str
    method: str
    title: str
    reconstructed: str
    target_data: bool
    protocol: str
    trained_for: str
    seed: int
    sources: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The method in print, with its marks."""
        return print_method(self.title, self.reconstructed, self.target_data)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A target.

    Attributes:
        target, title: in code, and in print.
        data: "stand-in" or "real".
        version: the release that was found.
        content: hash of its query and gallery.
    """

    target: str
    title: str
    data: str
    version: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A checkpoint on a target. It holds as long as the first four are equal, and is not tested again.

    Attributes:
        sha256, settings: of the checkpoint, see `Row`.
        target, content: see `Column`.
        source: the checkpoint was trained on this data set.
        mAP and further: see `lda.runs.Result`. Fractions; std over splits, None with one.
    """

    sha256: str
    target: str
    content: str
    settings: dict[str, Any]
    source: bool
    inference: str
    mAP: float  # noqa: N815 - the field's spelling
    rank1: float
    rank5: float
    rank10: float
    mINP: float  # noqa: N815
    num_valid_queries: float
    num_splits: int
    mAP_std: float | None = None  # noqa: N815
    rank1_std: float | None = None


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Checkpoints by targets.

    Attributes:
        rows, columns: what the newest command asked for, in its order.
        cells: what has been tested, in any order; also by earlier commands, for other rows and columns.
        missing: targets in print that were asked for and are not below the data root.
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    cells: tuple[Cell, ...] = ()
    missing: tuple[str, ...] = ()

    def cell(self, row: Row, column: Column) -> Cell | None:
        """Where they meet; None while that is not tested."""
        wanted = (row.sha256, column.target, column.content)
        for cell in self.cells:
            if (cell.sha256, cell.target, cell.content) == wanted and cell.settings == row.settings:
                return cell
        return None

    def with_cell(self, cell: Cell) -> Matrix:
        """The matrix with one more cell."""
        return replace(self, cells=(*self.cells, cell))

    def done(self) -> int:
        """How many of its cells are tested."""
        return sum(self.cell(row, column) is not None for row in self.rows for column in self.columns)


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest tails of the folders of checkpoints (and names of files, where they are no `checkpoint.pt`) that
    tell them apart."""
    parts = [path.absolute().parts[1 : -1 if path.name == CHECKPOINT else None] for path in paths]
    for length in range(1, max(map(len, parts))):
        tails = ["/".join(part[-length:]) for part in parts]
        if len(set(tails)) == len(tails):
            return tails
    return [str(path) for path in paths]


# --- files -----------------------------------------------------------------------------------------------------------

_OF_ROW = ("label", "path", "sha256", "method", "title", "protocol", "trained_for", "seed", "target_data")
_OF_COLUMN = ("target", "data", "version", "content")
_OF_CELL = tuple(f.name for f in dataclasses.fields(Cell) if f.name not in ("sha256", "target", "content", "settings"))

COLUMNS = ("checkpoint", *_OF_ROW[1:], *_OF_COLUMN, *_OF_CELL, "settings")
"""Of the CSV; `checkpoint` is the label, `settings` is JSON."""


def file_of(stem: Path, kind: str) -> Path:
    """STEM.json or STEM.csv."""
    return stem.with_name(f"{stem.name}.{kind}")


def read(path: Path) -> Matrix:
    """The matrix in a JSON file. Raises UsageError naming the file, and the key that is missing or wrong."""
    return read_record(path, Matrix)


def write(matrix: Matrix, path: Path) -> None:
    """Write the JSON file."""
    write_json(path, {"format": FORMAT, **dataclasses.asdict(matrix)})


def write_csv(matrix: Matrix, path: Path) -> None:
    """Write the CSV file."""
    with atomic(path) as file:
        file.write(as_csv(matrix))


def as_csv(matrix: Matrix) -> str:
    """One line a cell, those that are not tested left out."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for row in matrix.rows:
        for column in matrix.columns:
            if (cell := matrix.cell(row, column)) is not None:
                values = [getattr(row, name) for name in _OF_ROW]
                values += [getattr(column, name) for name in _OF_COLUMN] + [getattr(cell, name) for name in _OF_CELL]
                lines.writerow([*map(_plain, values), json.dumps(row.settings)])
    return text.getvalue()


def _plain(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


# --- a terminal ------------------------------------------------------------------------------------------------------


def as_text(matrix: Matrix) -> str:
    """The matrix as aligned columns: mAP / Rank-1 in percent."""
    head = ["checkpoint", "method", *(column.title for column in matrix.columns)]
    grid = [
        [row.label, row.name, *(_shown(matrix.cell(row, column)) for column in matrix.columns)] for row in matrix.rows
    ]
    widths = [max(len(line[place]) for line in [head, *grid]) for place in range(len(head))]
    lines = [_line(head, widths), *(_line(line, widths) for line in grid)]
    return "\n".join([*lines, "", *map("  {}".format, [f"mAP / Rank-1; {counted(matrix)}", *notes(matrix)])])


def counted(matrix: Matrix) -> str:
    """How the numbers are counted."""
    formula = ", ".join(sorted({str(row.settings["average_precision"]) for row in matrix.rows}))
    return f"percent, {formula} AP"


def notes(matrix: Matrix) -> list[str]:
    """What must stay with the numbers."""
    drawn = [column.title for column in matrix.columns if column.data != "real"]
    found = []
    if drawn:
        which = "all" if len(drawn) == len(matrix.columns) else ", ".join(drawn)
        found.append(f"stand-in (drawn images, no real data set): {which}")
    if any(column.target in row.sources for row in matrix.rows for column in matrix.columns):
        found.append(SOURCE_NOTE)
    if matrix.missing:
        found.append(f"not below the data root, left out: {', '.join(matrix.missing)}")
    return found


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-  "
    return f"{100 * cell.mAP:.1f} / {100 * cell.rank1:.1f} {SOURCE_MARK if cell.source else ' '}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    words = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*words, *numbers]).rstrip()
