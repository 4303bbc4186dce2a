"""The heat map of a matrix of results, checkpoints by targets: `python analysis/matrix.py STEM.json`.

`python -m lda.evaluate --output STEM` writes the file. Sources of a checkpoint have no colour, for a number on them is
no generalisation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.house_style import new_figure, save, style
from lda.arguments import Parser, checked, existing_file, output_file
from lda.command import exit_code
from lda.errors import UsageError
from lda.matrix import SOURCE_MARK, Cell, Matrix, counted, notes, read

_COLOURS = sns.color_palette("blend:#f3f7fb,#0173b2", as_cmap=True)
_SOURCE = "0.93"


def draw_matrix(axes: Axes, matrix: Matrix) -> Axes:
    """Every cell: mAP as its colour and number, Rank-1 below; sources grey and hatched, cells not yet tested empty."""
    cells = [[matrix.cell(row, column) for column in matrix.columns] for row in matrix.rows]
    values = np.array([[_value(cell) for cell in line] for line in cells])
    image = axes.imshow(values, cmap=_COLOURS, aspect="auto", vmin=0.0, vmax=_top(values))
    for (place, column), value in np.ndenumerate(values):
        cell = cells[place][column]
        if cell is None:
            continue
        if cell.source:
            box = Rectangle((column - 0.5, place - 0.5), 1, 1, facecolor=_SOURCE, edgecolor="0.8", hatch="////", lw=0)
            axes.add_patch(box)
        _write(axes, column, place, cell, light=bool(value > 0.62 * _top(values)))
    axes.set_xticks(range(len(matrix.columns)), [column.title for column in matrix.columns])
    axes.set_yticks(range(len(matrix.rows)), [f"{row.label}\n{row.name}" for row in matrix.rows])
    axes.set_xticks(np.arange(1, len(matrix.columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(matrix.rows)) - 0.5, minor=True)
    axes.tick_params(which="both", length=0)
    axes.grid(visible=False)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.set_axisbelow(False)  # white lines between cells, over the hatching
    axes.xaxis.tick_top()
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.015, aspect=30)
    bar.set_label("mAP, %")
    bar.outline.set_visible(False)
    return axes


def _value(cell: Cell | None) -> float:
    """What gives a cell its colour, percent; none where it is a source, or not tested."""
    return float("nan") if cell is None or cell.source else 100 * cell.mAP


def _top(values: np.ndarray) -> float:
    """The end of the colours: the next ten above."""
    return 10 * float(np.ceil(np.nanmax(values) / 10)) if np.isfinite(values).any() else 100.0


def _write(axes: Axes, column: int, place: int, cell: Cell, *, light: bool) -> None:
    """mAP and Rank-1 in a cell, on a patch of ground where lines would run through them."""
    ink = "0.4" if cell.source else "white" if light else "0.1"
    ground = {"facecolor": _SOURCE, "edgecolor": "none", "pad": 1.5} if cell.source else None
    mark = SOURCE_MARK if cell.source else ""
    text = f"{100 * cell.mAP:.1f}{mark}"
    axes.text(column, place - 0.14, text, ha="center", va="center", color=ink, fontsize=9.5, bbox=ground)
    text = f"{100 * cell.rank1:.1f}"
    axes.text(column, place + 0.22, text, ha="center", va="center", color=ink, fontsize=7.5, bbox=ground)


def matrix_figure(matrix: Matrix) -> Figure:
    """The heat map with what must stay with the numbers. Raises UsageError where nothing is tested yet."""
    if not matrix.done():
        raise UsageError("no cell is tested yet")
    longest = max(len(text) for row in matrix.rows for text in (row.label, row.name))
    rows, columns = len(matrix.rows), len(matrix.columns)
    width, height = 1.0 + 0.075 * longest + 0.95 * columns, 1.1 + 0.55 * rows
    figure, panels = new_figure(1, 1, width=max(width, 4.5), height=height)
    with style():
        draw_matrix(panels[0, 0], matrix)
        figure.supxlabel(
            "\n".join([f"mAP, below it Rank-1; {counted(matrix)}", *notes(matrix)]), fontsize=8, color="0.35"
        )
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/matrix.py STEM.json`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _draw(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python analysis/matrix.py", description="Draw the heat map of a matrix of checkpoints and targets."
    )
    parser.add_argument("matrix", type=existing_file, help="STEM.json that lda.evaluate --output STEM wrote")
    parser.add_argument("--output", type=output_file, help="PNG or PDF (default: STEM.png and STEM.pdf)")
    options = parser.parse_args(arguments)
    kinds = (".png", ".pdf")
    if options.output is not None and options.output.suffix not in kinds:
        raise UsageError(f"--output {options.output}: expected a name that ends in {' or '.join(kinds)}")
    given = [options.output] if options.output else [options.matrix.with_suffix(kind) for kind in kinds]
    options.outputs = [checked("--output", output_file, path) for path in given]
    return options


def _draw(options: argparse.Namespace) -> None:
    try:
        figure = matrix_figure(read(options.matrix))
    except UsageError as error:
        where = "" if str(error).startswith(str(options.matrix)) else f"{options.matrix}: "
        raise UsageError(f"{where}{error}") from None
    for path in options.outputs:
        print(save(figure, Path(path)))


if __name__ == "__main__":
    sys.exit(main())
