"""A table of text, written as plain text, Markdown, LaTeX, HTML or CSV.

Words come from study files, folders and methods: whatever they are, they stay words in the language written.
"""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import groupby

import pandas as pd

_WIDTH = 120  # of wrapped notes, characters
_WIDE = 85  # signs of a row of plain text; a table with longer ones is set smaller and closer in LaTeX

Conditions = Sequence[tuple[str, str]]
"""(name, value) lines that must stay with a table."""


@dataclass(frozen=True)
class Mark:
    """What sets a cell apart: its place in its column (1 best, 2 second, 0 neither), which plain text does not show;
    and the position of its footnote."""

    place: int = 0
    footnote: int | None = None


Marks = Mapping[tuple[int, int], Mark]
"""(row, column after the first) -> mark."""


def best_marks(values: Sequence[Sequence[float]]) -> dict[tuple[int, int], Mark]:
    """The best and the second of every column. Values that are printed alike share a place; nan takes none, and nobody
    does where there are fewer than two values."""
    found = {}
    for column, numbers in enumerate(zip(*values, strict=True)):
        shown = [None if math.isnan(number) else float(f"{number:.1f}") for number in numbers]
        there = [number for number in shown if number is not None]
        places = {number: place for place, number in enumerate(sorted(set(there), reverse=True)[:2], start=1)}
        for row, number in enumerate(shown):
            if number in places and len(there) > 1:
                found[row, column] = Mark(places[number])
    return found


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        title: printed above it; may be empty.
        columns: (upper head, lower head) of every column after the first; neighbours with one upper head share it.
        rows: cells, the first of a row being its label.
        notes: sentences under the table.
        marks: cells that are set apart.
        among: of which rows the best are marked, in words that follow a comma; "" for all.
        footnotes: sentences that marks point to; they come before the notes.
    """

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[str]]
    notes: list[str]
    marks: Marks = field(default_factory=dict)
    among: str = ""
    footnotes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(upper head, number of columns under it); empty when there are no upper heads."""
        if not any(upper for upper, _ in self.columns):
            return []
        return [(upper, len(list(columns))) for upper, columns in groupby(self.columns, key=lambda column: column[0])]


def one_line(text: str) -> str:
    """Words without line breaks, and without what a terminal or a file cannot show."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(text.split()))


def _in_lines(title: str, conditions: Conditions, grids: Sequence[Grid]) -> tuple[str, Conditions, list[Grid]]:
    return one_line(title), [(name, one_line(value)) for name, value in conditions], list(map(_grid_in_lines, grids))


def _grid_in_lines(grid: Grid) -> Grid:
    return replace(
        grid,
        title=one_line(grid.title),
        columns=[(one_line(upper), one_line(lower)) for upper, lower in grid.columns],
        rows=[[one_line(cell) for cell in row] for row in grid.rows],
        notes=[one_line(note) for note in grid.notes],
        among=one_line(grid.among),
        footnotes=[one_line(note) for note in grid.footnotes],
    )


@dataclass(frozen=True)
class _Language:
    """How words become words of a language, and what stands before and after a cell or a footnote's letter."""

    word: Callable[[str], str]
    best: tuple[str, str]
    second: tuple[str, str]
    letter: tuple[str, str]
    shows_places: bool = True

    def rows(self, grid: Grid) -> list[list[str]]:
        """The cells as they are written, the first of a row being its label."""
        return [
            [self.word(row[0]), *(self._cell(cell, grid.marks.get((r, c))) for c, cell in enumerate(row[1:]))]
            for r, row in enumerate(grid.rows)
        ]

    def _cell(self, cell: str, mark: Mark | None) -> str:
        mark = mark or Mark()
        before, after = {1: self.best, 2: self.second}.get(mark.place, ("", ""))
        return f"{before}{self.word(cell)}{after}" + ("" if mark.footnote is None else self._letter(mark.footnote))

    def _letter(self, position: int) -> str:
        return string.ascii_lowercase[position].join(self.letter)

    def notes(self, grid: Grid) -> list[str]:
        """The footnotes, what places look like, and the notes, as they are written."""
        lines = [f"{self._letter(n)} {self.word(note)}".strip() for n, note in enumerate(grid.footnotes)]
        if self.shows_places and any(mark.place for mark in grid.marks.values()):
            among = f", {grid.among}" if grid.among else ""
            lines.append(self.word(f"Best of a column in bold, second underlined{among}"))
        return lines + [self.word(note) for note in grid.notes]


def as_text(title: str, conditions: Conditions, grids: Sequence[Grid]) -> str:
    """For a terminal: columns aligned by spaces."""
    title, conditions, grids = _in_lines(title, conditions, grids)
    grids = [replace(grid, rows=_TEXT.rows(grid), notes=_TEXT.notes(grid)) for grid in grids]
    width = max(len(name) for name, _ in conditions)
    lines = [title, *(f"  {name.ljust(width)}  {value}" for name, value in conditions)]
    first = max(len(row[0]) for grid in grids for row in grid.rows)  # one left edge for all tables
    for grid in grids:
        lines += ["", *([grid.title] if grid.title else []), *_text_rows(grid, first)]
        lines += [line for note in grid.notes for line in _wrapped(note)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _wrapped(note: str) -> list[str]:
    return textwrap.wrap(note, _WIDTH, initial_indent="  ", subsequent_indent="    ")


def _text_rows(grid: Grid, first: int) -> list[str]:
    body = [["", *(lower for _, lower in grid.columns)], *grid.rows]
    widths = [first, *(max(len(row[i + 1]) for row in body) for i in range(len(grid.columns)))]
    gaps = [3 if i == 0 or upper != grid.columns[i - 1][0] else 2 for i, (upper, _) in enumerate(grid.columns)]
    column, heads = 1, " " * first
    for upper, span in grid.groups:
        own = slice(column, column + span)
        room = sum(widths[own]) + sum(gaps[column : column + span - 1])
        widths[column + span - 1] += max(len(upper) - room, 0)  # a long name widens the last of its columns
        heads += " " * gaps[column - 1] + upper.rjust(max(room, len(upper)))
        column += span
    lines = [heads] if grid.groups else []
    for row in body:
        cells = [" " * gap + cell.rjust(width) for gap, cell, width in zip(gaps, row[1:], widths[1:], strict=True)]
        lines.append(row[0].ljust(first) + "".join(cells))
    lines.insert(len(lines) - len(grid.rows), "-" * max(map(len, lines)))
    return lines


def as_markdown(title: str, conditions: Conditions, grids: Sequence[Grid]) -> str:
    """For a README or an issue: pipe tables under a list of the conditions."""
    title, conditions, grids = _in_lines(title, conditions, grids)
    lines = [f"**{_markdown(title)}**", "", *(f"- {name}: {_markdown(value)}" for name, value in conditions)]
    for grid in grids:
        heads = ["", *(f"{upper} {lower}".strip() for upper, lower in grid.columns)]
        rule = ["---", *("---:" for _ in grid.columns)]
        lines += ["", *([f"**{_markdown(grid.title)}**", ""] if grid.title else [])]
        heads = list(map(_markdown, heads))
        lines += ["| " + " | ".join(row) + " |" for row in [heads, rule, *_MARKDOWN.rows(grid)]]
        notes = _MARKDOWN.notes(grid)
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    escaped = "".join(f"\\{sign}" if sign in "\\`*_|<&~$" else sign for sign in text)
    return escaped.replace("](", "]\\(")  # a mark in brackets is no link


def as_latex(title: str, conditions: Conditions, grids: Sequence[Grid]) -> str:
    """For a paper: one `tabular` per table (package booktabs), the conditions typeset under the first."""
    title, conditions, grids = _in_lines(title, conditions, grids)
    parts: list[str] = []
    for grid in grids:
        notes = [*([] if parts else [_latex(f"{name}: {value}") for name, value in conditions]), *_LATEX.notes(grid)]
        wide = len(_text_rows(grid, max(len(row[0]) for row in grid.rows))[-1]) > _WIDE
        heads = [f" & {' & '.join(_latex(lower) for _, lower in grid.columns)} \\\\"]
        lines = [
            f"% {': '.join(filter(None, (title, grid.title)))}",
            *([f"\\noindent {_latex(grid.title)}\\par\\smallskip"] if grid.title else []),
            *(["{\\footnotesize\\setlength{\\tabcolsep}{2pt}%"] if wide else []),
            f"\\noindent\\begin{{tabular}}{{l{'r' * len(grid.columns)}}}",
            "\\toprule",
            *_latex_groups(grid),
            *heads,
            "\\midrule",
            *(" & ".join(row) + " \\\\" for row in _LATEX.rows(grid)),
            "\\bottomrule",
            "\\end{tabular}" + "}" * wide,
            *([f"\\par\\smallskip\\noindent{{\\footnotesize {'. '.join(notes)}.\\par}}"] if notes else []),
        ]
        parts.append("\n".join(lines))
    return "\n\n\\bigskip\n".join(parts) + "\n"


def as_html(grid: Grid) -> str:
    """One `table` element; its notes follow as a list."""
    grid = _grid_in_lines(grid)
    groups = "".join(f'<th colspan="{span}" scope="colgroup">{escape(upper)}</th>' for upper, span in grid.groups)
    heads = "".join(f'<th scope="col">{escape(lower)}</th>' for _, lower in grid.columns)
    rows = [
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in _HTML.rows(grid)
    ]
    parts = [
        "<table>",
        f"<caption>{escape(grid.title)}</caption>" if grid.title else "",
        "<thead>",
        f"<tr><td></td>{groups}</tr>" if groups else "",
        f"<tr><td></td>{heads}</tr></thead><tbody>",
        *rows,
        "</tbody></table>",
        *(f'<p class="note">{note}</p>' for note in _HTML.notes(grid)),
    ]
    return "\n".join(filter(None, parts))


def _latex_groups(grid: Grid) -> list[str]:
    if not grid.groups:
        return []
    column, heads, rules = 2, [], []
    for upper, span in grid.groups:
        heads.append(f"\\multicolumn{{{span}}}{{c}}{{{_latex(upper)}}}")
        rules += [f"\\cmidrule(lr){{{column}-{column + span - 1}}}"] if upper else []
        column += span
    return [f" & {' & '.join(heads)} \\\\", " ".join(rules)]


def _latex(text: str) -> str:
    escapes = {
        "\\": "\\textbackslash{}",
        "±": "$\\pm$",
        "\N{EN DASH}": "--",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
    }
    escapes |= {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
    escapes |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    # After the end of a row, LaTeX takes a bracket or a star for an argument of that row.
    return "{}" * text.startswith(("[", "*")) + "".join(escapes.get(sign, sign) for sign in text)


_TEXT = _Language(str, ("", ""), ("", ""), (" [", "]"), shows_places=False)
_MARKDOWN = _Language(_markdown, ("**", "**"), ("<ins>", "</ins>"), ("<sup>", "</sup>"))
_LATEX = _Language(_latex, ("\\textbf{", "}"), ("\\underline{", "}"), ("\\textsuperscript{", "}"))
_HTML = _Language(escape, ("<strong>", "</strong>"), ("<u>", "</u>"), ("<sup>", "</sup>"))

WRITERS = {"text": as_text, "markdown": as_markdown, "latex": as_latex}
"""Format -> what writes tables in it."""

FORMATS = (*WRITERS, "csv")


def as_csv(table: pd.DataFrame, float_format: str) -> str:
    """For a spreadsheet: quoted where the csv module does, and no word is taken for a formula."""
    safe = table.rename(columns=_csv_cell)
    for column in safe.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in safe.dtypes]]:
        safe[column] = safe[column].map(_csv_cell)
    text: str = safe.to_csv(index=False, float_format=float_format, lineterminator="\n")
    return text


def _csv_cell(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    line = one_line(cell)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line
