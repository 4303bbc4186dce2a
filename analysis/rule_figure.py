"""Can the selection score be trusted? The configurations of a study by their score and by what the unseen target says.

The target is looked at here to judge the rule, and chooses nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from analysis.house_style import new_figure, style
from analysis.study import Study

_FEWEST = 3  # configurations that a rank correlation is computed of
_LOOKS: dict[str, dict[str, Any]] = {
    "search": {"color": "#0173b2", "marker": "o", "markersize": 6},
    "default": {"color": "#d55e00", "marker": "D", "markersize": 7},
    "baseline": {"color": "0.25", "marker": "s", "markersize": 6},
}


def scored(study: Study) -> pd.DataFrame:
    """One row per configuration whose units on every target are finished, on the seeds that all of them share: trial,
    origin, score and mAP, percent, means over targets and seeds."""
    units = study.units[study.units["finished"].astype(bool) & study.units["target"].isin(study.targets)]
    if not study.record.compare:
        units = units[~units["confirms"].astype(bool)]  # what the search chose by
    complete = units.groupby(["trial", "seed"])["target"].nunique().eq(len(study.targets))
    seeds = {trial: set(rows[rows].index.get_level_values("seed")) for trial, rows in complete.groupby(level="trial")}
    seeds = {trial: own for trial, own in seeds.items() if own}
    common = set.intersection(*seeds.values()) if seeds else set()
    kept = units[units["trial"].isin(seeds) & units["seed"].isin(common)]
    table = 100 * kept.groupby("trial")[["score", "mAP"]].agg(lambda values: values.astype(float).mean())
    return table.reset_index().merge(
        study.trials[["name", "origin"]].rename(columns={"name": "trial"}), on="trial", how="left"
    )


def rank_correlation(table: pd.DataFrame) -> float:
    """Spearman's rho of score and mAP; nan for fewer than three configurations, or where one of the two is constant."""
    if len(table) < _FEWEST or table["score"].nunique() < 2 or table["mAP"].nunique() < 2:
        return float("nan")
    return float(stats.spearmanr(table["score"], table["mAP"]).statistic)


def draw_scored(axes: Axes, table: pd.DataFrame) -> Axes:
    """A mark per configuration of `scored`."""
    names = {"search": "tried", "default": "defaults", "baseline": "plain baseline"}
    for origin, rows in table.groupby("origin", sort=False):
        axes.plot(rows["score"], rows["mAP"], linestyle="", label=names.get(str(origin), origin), **_LOOKS[str(origin)])
    axes.set(xlabel="selection score, %", ylabel="mAP on the unseen targets, %")
    axes.legend(loc="best")
    return axes


def rule_figure(study: Study) -> Figure | None:
    """`draw_scored` with rho; None for fewer than three configurations."""
    table = scored(study)
    if len(table) < _FEWEST:
        return None
    rho = rank_correlation(table)
    figure, panels = new_figure(1, 1, width=5.0, height=3.6)
    with style():
        draw_scored(panels[0, 0], table)
        shown = "undefined" if np.isnan(rho) else f"{rho:+.2f}"
        rules = ", ".join(sorted(set(study.units["selection"].dropna())))
        how = f"{rules}, n = {len(table)}, Spearman's rho {shown}"
        figure.suptitle(f"Study {study.name} ({study.data} data)\n{how}")
    return figure
