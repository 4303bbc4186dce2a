"""What lies behind a mean average precision: the CMC curve, and every query beside the same query of the baseline.

From queries.npz of the finished units; see lda/runs.py.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

_BASELINE: dict[str, Any] = {"color": "0.25", "linestyle": "--"}
_TRIALS: dict[str, dict[str, Any]] = {"default": {"color": "#d55e00", "linestyle": "-."}, "best": {"color": "#0173b2"}}
_OTHERS: tuple[dict[str, Any], ...] = (
    {"color": "#0173b2"}, {"color": "#029e73", "linestyle": "-."}, {"color": "#cc78bc", "linestyle": ":"},
)  # fmt: skip
_BINS = np.linspace(-1, 1, 41).tolist()


Looks = dict[str, dict[str, Any]]
"""Label of a configuration -> how it is drawn."""

_Draw = Callable[[Axes, pd.DataFrame, Looks], Axes]


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


def draw_cmc(axes: Axes, table: pd.DataFrame, looks: Looks) -> Axes:
    """The curves of one target: a line per configuration, the mean over seeds, in a band from the least to the most."""
    for label, rows in table.groupby("label", sort=False):
        curve = rows.groupby("rank")["share"].agg(["mean", "min", "max"])
        axes.plot(curve.index, curve["mean"], linewidth=1.4, label=label, **looks[str(label)])
        axes.fill_between(
            curve.index, curve["min"], curve["max"], color=looks[str(label)]["color"], alpha=0.2, linewidth=0
        )
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
    return _panels(study, table, draw_cmc, "queries with a match, %", "CMC, mean and range over seeds")


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


def draw_differences(axes: Axes, table: pd.DataFrame, looks: Looks) -> Axes:
    """How many queries gained and lost how much, one target: a step line per configuration, and in its colour what
    share gained and lost at all."""
    for place, (label, rows) in enumerate(table.groupby("label", sort=False)):
        gaps, look = rows["difference"].to_numpy(float), looks[str(label)]
        weights = np.full(len(gaps), 100 / len(gaps))
        axes.hist(gaps, _BINS, weights=weights, histtype="step", linewidth=1.4, label=str(label), **look)
        share = f"{100 * (gaps > 0).mean():.0f}% up, {100 * (gaps < 0).mean():.0f}% down"
        axes.text(0.03, 0.95 - 0.09 * place, share, color=look["color"], transform=axes.transAxes, va="top", fontsize=8)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlim(-1, 1)
    axes.set_xlabel("AP minus the baseline's")
    return axes


def differences_figure(study: Study) -> Figure | None:
    """A panel per target; None without a baseline or queries to compare."""
    table = differences(study)
    table = table[table["label"].isin(shown_configurations(study))]
    if table.empty:
        return None
    return _panels(study, table, draw_differences, "queries, %", "AP query by query")


def shown_configurations(study: Study) -> Looks:
    """The configurations that a panel has room for, by label: the baseline, then those with the highest average mAP; of
    a search, its defaults and its best. With how each is drawn."""
    runs = counted_runs(study)
    means = (
        runs.groupby(["label", "configuration"], sort=False)["mAP"].mean().sort_values(ascending=False, kind="stable")
    )
    kinds = {str(label): str(kind) for label, kind in means.index}
    found = {label: _BASELINE for label, kind in kinds.items() if kind == "baseline"}
    if not study.record.compare:
        return found | {label: _TRIALS[kind] for label, kind in kinds.items() if kind in _TRIALS}
    others = [label for label, kind in kinds.items() if kind != "baseline"]
    return found | dict(zip(others, _OTHERS, strict=False))


def _panels(study: Study, table: pd.DataFrame, draw: _Draw, ylabel: str, what: str) -> Figure:
    looks = shown_configurations(study)
    targets = [target for target in study.targets if (table["target"] == target).any()]
    figure, panels = new_figure(1, len(targets), width=max(2.9 * len(targets), 4.5), height=3.2)
    order = [label for label in looks if (table["label"] == label).any()]
    with style():
        for axes, target in zip(panels[0], targets, strict=True):
            rows = table[table["target"] == target]
            rows = rows.assign(label=pd.Categorical(rows["label"], order)).sort_values("label", kind="stable")
            draw(axes, rows.astype({"label": str}), looks)
            axes.set_title(print_name(target))
        panels[0][0].set_ylabel(ylabel)
        figure.suptitle(f"Study {study.name} ({study.data} data): {what}")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)
    return figure
