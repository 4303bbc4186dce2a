"""A table of text, written as plain text, Markdown, LaTeX, HTML or CSV.

Words come from study files, folders and methods: whatever they are, they stay words in the language written.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

import pandas as pd

_WIDTH = 120  # of wrapped notes, characters

Conditions = Sequence[tuple[str, str]]
"""(name, value) lines that must stay with a table."""


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        title: printed above it; may be empty.
        columns: (upper head, lower head) of every column after the first; neighbours with one upper head share it.
        rows: cells, the first of a row being its label.
        notes: sentences under the table.
    """

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[str]]
    notes: list[str]

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
    return Grid(
        one_line(grid.title),
        [(one_line(upper), one_line(lower)) for upper, lower in grid.columns],
        [[one_line(cell) for cell in row] for row in grid.rows],
        [one_line(note) for note in grid.notes],
    )


def as_text(title: str, conditions: Conditions, grids: Sequence[Grid]) -> str:
    """For a terminal: columns aligned by spaces."""
    title, conditions, grids = _in_lines(title, conditions, grids)
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
        lines += ["| " + " | ".join(map(_markdown, row)) + " |" for row in [heads, rule, *grid.rows]]
        lines += ["", *(f"- {_markdown(note)}" for note in grid.notes)] if grid.notes else []
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    escaped = "".join(f"\\{sign}" if sign in "\\`*_|<&~$" else sign for sign in text)
    return escaped.replace("](", "]\\(")  # a mark in brackets is no link


def as_latex(title: str, conditions: Conditions, grids: Sequence[Grid]) -> str:
    """For a paper: one `tabular` per table (package booktabs), the conditions typeset under the first."""
    title, conditions, grids = _in_lines(title, conditions, grids)
    parts: list[str] = []
    for grid in grids:
        notes = [*(f"{name}: {value}" for name, value in conditions), *grid.notes] if not parts else grid.notes
        heads = [f" & {' & '.join(_latex(lower) for _, lower in grid.columns)} \\\\"]
        lines = [
            f"% {': '.join(filter(None, (title, grid.title)))}",
            *([f"\\noindent {_latex(grid.title)}\\par\\smallskip"] if grid.title else []),
            f"\\begin{{tabular}}{{l{'r' * len(grid.columns)}}}",
            "\\toprule",
            *_latex_groups(grid),
            *heads,
            "\\midrule",
            *(" & ".join(map(_latex, row)) + " \\\\" for row in grid.rows),
            "\\bottomrule",
            "\\end{tabular}",
            *([f"\\par\\smallskip\\noindent{{\\footnotesize {_latex('. '.join(notes))}.\\par}}"] if notes else []),
        ]
        parts.append("\n".join(lines))
    return "\n\n\\bigskip\n".join(parts) + "\n"


def as_html(grid: Grid) -> str:
    """One `table` element; its notes follow as a list."""
    grid = _grid_in_lines(grid)
    groups = "".join(f'<th colspan="{span}" scope="colgroup">{escape(upper)}</th>' for upper, span in grid.groups)
    heads = "".join(f'<th scope="col">{escape(lower)}</th>' for _, lower in grid.columns)
    rows = [
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in grid.rows
    ]
    parts = [
        "<table>",
        f"<caption>{escape(grid.title)}</caption>" if grid.title else "",
        "<thead>",
        f"<tr><td></td>{groups}</tr>" if groups else "",
        f"<tr><td></td>{heads}</tr></thead><tbody>",
        *rows,
        "</tbody></table>",
        *(f'<p class="note">{escape(note)}</p>' for note in grid.notes),
    ]
    return "\n".join(filter(None, parts))


def _latex_groups(grid: Grid) -> list[str]:
    if not grid.groups:
        return []
    column, heads, rules = 2, [], []
    for upper, span in grid.groups:
        heads.append(f"\\multicolumn{{{span}}}{{c}}{{{_latex(upper)}}}")
        rules.append(f"\\cmidrule(lr){{{column}-{column + span - 1}}}")
        column += span
    return [f" & {' & '.join(heads)} \\\\", " ".join(rules)]


def _latex(text: str) -> str:
    escapes = {"\\": "\\textbackslash{}", "±": "$\\pm$", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    escapes |= {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
    escapes |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    # After the end of a row, LaTeX takes a bracket or a star for an argument of that row.
    return "{}" * text.startswith(("[", "*")) + "".join(escapes.get(sign, sign) for sign in text)


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
