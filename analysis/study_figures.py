"""Figures of a whole study: its history, what each swept setting did, and how its units trained.

Every figure has a function that computes a tidy table and one that draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from analysis.comparison import CONTROL
from analysis.house_style import new_figure, style
from analysis.records import Axis
from analysis.study import PARAMETER, Study, load_metrics, print_name

CURVES = {"loss/total": "training loss", "val/mAP": "mAP on held-out sources, %", "val/oracle": "mAP on the TARGET, %"}
"""Logged scalar -> axis label, of the training curves."""

FEATURES = {
    "feature/norm": "feature norm",
    "feature/sigma": "mean deviation\nof the last map",
    "feature/effective_rank": "effective rank\nof held-out features",
}
"""The same of what features do: moments also match by shrinking, and features collapse unseen in a loss."""

_MOST_LINES = 4  # configurations of a comparison whose curves a panel can hold

# Dark enough on white, apart for colour-blind readers, and each with its own shape.
_DEFAULT: dict[str, Any] = {"color": "#d55e00", "marker": "D", "markersize": 8}
_SEARCH: dict[str, Any] = {"color": "#0173b2", "marker": "o", "markersize": 6}
_ENDED: dict[str, Any] = {"color": "0.45", "marker": "x"}
_BY_PLACE: tuple[dict[str, Any], ...] = (
    {"color": "0.25", "linestyle": "--"}, {"color": "#0173b2"}, {"color": "#029e73", "linestyle": "-."},
    {"color": "#cc78bc", "linestyle": ":"},
)  # fmt: skip
_ROLES = ["search", "baseline", "default", "best"]  # back to front
_LINES: dict[str, dict[str, Any]] = {
    "search": {"color": "0.75", "linewidth": 0.8},
    "baseline": {"color": "0.25", "linewidth": 1.2, "linestyle": "--"},
    "default": {"color": _DEFAULT["color"], "linewidth": 1.4},
    "best": {"color": _SEARCH["color"], "linewidth": 1.4},
}


# --- history ---------------------------------------------------------------------------------------------------------


def history(study: Study) -> pd.DataFrame:
    """The search's trials by number: number, origin, state, score (percent, missing unless complete), best (so far)."""
    rows = study.trials[study.trials["number"].notna()]
    table = rows[["number", "origin", "state"]].reset_index(drop=True).astype({"number": int})
    table["score"] = np.where(rows["state"] == "complete", 100 * rows["score"].astype(float), np.nan)
    return table.assign(best=table["score"].cummax().ffill())


def draw_history(axes: Axes, table: pd.DataFrame) -> Axes:
    """Score per trial, the defaults marked, the best so far as a step line; trials that ended early on the floor."""
    complete, default = table[table["score"].notna()], table[table["origin"] == "default"]
    searched = complete[complete["origin"] != "default"]
    axes.step(table["number"], table["best"], where="post", color="0.4", linewidth=1, label="best so far")
    axes.plot(searched["number"], searched["score"], linestyle="", label="trial", **_SEARCH)
    axes.plot(default["number"], default["score"], linestyle="", label="defaults", **_DEFAULT)
    for value in default["score"].dropna():
        axes.axhline(value, color=_DEFAULT["color"], linewidth=0.8, linestyle=":")
    early = table[table["state"].isin(("pruned", "failed"))]
    if not early.empty:
        floor = complete["score"].min() if len(complete) else 0.0
        axes.plot(early["number"], [floor] * len(early), linestyle="", label="pruned or failed", **_ENDED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel="selection score, %")
    axes.set_xlim(table["number"].min() - 0.5, table["number"].max() + 0.5)  # one trial alone has whole ticks too
    return axes


# --- settings --------------------------------------------------------------------------------------------------------


def parameters(study: Study) -> list[str]:
    """The swept settings that at least one trial has a value for."""
    return [str(column).removeprefix(PARAMETER) for column in study.trials.columns if str(column).startswith(PARAMETER)]


def parameter_scores(study: Study, parameter: str) -> pd.DataFrame:
    """value and score (percent) of every complete trial of the search, with its number and origin."""
    complete = study.trials[(study.trials["state"] == "complete") & (study.trials["origin"] != "baseline")]
    table = complete[["number", "origin", f"{PARAMETER}{parameter}", "score"]].dropna()
    table = table.rename(columns={f"{PARAMETER}{parameter}": "value"}).reset_index(drop=True)
    return table.assign(score=100 * table["score"].astype(float))


def draw_parameter(axes: Axes, table: pd.DataFrame, parameter: str, axis: Axis | None = None) -> Axes:
    """Score over the value of one setting.

    `axis` is the setting's entry in the study's space: its bounds and scale become those of the x axis. Choices (and
    values that are no numbers) become places on it.
    """
    axis = axis or Axis()
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in table["value"])
    if numbers and not axis.choices:
        position = table["value"].astype(float)
        _scale(axes, axis)
    else:
        places = {str(value): place for place, value in enumerate(axis.choices or sorted(set(table["value"])))}
        position = table["value"].astype(str).map(places)
        axes.set_xticks(list(places.values()), list(places))
        axes.set_xlim(-0.5, len(places) - 0.5)
    for origin, name, look in (("search", "trial", _SEARCH), ("default", "defaults", _DEFAULT)):
        chosen = table["origin"] == origin
        axes.plot(position[chosen], table["score"][chosen], linestyle="", label=name, **look)
    axes.set(xlabel=parameter)
    return axes


def _scale(axes: Axes, axis: Axis) -> None:
    """The x axis of a range: its bounds with a little room, its scale, labels that do not run into each other."""
    low, high = axis.low, axis.high
    if axis.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if low is not None and high is not None:
            room = (high / low) ** 0.05
            axes.set_xlim(low / room, high * room)
    elif low is not None and high is not None:
        room = 0.05 * (high - low)
        axes.set_xlim(low - room, high + room)


def parameter_figure(study: Study) -> Figure | None:
    """One panel per swept setting, None when nothing was swept or nothing is complete."""
    tables = {name: parameter_scores(study, name) for name in parameters(study)}
    tables = {name: table for name, table in tables.items() if not table.empty}
    if not tables:
        return None
    columns = min(len(tables), 3)
    rows = -(-len(tables) // columns)
    figure, panels = new_figure(rows, columns, width=max(3.0 * columns, 4.0), height=2.6 * rows + 0.4)
    with style():
        for axes, (name, table) in zip(panels.flat, tables.items(), strict=False):
            draw_parameter(axes, table, name, study.record.space.get(name))
        for axes in panels.flat[len(tables) :]:
            axes.remove()
        for axes in panels[:, 0]:
            axes.set_ylabel("selection score, %")
        _label(figure, study, "selection score over swept settings")
    return figure


def history_figure(study: Study) -> Figure:
    """`draw_history` of the whole study."""
    figure, panels = new_figure(1, 1, width=6.5, height=3.2)
    with style():
        draw_history(panels[0, 0], history(study))
        _label(figure, study, "selection score of every trial")
    return figure


# --- training --------------------------------------------------------------------------------------------------------


def training_curves(study: Study) -> pd.DataFrame:
    """Logged scalars of every unit: trial, role, target, seed, epoch, curve (of `CURVES` or `FEATURES`), value.

    role is default, best (the best other trial), baseline or search (the rest); of a comparison, the labels of the
    baseline and of the rows with the highest mAP. Fractions become percent.
    """
    roles, parts = _roles(study), []
    for unit in study.units[study.units["trial"].isin(roles)].itertuples():
        metrics, role = load_metrics(unit.path), roles[unit.trial]
        for curve in (CURVES | FEATURES).keys() & set(metrics.columns):
            logged = metrics.loc[metrics[curve].notna(), ["epoch", "step", curve]]
            about = {"trial": unit.trial, "role": role, "target": unit.target, "seed": unit.seed, "curve": curve}
            scale = 100 if curve.startswith("val/") else 1
            parts.append(pd.DataFrame({**about, "step": logged["step"], "value": scale * logged[curve]}))
    columns = ["trial", "role", "target", "seed", "curve", "step", "value"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _roles(study: Study) -> dict[str, str]:
    """Trial -> its role in `training_curves`; trials that are not drawn are left out."""
    if study.record.compare:
        finished = study.units[study.units["finished"].astype(bool)]
        means = finished.groupby("trial")["mAP"].agg(lambda values: values.astype(float).mean())
        ranked = means.sort_values(ascending=False, kind="stable").index
        base = [name for name in ranked if name == f"trial-{CONTROL}"]
        shown = [*base, *(name for name in ranked if name not in base)][:_MOST_LINES]
        return {name: study.title_of(name) or name.removeprefix("trial-") for name in shown}
    best = study.best_searched_trial()
    roles = {str(row["name"]): str(row["origin"]) for _, row in study.trials.iterrows()}
    return roles if best is None else {**roles, str(best["name"]): "best"}


def draw_training(axes: Axes, curves: pd.DataFrame) -> Axes:
    """The trials of the search as grey lines behind; of every other role the mean over its runs, in a band from the
    least to the most."""
    labels = {"best": "best of the search", "default": "defaults", "search": "other trials", "baseline": "baseline"}
    found = dict(iter(curves.groupby("role", sort=False)))
    for _, line in found.pop("search", curves[:0]).groupby(["trial", "seed"]):
        ordered, look = line.sort_values("step"), _LINES["search"]
        axes.plot(ordered["step"], ordered["value"], label=labels.pop("search", "_"), **_mark(look, ordered), zorder=2)
    for place, role in enumerate(sorted(found, key=_order)):
        look = _LINES.get(role, {**_BY_PLACE[place % len(_BY_PLACE)], "linewidth": 1.4})
        curve = found[role].groupby("step")["value"].agg(["mean", "min", "max"])
        band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(curve.index, curve["min"], curve["max"], zorder=3 + place, **band)
        axes.plot(curve.index, curve["mean"], label=labels.get(role, role), zorder=3 + place, **_mark(look, curve))
    return axes


def _mark(look: dict[str, Any], line: pd.DataFrame) -> dict[str, Any]:
    return {**look, "marker": "." if len(line) < 3 else None}  # a line of one or two points would not be seen


def _order(role: str) -> int:
    return _ROLES.index(role) if role in _ROLES else 0


def training_figure(study: Study, wanted: Mapping[str, str] = CURVES, what: str = "training") -> Figure | None:
    """A row per curve, a column per target; None when nothing was logged. `what` it shows stands in the title."""
    curves = training_curves(study)
    shown = [curve for curve in wanted if (curves["curve"] == curve).any()]
    targets = [target for target in study.targets if (curves["target"] == target).any()]
    if not shown or not targets:
        return None
    figure, panels = new_figure(
        len(shown), len(targets), width=max(3.0 * len(targets), 5.0), height=2.4 * len(shown) + 0.6
    )
    with style():
        for (row, column), axes in np.ndenumerate(panels):
            draw_training(axes, curves[(curves["curve"] == shown[row]) & (curves["target"] == targets[column])])
            axes.sharex(panels[0, column])
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            if row == 0:
                axes.set_title(f"unseen target {print_name(targets[column])}")
            if row == len(shown) - 1:
                axes.set_xlabel("step")
            if column == 0:
                axes.set_ylabel(wanted[shown[row]])
        _label(figure, study, f"{what}, mean and range over seeds")
    return figure


def _label(figure: Figure, study: Study, what: str) -> None:
    """Title, with the data it was made from, and one legend for all panels."""
    figure.suptitle(f"Study {study.name} ({study.data} data): {what}")
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for legend in found for handle, label in zip(*legend, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
