"""A study's report: one HTML page that needs nothing but itself, beside its figures and tables as files.

    python analysis/report.py runs/protocol3

Writes reports/<date>-<study>/: index.html, table.md, table.csv, table.tex, and every figure as PNG and PDF.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import buffer_bank, study_figures
from analysis.bank_numbers import choose_layers, closest_pairs, domain_distances
from analysis.comparison import protocol_table
from analysis.house_style import as_png, save
from analysis.methods_figure import methods_figure
from analysis.records import Axis, listed, tell
from analysis.study import METRIC_NAMES, PARAMETER, Study, load_study, metrics_flaws, print_name
from analysis.tables import conditions, data_line, render, study_grids
from analysis.text_tables import as_html
from lda.arguments import Parser, checked, existing_folder, output_folder
from lda.command import exit_code
from lda.errors import FailedError, UsageError, warn
from lda.files import atomic
from lda.runs import print_method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = {"table.md": "markdown", "table.csv": "csv", "table.tex": "latex"}
"""Files of the protocol table -> format."""


@dataclass(frozen=True)
class Picture:
    """A figure of the report: `name` is its file's, `caption` says what to see."""

    name: str
    figure: Figure
    caption: str


# --- content ---------------------------------------------------------------------------------------------------------


def pictures(study: Study) -> list[Picture]:
    """Every figure that the study has the files for; captions say what is left out."""
    left_out = listed([*study.flaws, *metrics_flaws(study)])
    more = f" Left out: {left_out}." if left_out else ""
    return [replace(picture, caption=picture.caption + more) for picture in _pictures(study)]


def _pictures(study: Study) -> list[Picture]:
    if study.record.compare:
        return _comparison_pictures(study) + _bank_pictures(study)
    found = []
    if study.trials["state"].eq("complete").any():
        caption = "Selection score of the search's trials, in the order they were begun; some end early, without one."
        found.append(Picture("history", study_figures.history_figure(study), caption))
    parameters = study_figures.parameter_figure(study)
    if parameters is not None:
        caption = "Selection score over the value of each swept setting. Settings vary together: a trend is no proof."
        found.append(Picture("parameters", parameters, caption))
    training = study_figures.training_figure(study)
    if training is not None:
        found.append(Picture("training", training, "Training of every unit, all seeds."))
    return found + _bank_pictures(study)


def _comparison_pictures(study: Study) -> list[Picture]:
    caption = "mAP of every method; dashed: the plain baseline. A hollow mark: the method looked at target images."
    try:
        return [Picture("methods", methods_figure(study), caption)]
    except UsageError:  # nothing is complete yet; the page says so where its tables would be
        return []


def _bank_pictures(study: Study) -> list[Picture]:
    if not buffer_bank.units_with_bank(study):  # its methods keep none, or no unit is finished
        return []
    try:
        source = buffer_bank.open_source(study.folder)
    except FailedError as error:  # all are damaged
        warn(str(error))
        return []
    captions = {"buffer_bank": f"Buffer Bank statistics of the source domains: {source.title}."}
    if len(source.bank.domains) > 1:
        first, second, _ = closest_pairs(domain_distances(source.bank))[0]
        closest = f"{print_name(first)} and {print_name(second)} are closest"
        captions["buffer_bank_distances"] = f"Distances between the source domains; {closest}."
    figures = buffer_bank.bank_figures(source, choose_layers(source.bank))
    return [Picture(name, figure, captions[name]) for name, figure in figures.items()]


_PERCENT = {**METRIC_NAMES, "score": "selection score"}
"""Column that is a fraction in files and percent here -> its name in print."""


def trial_rows(study: Study) -> pd.DataFrame:
    """One row per trial: score in percent, swept settings, seconds of training, and why it ended early."""
    settings = {column: str(column).removeprefix(PARAMETER) for column in study.trials if PARAMETER in str(column)}
    table = study.trials.assign(score=100 * study.trials["score"].astype(float))
    table["seconds"] = table["name"].map(study.units.groupby("trial")["seconds"].sum())
    columns = ["name", "origin", "state", "score", *settings, "seconds", "reason"]
    return table[columns].rename(columns={**settings, **_PERCENT, "name": "trial"})


def unit_rows(study: Study) -> pd.DataFrame:
    """One row per unit, metrics in percent."""
    use = study.units["confirms"].map({True: "confirmation", False: "search"})
    table = study.units.assign(target=study.units["target"].map(print_name), use=use)
    table["method"] = [
        print_method(unit.title, unit.reconstructed, unit.target_data) if unit.finished else unit.method
        for unit in study.units.itertuples()
    ]
    for column in (*_PERCENT, "seconds", "images_per_second"):
        table[column] = table[column].astype(float) * (100 if column in _PERCENT else 1)
    columns = ["trial", "target", "seed", "method", "use", *_PERCENT, "seconds", "images_per_second"]
    return table[columns].rename(columns={**_PERCENT, "images_per_second": "images/s"})


# --- page ------------------------------------------------------------------------------------------------------------


def page(study: Study, figures: Sequence[Picture], today: date) -> str:
    """The whole report as HTML: figures inlined, tables sortable, no other file, no network."""
    try:
        table = protocol_table(study)
        facts = conditions(study, table)
        results = "\n".join(as_html(grid) for grid in study_grids(study, table))
    except (UsageError, FailedError) as error:  # a study under way is worth a page, too
        facts = [("data", data_line(study.data))]
        results = f'<p class="note">{escape(str(error))}</p>'
    facts += [("left out of curves", listed(flaws))] if (flaws := metrics_flaws(study)) else []
    facts += _provenance(study)
    return _PAGE.substitute(
        title=escape(f"{study.protocol.title}, study {study.name}"),
        subtitle=escape(study.record.title),
        date=today.isoformat(),
        banner="\n".join(f'<p class="banner">{escape(line)}</p>' for line in _banners(study)),
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts),
        results=results,
        figures="\n".join(map(_figure, figures)),
        trials=_sortable(trial_rows(study), "Trials"),
        units=_sortable(unit_rows(study), "Units: one run per trial, target and seed; percent"),
    )


def _banners(study: Study) -> list[str]:
    """What nobody may overlook."""
    data = [] if study.data == "real" else [data_line(study.data)]
    return data + ([f"Left out of all that follows: {left_out}"] if (left_out := listed(study.flaws)) else [])


def _provenance(study: Study) -> list[tuple[str, str]]:
    """What study.json knows about where the numbers came from."""
    record = study.record
    lines = [
        ("swept", ", ".join(f"{name} ({_axis(axis)})" for name, axis in record.space.items())),
        ("fixed", _listed(record.base)),
        ("command", record.command),
        ("commit", record.commit + (" with local changes" if record.dirty else "")),
        ("versions", _listed(record.versions)),
    ]
    return [(name, text) for name, text in lines if text]


def _axis(axis: Axis) -> str:
    if axis.choices:
        return ", ".join(map(str, axis.choices))
    step = f", step {axis.step:g}" if axis.step else ""
    return f"{axis.low} to {axis.high}{', log scale' if axis.log else ''}{step}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _figure(picture: Picture) -> str:
    data = base64.b64encode(as_png(picture.figure)).decode()
    caption = escape(picture.caption)
    return (
        f'<figure id="{picture.name}"><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _sortable(table: pd.DataFrame, caption: str) -> str:
    """A table whose heads sort it when pressed; cells carry the exact value they are sorted by."""
    numeric = [bool(pd.api.types.is_numeric_dtype(table[name])) for name in table.columns]
    heads = [
        f'<th scope="col"{_NUMBER if is_number else ""}><button type="button">{escape(str(name))}</button></th>'
        for name, is_number in zip(table.columns, numeric, strict=True)
    ]
    rows = []
    for row in table.itertuples(index=False):
        cells = [_cell(*cell) for cell in zip(row, table.columns, numeric, strict=True)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table>"
    )


_NUMBER = ' class="number"'
_DECIMALS = {**dict.fromkeys(_PERCENT.values(), 1), "seconds": 0, "images/s": 0}


def _cell(value: object, column: str, numeric: bool) -> str:
    if value is None or pd.isna(value):
        return f"<td{_NUMBER if numeric else ''} data-none></td>"
    if isinstance(value, float):
        shown = f"{value:.{_DECIMALS[column]}f}" if column in _DECIMALS else f"{value:.3g}"
        return f'<td{_NUMBER} data-value="{value!r}">{shown}</td>'
    return f"<td{_NUMBER if numeric else ''}>{escape(str(value))}</td>"


_PAGE = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))


# --- command ---------------------------------------------------------------------------------------------------------


def write_report(study: Study, output: Path, today: date) -> Path:
    """Write the page, its figures and its tables into `output`. Returns the page."""
    figures = pictures(study)
    for picture in figures:
        for kind in ("png", "pdf"):
            save(picture.figure, output / f"{picture.name}.{kind}")
    try:
        texts = {name: render(study, format) for name, format in TABLES.items()}
    except (UsageError, FailedError):  # nothing to tabulate yet; the page says so
        texts = {}
    texts["index.html"] = page(study, figures, today)
    for name, text in texts.items():
        with atomic(output / name) as file:
            file.write(text)
    return output / "index.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/report.py STUDY`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _report(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python analysis/report.py", description="Write a study's report: one HTML page, figures and tables."
    )
    parser.add_argument("study", type=existing_folder, help="folder of the study, for example runs/protocol3")
    parser.add_argument("--output", type=output_folder, help="folder of the report (default: reports/<date>-<study>)")
    return parser.parse_args(arguments)


def _report(options: argparse.Namespace) -> int:
    study, today = load_study(options.study), date.today()
    tell([*study.flaws, *metrics_flaws(study)])
    output = checked("--output", output_folder, options.output or Path("reports", f"{today.isoformat()}-{study.name}"))
    print(write_report(study, output, today))
    if listed(study.flaws) and not study.units["finished"].astype(bool).any():
        warn("no unit of this study is whole; the page shows none")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
