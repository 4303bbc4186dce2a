"""Figures of a whole study: its history, what each swept setting did, and how its units trained.

Every figure has a function that computes a tidy table and one that draws it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from analysis.house_style import new_figure, style
from analysis.records import Axis
from analysis.study import PARAMETER, Study, load_metrics, print_name

CURVES = {"loss/total": "training loss", "val/mAP": "mAP on held-out sources, %", "val/oracle": "mAP on the TARGET, %"}
"""Logged scalar -> axis label, of the training curves."""

# Dark enough on white, apart for colour-blind readers, and each with its own shape.
_DEFAULT: dict[str, Any] = {"color": "#d55e00", "marker": "D", "markersize": 8}
_SEARCH: dict[str, Any] = {"color": "#0173b2", "marker": "o", "markersize": 6}
_ENDED: dict[str, Any] = {"color": "0.45", "marker": "x"}
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
    """Logged scalars of every unit: trial, role, target, seed, epoch, curve (key of `CURVES`), value.

    role is default, best (the best other trial), baseline or search (the rest). Fractions become percent.
    """
    best, parts = study.best_searched_trial(), []
    origins = dict(zip(study.trials["name"], study.trials["origin"], strict=True))
    for unit in study.units.itertuples():
        metrics = load_metrics(unit.path)
        role = "best" if best is not None and unit.trial == best["name"] else origins[unit.trial]
        for curve in CURVES.keys() & set(metrics.columns):
            logged = metrics.loc[metrics[curve].notna(), ["epoch", "step", curve]]
            about = {"trial": unit.trial, "role": role, "target": unit.target, "seed": unit.seed, "curve": curve}
            scale = 100 if curve.startswith("val/") else 1
            parts.append(pd.DataFrame({**about, "step": logged["step"], "value": scale * logged[curve]}))
    columns = ["trial", "role", "target", "seed", "curve", "step", "value"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def draw_training(axes: Axes, curves: pd.DataFrame) -> Axes:
    """One line per unit: the best trial and the defaults in colour, the baseline dashed, the others grey behind."""
    labels = {"best": "best of the search", "default": "defaults", "search": "other trials", "baseline": "baseline"}
    lines = sorted(curves.groupby(["role", "trial", "seed"]), key=lambda item: _ROLES.index(item[0][0]))
    for (role, _, _), line in lines:
        ordered = line.sort_values("step")
        look = {**_LINES[role], "marker": "." if len(ordered) < 3 else None, "zorder": 2 + _ROLES.index(role)}
        axes.plot(ordered["step"], ordered["value"], label=labels.pop(role, "_"), **look)
    return axes


def training_figure(study: Study) -> Figure | None:
    """A row per curve, a column per target; None when nothing was logged."""
    curves = training_curves(study)
    shown = [curve for curve in CURVES if (curves["curve"] == curve).any()]
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
                axes.set_ylabel(CURVES[shown[row]])
        _label(figure, study, "training of every unit")
    return figure


def _label(figure: Figure, study: Study, what: str) -> None:
    """Title, with the data it was made from, and one legend for all panels."""
    figure.suptitle(f"Study {study.name} ({study.data} data): {what}")
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for legend in found for handle, label in zip(*legend, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
