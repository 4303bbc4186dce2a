"""What lies behind a mean average precision: the CMC curve, and every query beside the same query of the baseline.

From queries.npz of the finished units; see lda/runs.py.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.comparison import counted_runs
from analysis.house_style import new_figure, style
from analysis.study import Study, print_name
from lda.runs import QUERIES, UnitFolder

RANKS = 20
"""Ranks of a CMC curve that are drawn."""

_SHOWN = 4  # configurations that a panel of curves can hold
_COLOURS = ("#d55e00", "#0173b2", "#029e73", "#cc78bc")
_LINES = ("--", "-", "-.", ":")
_BINS = np.linspace(-1, 1, 41).tolist()


@dataclass(frozen=True)
class Queries:
    """The queries of a finished unit, of all test splits one after the other.

    Attributes:
        average_precisions: (N,) fractions; nan for a query without a match, which is skipped.
        cmc: (splits, ranks): share of queries with a match among the first so many.
    """

    average_precisions: NDArray[np.float64]
    cmc: NDArray[np.float64]


def read_queries(unit: Path) -> Queries | None:
    """queries.npz of a unit's folder; None where it is not there, as in runs of older versions, or damaged."""
    try:
        arrays = dict(np.load(io.BytesIO(UnitFolder(unit).kept(QUERIES).read_bytes()), allow_pickle=False))
        return Queries(arrays["average_precisions"].astype(float), arrays["cmc"].astype(float))
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile):
        return None


def cmc_table(study: Study) -> pd.DataFrame:
    """label, target, seed, rank (1 to `RANKS`), share (percent, mean over test splits) of the runs that count.

    Raises UsageError as `protocol_table` does.
    """
    parts = []
    for run in counted_runs(study).itertuples():
        queries = read_queries(run.path)
        if queries is not None:
            shares = 100 * queries.cmc.mean(axis=0)[:RANKS]
            about = {"label": run.label, "target": run.target, "seed": run.seed}
            parts.append(pd.DataFrame({**about, "rank": np.arange(1, len(shares) + 1), "share": shares}))
    columns = ["label", "target", "seed", "rank", "share"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def draw_cmc(axes: Axes, table: pd.DataFrame) -> Axes:
    """The curves of one target: a line per configuration, the mean over seeds, in a band from the least to the most."""
    for place, (label, rows) in enumerate(table.groupby("label", sort=False)):
        curve = rows.groupby("rank")["share"].agg(["mean", "min", "max"])
        colour, line = _COLOURS[place % len(_COLOURS)], _LINES[place % len(_LINES)]
        axes.plot(curve.index, curve["mean"], line, color=colour, linewidth=1.4, label=label)
        axes.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.2, linewidth=0)
    axes.set_xlim(1, RANKS)
    axes.set_xticks([1, 5, 10, 15, 20])
    axes.set_xlabel("rank")
    return axes


def cmc_figure(study: Study) -> Figure | None:
    """A panel per target; None where no unit kept its queries. Of many configurations the baseline and the best."""
    table = cmc_table(study)
    table = table[table["label"].isin(shown_configurations(study))]
    if table.empty:
        return None
    return _panels(study, table, draw_cmc, "queries with a match among the first, %", "CMC, mean and range over seeds")


def differences(study: Study) -> pd.DataFrame:
    """label, target, difference: every valid query's AP minus that of the same query, seed and target of the baseline,
    as fractions; of every configuration but the baseline. Raises UsageError as `protocol_table` does."""
    runs = counted_runs(study)
    found = {(run.label, run.target, run.seed): read_queries(run.path) for run in runs.itertuples()}
    base = runs.loc[runs["configuration"] == "baseline", "label"]
    parts = []
    for (label, target, seed), queries in found.items():
        plain = found.get((base.iloc[0], target, seed)) if len(base) else None
        if queries is None or plain is None or label == base.iloc[0]:
            continue
        if len(queries.average_precisions) == len(plain.average_precisions):
            gaps = queries.average_precisions - plain.average_precisions
            parts.append(pd.DataFrame({"label": label, "target": target, "difference": gaps[~np.isnan(gaps)]}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["label", "target", "difference"])


def draw_differences(axes: Axes, table: pd.DataFrame) -> Axes:
    """How many queries gained and lost how much, one target: a step line per configuration, and what share won."""
    for place, (label, rows) in enumerate(table.groupby("label", sort=False)):
        gaps = rows["difference"].to_numpy(float)
        won, lost = (gaps > 0).mean(), (gaps < 0).mean()
        weights = np.full(len(gaps), 100 / len(gaps))
        name = f"{label}: {100 * won:.0f}% better, {100 * lost:.0f}% worse"
        axes.hist(
            gaps, _BINS, weights=weights, histtype="step", linewidth=1.4, label=name,
            color=_COLOURS[1:][place % (len(_COLOURS) - 1)],
        )  # fmt: skip
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("AP minus the baseline's")
    axes.legend(loc="upper left", fontsize="x-small")
    return axes


def differences_figure(study: Study) -> Figure | None:
    """A panel per target; None without a baseline or queries to compare."""
    table = differences(study)
    table = table[table["label"].isin(shown_configurations(study))]
    if table.empty:
        return None
    return _panels(study, table, draw_differences, "queries, % (log above 1)", "AP query by query", legend=False)


def shown_configurations(study: Study) -> list[str]:
    """The configurations that a panel has room for: the baseline, then those with the highest average mAP."""
    runs = counted_runs(study)
    means = runs.groupby("label", sort=False)["mAP"].mean().sort_values(ascending=False, kind="stable")
    base = list(dict.fromkeys(runs.loc[runs["configuration"] == "baseline", "label"]))
    return [*base, *(label for label in means.index if label not in base)][:_SHOWN]


_Draw = Callable[[Axes, pd.DataFrame], Axes]


def _panels(study: Study, table: pd.DataFrame, draw: _Draw, ylabel: str, what: str, legend: bool = True) -> Figure:
    targets = [target for target in study.targets if (table["target"] == target).any()]
    figure, panels = new_figure(1, len(targets), width=max(2.9 * len(targets), 4.5), height=3.2)
    order = [label for label in shown_configurations(study) if (table["label"] == label).any()]
    with style():
        for axes, target in zip(panels[0], targets, strict=True):
            rows = table[table["target"] == target]
            draw(axes, rows.assign(label=pd.Categorical(rows["label"], order)).sort_values("label", kind="stable"))
            axes.set_title(print_name(target))
        panels[0][0].set_ylabel(ylabel)
        figure.suptitle(f"Study {study.name} ({study.data} data): {what}")
        if legend:
            handles, labels = panels[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)
    return figure
