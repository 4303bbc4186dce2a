"""A matrix of results as a record: labels, table, CSV and heat map."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.matrix import main, matrix_figure
from lda.errors import UsageError
from lda.matrix import COLUMNS, Cell, Column, Matrix, Row, as_csv, as_text, labels, read, write


def row(label: str, **changes: Any) -> Row:
    known: dict[str, Any] = {"label": label, "path": f"runs/{label}/checkpoint.pt", "sha256": label, "method": "x"}
    known |= {"title": "X", "reconstructed": "", "target_data": False, "protocol": "protocol3", "seed": 0}
    known |= {"trained_for": "viper", "sources": ("prid",), "settings": {"average_precision": "step"}}
    return Row(**{**known, **changes})


def cell(row: Row, column: Column, value: float) -> Cell:
    metrics = {"mAP": value, "rank1": value / 2, "rank5": value, "rank10": value, "mINP": value}
    return Cell(
        sha256=row.sha256,
        target=column.target,
        content=column.content,
        settings=row.settings,
        source=column.target in row.sources,
        inference="",
        num_valid_queries=3,
        num_splits=1,
        **metrics,
    )


@pytest.fixture
def matrix() -> Matrix:
    """Two checkpoints on two targets, one cell of which is not tested yet."""
    titles = {"prid": ("PRID2011", "stand-in"), "viper": ("VIPeR, mine", "real")}
    columns = [
        Column(target=name, title=title, data=data, version="1", content="c") for name, (title, data) in titles.items()
    ]
    rows = [row("one"), row("two", title="Y", target_data=True)]
    cells = [cell(rows[0], columns[0], 0.5), cell(rows[0], columns[1], 0.25), cell(rows[1], columns[1], 1.0)]
    return Matrix(rows=tuple(rows), columns=tuple(columns), cells=tuple(cells), missing=("GRID",))


def test_a_table_says_what_must_stay_with_it(matrix: Matrix) -> None:
    assert as_text(matrix).splitlines() == [  # a mark takes two places, seen or not
        "checkpoint  method                  PRID2011     VIPeR, mine",
        "one         X                  50.0 / 25.0 *   25.0 / 12.5",
        "two         Y [target images]            -    100.0 / 50.0",
        "",
        "  mAP / Rank-1; percent, step AP",
        "  stand-in (drawn images, no real data set): PRID2011",
        "  * a source of that checkpoint: no generalisation",
        "  not below the data root, left out: GRID",
    ]


def test_a_csv_has_a_line_a_cell(matrix: Matrix) -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(matrix))))
    assert tuple(lines[0]) == COLUMNS
    assert [(line["checkpoint"], line["target"], line["source"], line["mAP"]) for line in lines] == [
        ("one", "prid", "true", "0.5"),
        ("one", "viper", "false", "0.25"),
        ("two", "viper", "false", "1.0"),
    ]


def test_a_cell_is_found_by_what_it_depends_on(matrix: Matrix, tmp_path: Path) -> None:
    write(matrix, tmp_path / "m.json")
    assert read(tmp_path / "m.json") == matrix
    assert matrix.done() == 3
    first, column = matrix.rows[0], matrix.columns[0]
    for other in (replace(first, sha256="other"), replace(first, settings={"average_precision": "trapezoid"})):
        assert matrix.cell(other, column) is None
    assert matrix.cell(first, replace(column, content="d")) is None
    assert matrix.cell(replace(first, label="moved", path="elsewhere"), column) == matrix.cells[0]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["runs/a/checkpoint.pt"], ["a"]),
        (["runs/a/checkpoint.pt", "runs/b/checkpoint.pt"], ["a", "b"]),
        (["s/trial-0/m-s0/checkpoint.pt", "s/trial-1/m-s0/checkpoint.pt"], ["trial-0/m-s0", "trial-1/m-s0"]),
        (["kept/first.pt", "kept/second.pt"], ["first.pt", "second.pt"]),
    ],
)
def test_labels_are_as_short_as_they_can_be(paths: list[str], expected: list[str]) -> None:
    assert labels([Path(path) for path in paths]) == expected


def test_the_heat_map_has_no_colour_for_sources(matrix: Matrix) -> None:
    axes = matrix_figure(matrix).axes[0]
    assert axes.images[0].get_array().tolist() == [[None, 25.0], [None, 100.0]]
    assert [text.get_text() for text in axes.texts] == ["50.0*", "25.0", "25.0", "12.5", "100.0", "50.0"]
    assert len([patch for patch in axes.patches if patch.get_hatch()]) == 1


def test_the_heat_map_as_a_command(matrix: Matrix, tmp_path: Path, capsys: Any) -> None:
    write(matrix, tmp_path / "m.json")
    assert main([str(tmp_path / "m.json"), "--output", str(tmp_path / "sub/map.pdf")]) == 0
    assert (tmp_path / "sub/map.pdf").read_bytes().startswith(b"%PDF")
    write(replace(matrix, cells=()), tmp_path / "empty.json")
    for arguments in (["empty.json"], ["m.json", "--output", "map.jpg"]):
        assert main([str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"error: {tmp_path}/empty.json: no cell is tested yet"
    assert said[1] == "error: --output map.jpg: expected a name that ends in .png or .pdf"
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UsageError, match=r"m\.json: expected a JSON file"):
        read(tmp_path / "m.json")
