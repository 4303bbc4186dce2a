"""Which domains a Buffer Bank takes for alike: a tree of them, their distances layer by layer, and over training.

The poster's picture says that CUHK02 and CUHK03, drawn in one scene, look alike; `closeness` is that as a number.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from analysis.bank_numbers import Bank, closest_pairs, domain_distances, layer_distances
from analysis.house_style import new_figure, style
from analysis.study import load_metrics, print_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSTER_PAIR = ("cuhk02", "cuhk03")
"""The domains that the poster's picture shows side by side."""

COURSE = "bank/"
"""Prefix of the logged distances; see reports/numbers.md."""

_FEWEST = 3  # domains: with two there is one pair, and nothing to compare it with
_OTHER: dict[str, Any] = {"color": "0.6", "linewidth": 0.9}
_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#d55e00", "linewidth": 1.8},
    {"color": "#0173b2", "linewidth": 1.4, "linestyle": "--"},
)


def named_pair(distances: pd.DataFrame) -> tuple[str, str]:
    """The poster's pair where both are there, else the closest."""
    if set(POSTER_PAIR) <= set(distances.index):
        return POSTER_PAIR
    first, second, _ = closest_pairs(distances)[0]
    return first, second


def closeness(distances: pd.DataFrame, first: str, second: str) -> float:
    """Distance of two domains over the mean distance of all other pairs: below 1, they are closer than domains are."""
    others = [distance for a, b, distance in closest_pairs(distances) if {a, b} != {first, second}]
    return float(distances.loc[first, second] / np.mean(others))


def pairs_of_layers(bank: Bank) -> pd.DataFrame:
    """layer, first, second, distance: one row per layer, in network order, and pair of domains."""
    rows = [
        {"layer": layer, "first": bank.domains[a], "second": bank.domains[b], "distance": float(between[a, b])}
        for layer, between in zip(bank.layers, layer_distances(bank), strict=True)
        for a, b in itertools.combinations(range(len(bank.domains)), 2)
    ]
    return pd.DataFrame(rows)


def course(unit: Path) -> pd.DataFrame:
    """step, first, second, distance: what a run logged at the end of every epoch; empty for a run that logged none."""
    metrics = load_metrics(unit)
    parts = []
    for column in [str(column) for column in metrics.columns if str(column).startswith(COURSE)]:
        first, second = column.removeprefix(COURSE).split("-")
        logged = metrics.loc[metrics[column].notna(), ["step", column]]
        parts.append(
            pd.DataFrame({"step": logged["step"], "first": first, "second": second, "distance": logged[column]})
        )
    return (
        pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["step", "first", "second", "distance"])
    )


def draw_tree(axes: Axes, distances: pd.DataFrame) -> Axes:
    """The domains as a tree by average linkage: two meet at the mean distance of their groups."""
    tree = linkage(squareform(distances.to_numpy(), checks=False), "average")
    names = [print_name(name) for name in distances.index]
    look = {"color_threshold": 0, "above_threshold_color": "0.3", "leaf_font_size": 9}
    dendrogram(tree, labels=names, orientation="left", ax=axes, **look)
    axes.grid(visible=False)
    axes.set_xlabel("distance, average linkage")
    return axes


def draw_pairs(axes: Axes, table: pd.DataFrame, over: str, pairs: list[tuple[str, str]]) -> Axes:
    """Distance of every pair over a column of the table; `pairs` are told apart and named, the others are grey."""
    looks = dict(zip(map(frozenset, pairs), _LOOKS, strict=False))
    rest = "other pairs"
    for (first, second), rows in table.groupby(["first", "second"], sort=False):
        look = looks.get(frozenset((first, second)))
        label = f"{print_name(first)} - {print_name(second)}" if look else rest
        axes.plot(rows[over], rows["distance"], label=label, zorder=3 if look else 2, **(look or _OTHER))
        rest = rest if look else "_"
    axes.set_ylabel("distance")
    axes.set_ylim(bottom=0)
    return axes


def pairs_figure(bank: Bank, unit: Path, title: str) -> Figure | None:
    """Tree, distances over layers and, where they were logged, over training. None for fewer than three domains."""
    if len(bank.domains) < _FEWEST:
        return None
    distances, logged = domain_distances(bank), course(unit)
    pair = named_pair(distances)
    first, second, _ = closest_pairs(distances)[0]
    shown = list(dict.fromkeys([pair, (first, second)]))
    figure, panels = new_figure(1, 2 + (not logged.empty), width=8.0 + 2.4 * (not logged.empty), height=3.6)
    with style():
        draw_tree(panels[0, 0], distances)
        layers = pairs_of_layers(bank)
        draw_pairs(panels[0, 1], layers.assign(place=layers["layer"].map(bank.layers.index)), "place", shown)
        panels[0, 1].set_xlabel("layer, first to last")
        panels[0, 1].xaxis.set_major_locator(MaxNLocator(integer=True))
        if not logged.empty:
            draw_pairs(panels[0, 2], logged, "step", shown)
            panels[0, 2].set_xlabel("training step")
        number = closeness(distances, *pair)
        claim = f"{print_name(pair[0])} - {print_name(pair[1])}: {number:.2f} of the mean distance of the other pairs"
        figure.suptitle(f"{title}\n{claim}")
        handles, labels = panels[0, 1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
