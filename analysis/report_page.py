"""A report as HTML: a page that needs nothing but itself, and the page that leads to several."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from analysis.comparison import AVERAGE, protocol_table
from analysis.house_style import as_png
from analysis.records import listed
from analysis.report_figures import SECTIONS, Picture
from analysis.report_words import failures, headline, provenance, unnamed
from analysis.study import METRIC_NAMES, PARAMETER, Study, metrics_flaws, print_name
from analysis.tables import conditions, cost_grid, data_line, study_grids
from analysis.text_tables import Grid, as_html, as_latex
from lda.errors import FailedError, UsageError
from lda.runs import print_method

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Fragment:
    """HTML that another part made for a section, such as ranked lists."""

    title: str
    html: str


# --- one study -------------------------------------------------------------------------------------------------------


def page(
    study: Study,
    figures: Mapping[str, Sequence[Picture]],
    today: date,
    anonymous: bool = False,
    fragments: Sequence[Fragment] = (),
) -> str:
    """The whole report of a study: figures inlined, tables sortable, no other file, no network.

    anonymous: without command, commit, folders and hosts. fragments: further parts of the section "queries".
    """
    facts, grids, note = _results(study)
    facts += [("left out of curves", listed(flaws))] if (flaws := metrics_flaws(study)) else []
    title, trials, wrong = f"{study.protocol.title}, study {study.name}", trial_rows(study), failures(study)
    if anonymous:
        facts, note = [(name, unnamed(value)) for name, value in facts], unnamed(note)
        trials = trials.assign(reason=[reason and unnamed(reason) for reason in trials["reason"]])
        wrong = wrong.map(unnamed)
    return _TEMPLATES.get_template("report.html").render(
        title=title,
        subtitle=study.record.title,
        date=today.isoformat(),
        banners=_banners(study),
        headline=headline(study),
        note=note,
        tables=[_Table(as_html(grid), as_latex(title, facts, [grid])) for grid in grids],
        facts=[*facts, *provenance(study, anonymous)],
        study="" if anonymous else str(study.folder),
        sections=[_Section(key, name, figures.get(key, ()), study, anonymous) for key, name in SECTIONS.items()],
        fragments=[(fragment.title, Markup(fragment.html)) for fragment in fragments],
        failures=_rows(wrong),
        trials=sortable(trials, "Trials"),
        units=sortable(unit_rows(study), "Units: one run per trial, target and seed; percent"),
    )


@dataclass(frozen=True)
class _Table:
    html: str
    latex: str

    def __html__(self) -> str:
        return self.html


class _Section:
    """A section with figures, as the template sees it."""

    def __init__(self, key: str, title: str, figures: Sequence[Picture], study: Study, anonymous: bool) -> None:
        self.key, self.title, self.figures = key, title, [_Figure(picture, study, anonymous) for picture in figures]


class _Figure:
    """A picture, inlined, with the command that makes it again."""

    def __init__(self, picture: Picture, study: Study, anonymous: bool) -> None:
        self.name, self.caption = picture.name, picture.caption
        self.data = base64.b64encode(as_png(picture.figure)).decode()
        output = f" --output {picture.name}.png" if "cost" in picture.command else ""
        self.command = "" if anonymous else f"{picture.command} {study.folder}{output}"


def _results(study: Study) -> tuple[list[tuple[str, str]], list[Grid], str]:
    """(conditions, tables, why there are none)."""
    try:
        table = protocol_table(study)
    except (UsageError, FailedError) as error:  # a study under way is worth a page, too
        return [("data", data_line(study.data))], [], str(error)
    grids = study_grids(study, table)
    if not study.record.compare:
        grids.append(cost_grid(study, table[table["target"] == AVERAGE]))
    return conditions(study, table), grids, ""


def _banners(study: Study) -> list[str]:
    """What nobody may overlook."""
    data = [] if study.data == "real" else [data_line(study.data)]
    return data + ([f"Left out of all that follows: {left_out}"] if (left_out := listed(study.flaws)) else [])


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


def sortable(table: pd.DataFrame, caption: str) -> Markup:
    """A table whose heads sort it when pressed; cells carry the exact value they are sorted by."""
    numeric = [bool(pd.api.types.is_numeric_dtype(table[name])) for name in table.columns]
    rows = [
        [_Cell(value, str(name), is_number) for value, name, is_number in zip(row, table.columns, numeric, strict=True)]
        for row in table.itertuples(index=False)
    ]
    heads = list(zip(map(str, table.columns), numeric, strict=True))
    return Markup(_TEMPLATES.get_template("sortable.html").render(caption=caption, heads=heads, rows=rows))


_DECIMALS = {**dict.fromkeys(_PERCENT.values(), 1), "seconds": 0, "images/s": 0, "mAP gain": 1, "hours": 1}


class _Cell:
    """A cell of a sortable table: what is shown, and the exact value of a number; `none` where there is none."""

    def __init__(self, value: Any, column: str, numeric: bool) -> None:
        self.numeric, self.exact, self.shown, self.link = numeric, "", "", ""
        self.none = bool(value is None or (not isinstance(value, Link) and pd.isna(value)))
        if isinstance(value, Link):
            self.shown, self.link = value.text, value.address
        elif isinstance(value, float) and not self.none:
            self.shown = f"{value:.{_DECIMALS[column]}f}" if column in _DECIMALS else f"{value:.3g}"
            self.numeric, self.exact = True, repr(value)
        elif not self.none:
            self.shown = str(value)


@dataclass(frozen=True)
class Link:
    """A cell that leads somewhere."""

    text: str
    address: str


def _rows(table: pd.DataFrame) -> list[list[str]]:
    return [[str(value) for value in row] for row in table.itertuples(index=False)]


# --- several studies -------------------------------------------------------------------------------------------------


def index_row(study: Study, page: str) -> dict[str, Any]:
    """A study as a line of the index: its best row on the average of the targets, and what it took."""
    units = study.units[study.units["finished"].astype(bool)]
    line: dict[str, Any] = {
        "study": Link(study.name, page),
        "protocol": study.protocol.title,
        "data": study.data,
        "best": "nothing is complete yet",
        "mAP": float("nan"),
        "mAP gain": float("nan"),
        "seeds": float("nan"),
        "rule": ", ".join(sorted(set(units["selection"].dropna()))),
        "preset": study.record.preset,
        "units": len(units),
        "hours": float(units["seconds"].astype(float).sum()) / 3600,
        "left out": len([flaw for flaw in study.flaws if flaw.left_out]),
        "commit": study.record.commit[:7],
    }
    try:
        table = protocol_table(study)
    except (UsageError, FailedError):
        return line
    rows = table[table["target"] == AVERAGE]
    best = rows.loc[rows["mAP"].idxmax()]
    found = {"best": best["label"], "mAP": float(best["mAP"]), "mAP gain": float(best["mAP_gain"])}
    return {**line, **found, "seeds": float(best["seeds"])}


def index_page(rows: Sequence[Mapping[str, Any]], wrong: Sequence[str], today: date, anonymous: bool) -> str:
    """The page that leads to the reports of several studies. `wrong`: a line per study that cannot be read."""
    table = pd.DataFrame(list(rows))
    if anonymous:
        table = table.drop(columns="commit", errors="ignore")
    return _TEMPLATES.get_template("index.html").render(
        title="Studies",
        date=today.isoformat(),
        wrong=[unnamed(line) for line in wrong] if anonymous else wrong,
        studies=sortable(table, "One row per study; percent"),
    )
