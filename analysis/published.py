"""Published numbers, to be shown beside a study's and never among them: those of the LDA poster, and newer ones.

    python analysis/published.py --protocol protocol3 --format latex

prints the poster's own tables, every number as printed; an average that does not follow from its row is footnoted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.comparison import AVERAGE, METRICS, metric_columns, print_target
from analysis.study import print_name
from analysis.text_tables import FORMATS, WRITERS, Grid, Mark, as_csv, best_marks
from lda.arguments import Parser, output_file
from lda.command import exit_code
from lda.files import atomic
from lda.protocols import PROTOCOLS, Protocol, get_protocol

PUBLISHED = Path(__file__).parent / "published.csv"

POSTER = "LDA poster"
"""The source of the poster's rows; the others name the repository whose tables print them."""

ROUNDING = 0.0501
"""A printed average may be so far from the mean of its cells, all of one decimal; one farther off is wrong."""

DASH = "\N{EN DASH}"
"""The cell of a number that is not reported."""

_SHORT = {
    "market1501": "M", "dukemtmcreid": "D", "msmt17": "MS", "cuhk02": "C2", "cuhk03": "C3", "cuhk_sysu": "CS",
}  # fmt: skip

# --- numbers ---------------------------------------------------------------------------------------------------------


def published_table(protocol: str) -> pd.DataFrame:
    """The poster's rows of one protocol, as printed: see the columns of published.csv."""
    rows = _rows(protocol)
    return rows[rows["source"] == POSTER].reset_index(drop=True)


def newer_table(protocol: str) -> pd.DataFrame:
    """Rows of one protocol that appeared after the poster, each with where it was read; some know averages only."""
    rows = _rows(protocol)
    return rows[rows["source"] != POSTER].reset_index(drop=True)


def _rows(protocol: str) -> pd.DataFrame:
    published = pd.read_csv(PUBLISHED, keep_default_na=False, na_values={"mAP": "", "rank1": ""})
    return published[published["protocol"] == protocol]


def poster_protocols() -> list[Protocol]:
    """The protocols that the poster has a table for."""
    return [protocol for name, protocol in PROTOCOLS.items() if not published_table(name).empty]


def recomputed(row: pd.DataFrame, targets: Sequence[str]) -> list[float]:
    """Mean of one method's cells over all targets, one a metric; nan where a cell is not known. `row`: by target."""
    means = row.reindex(list(targets))[[*METRICS]].mean(skipna=False)
    return [round(float(mean), 3) for mean in means]  # cells have one decimal: the rest is noise


def wrong_averages(row: pd.DataFrame, targets: Sequence[str]) -> dict[int, float]:
    """Position among a row's numbers of every printed average that does not follow from them -> what follows."""
    first = len(METRICS) * len(targets)
    both = zip(row.loc[AVERAGE, [*METRICS]].astype(float), recomputed(row, targets), strict=True)
    return {first + n: mean for n, (printed, mean) in enumerate(both) if abs(printed - mean) > ROUNDING}


# --- tables ----------------------------------------------------------------------------------------------------------


def published_grids(protocol: Protocol, warning: str = "") -> list[Grid]:
    """The poster's table of a protocol and, where there are any, one of rows that appeared since.

    Best and second are marked among the rows of each. `warning` goes behind their titles.
    """
    printed = poster_grid(protocol, f"Published on the LDA poster, real data sets{warning}")
    newer = newer_table(protocol.name)
    title = f"Published since, not on the poster, real data sets{warning}"
    return [printed] if newer.empty else [printed, _grid(protocol, newer, title)]


def poster_grid(protocol: Protocol, title: str) -> Grid:
    """The poster's table: a row per method with its venue, mAP and Rank-1 of every target and of their average."""
    grid = _grid(protocol, published_table(protocol.name), title)
    return replace(grid, notes=[*grid.notes, "The poster does not define its star"])


def _grid(protocol: Protocol, published: pd.DataFrame, title: str) -> Grid:
    sources, told = _sources(published)
    rows: list[list[str]] = []
    values: list[list[float]] = []
    notes, footnotes = [told], list[str]()
    wrong: dict[tuple[int, int], Mark] = {}
    for name, group in published.groupby("method", sort=False):
        method, row = str(name), group.set_index("target")
        printed = row.reindex([*protocol.targets, AVERAGE])[[*METRICS]].to_numpy(float).ravel()
        words = [DASH if np.isnan(value) else f"{value:.1f}" for value in printed]
        for column, mean in wrong_averages(row, protocol.targets).items():
            words[column], printed[column] = f"{words[column]} ({mean + 1e-9:.1f})", mean  # a half is rounded up
            wrong[len(rows), column] = Mark(footnote=len(footnotes))
        footnoted = any(cell[0] == len(rows) for cell in wrong)
        footnotes += [f"{method}: {row.loc[AVERAGE, 'note']}"] * footnoted
        rows.append([_label(group), *words])
        values.append(printed.tolist())
        notes += _notes(method, group[group["target"] != AVERAGE] if footnoted else group)
    places = best_marks(values)
    marks = places | {cell: replace(mark, place=places.get(cell, mark).place) for cell, mark in wrong.items()}
    if footnotes:
        notes.append("In brackets: the mean of the row's cells, by which a wrong average is compared with others")
    grid = Grid(title, metric_columns(protocol.targets), rows, notes, marks, footnotes=footnotes)
    return _with_sources(grid, list(sources.values())) if sources else grid


def _with_sources(grid: Grid, sources: Sequence[str]) -> Grid:
    """The grid with one more column, the first: what every row was trained on."""
    rows = [[label, trained, *cells] for (label, *cells), trained in zip(grid.rows, sources, strict=True)]
    marks = {(row, column + 1): mark for (row, column), mark in grid.marks.items()}
    return replace(grid, columns=[("", "trained on"), *grid.columns], rows=rows, marks=marks)


def _label(group: pd.DataFrame) -> str:
    star = "*" if (group["starred"] == "yes").any() else ""
    return f"{group['method'].iloc[0]}{star} ({group['venue'].iloc[0]})"


def _notes(method: str, group: pd.DataFrame) -> list[str]:
    """What published.csv says of a method's cells, each thing once."""
    notes = []
    for note, noted in group[group["note"] != ""].groupby("note", sort=False):
        where = "" if len(noted) == len(group) else f", {', '.join(map(print_target, noted['target']))}"
        notes.append(f"{method}{where}: {note}")
    return notes


def _sources(published: pd.DataFrame) -> tuple[Mapping[str, str], str]:
    """Method -> what it was trained on, {} where the targets decide that for all alike; and a note that says it."""
    cells = published[published["target"] != AVERAGE]
    short = cells["sources"].map(lambda names: "+".join(_SHORT[name] for name in names.split("+")))
    named = [f"{sign} {print_name(name)}" for name, sign in _SHORT.items() if cells["sources"].str.contains(name).any()]
    each = short.groupby(cells["target"], sort=False).unique()
    if (each.map(len) > 1).any():
        return short.groupby(cells["method"], sort=False).first().to_dict(), f"Trained on: {', '.join(named)}"
    of_target = {print_target(target): str(found[0]) for target, found in each.items()}
    if len(set(of_target.values())) == 1:
        return {}, f"Trained on {next(iter(of_target.values()))}: {', '.join(named)}"
    listed = "; ".join(f"{target} {found}" for target, found in of_target.items())
    return {}, f"Trained on, by target: {listed} ({', '.join(named)})"


def _csv(protocols: Sequence[Protocol]) -> str:
    """One row a method and protocol, empty where a number is not known or a target not of the protocol."""
    tables = [
        pd.DataFrame(
            [_csv_row(protocol, group) for _, group in published_table(protocol.name).groupby("method", sort=False)]
        )
        for protocol in protocols
    ]
    table = pd.concat(tables)
    last = [column for column in table if column.startswith(print_target(AVERAGE))] + ["note"]
    return as_csv(table[[column for column in table if column not in last] + last], "%g")


def _csv_row(protocol: Protocol, group: pd.DataFrame) -> dict[str, object]:
    first, row = group.iloc[0], group.set_index("target")
    heads = [f"{target} {metric}" for target, metric in metric_columns(protocol.targets)]
    cells = row.reindex([*protocol.targets, AVERAGE])[[*METRICS]].to_numpy(float).ravel().tolist()
    means = zip(METRICS.values(), recomputed(row, protocol.targets), strict=True)
    return {
        "protocol": protocol.title,
        **{key: first[key] for key in ("method", "venue", "starred")},
        "sources": row.loc[AVERAGE, "sources"],
        **dict(zip(heads, cells, strict=True)),
        **{f"{print_target(AVERAGE)} {metric}, recomputed": mean for metric, mean in means},
        "note": "; ".join(_notes(first["method"], group)),
    }


# --- command ---------------------------------------------------------------------------------------------------------


def render(protocols: Sequence[Protocol], format: str = "text") -> str:
    """The poster's tables of some protocols, as text, Markdown, LaTeX (booktabs) or CSV."""
    if format == "csv":
        return _csv(protocols)
    conditions = [("data", "real data sets; numbers as printed, none is ours"), ("numbers", "percent")]
    return WRITERS[format](
        "Published on the LDA poster", conditions, [poster_grid(protocol, protocol.title) for protocol in protocols]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/published.py`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _print(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python analysis/published.py", description="Print the tables of the LDA poster.")
    parser.add_argument("--format", choices=FORMATS, default="text", help="how it is written (default: %(default)s)")
    choices = [protocol.name for protocol in poster_protocols()]
    parser.add_argument("--protocol", choices=choices, help="one table (default: all)")
    parser.add_argument("--output", type=output_file, help="file to write (default: print it)")
    return parser.parse_args(arguments)


def _print(options: argparse.Namespace) -> None:
    text = render([get_protocol(options.protocol)] if options.protocol else poster_protocols(), options.format)
    if options.output is None:
        print(text, end="")
    else:
        with atomic(options.output) as file:
            file.write(text)
        print(options.output)


if __name__ == "__main__":
    sys.exit(main())
