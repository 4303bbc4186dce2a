"""The figure of a study that compares methods, or rows: mAP of each on every unseen target, beside the plain baseline.

Every seed is a dot, so that a reader sees what a mean is made of.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.comparison import AVERAGE, protocol_table, seed_table
from analysis.house_style import new_figure, style
from analysis.study import Study, print_name

_OTHERS = "#0173b2"
_BASELINE = "#d55e00"
_BELOW = 0.26  # of a line, between the mean and its seeds


def draw_methods(axes: Axes, rows: pd.DataFrame, seeds: pd.DataFrame) -> Axes:
    """One target of `protocol_table`, a line per row from the top: mean over seeds, 95% interval, the baseline's value;
    and of `seed_table`, a small dot per seed.

    A method that looked at images of the target has a hollow mark.
    """
    for place, (_, row) in enumerate(rows.iterrows()):
        colour = _BASELINE if row["configuration"] == "baseline" else _OTHERS
        face = "white" if "True" in row["target_data"] else colour
        values = seeds.loc[seeds["label"] == row["label"], "mAP"]
        if len(values) > 1:
            axes.plot(
                values, [place + _BELOW] * len(values), ".", color="0.55", markersize=3.5, zorder=2, label="a seed"
            )
        if not np.isnan(row["mAP_low"]):
            axes.plot([row["mAP_low"], row["mAP_high"]], [place, place], color=colour, linewidth=1.6, zorder=2)
        shape = "D" if row["configuration"] == "baseline" else "o"
        axes.plot(row["mAP"], place, shape, color=colour, markerfacecolor=face, markersize=5, zorder=3)
    for value in rows.loc[rows["configuration"] == "baseline", "mAP"]:
        axes.axvline(value, color=_BASELINE, linewidth=0.8, linestyle="--", zorder=1)
    axes.set_yticks(range(len(rows)), rows["label"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    return axes


def methods_figure(study: Study) -> Figure:
    """A panel per target and one for the average; methods by falling average, rows in the study's order.

    Raises UsageError as the table does.
    """
    table, runs = protocol_table(study), seed_table(study)
    average = table[table["target"] == AVERAGE]
    if not study.record.rows:
        average = average.sort_values("mAP", ascending=False, kind="stable")
    order = average["label"]
    targets = [*study.targets, AVERAGE]
    figure, panels = new_figure(
        1, len(targets), width=2.2 + 1.9 * len(targets), height=max(2.2, 1.2 + 0.24 * len(order))
    )
    with style():
        for axes, target in zip(panels[0], targets, strict=True):
            rows = table[table["target"] == target].set_index("label", drop=False).loc[order]
            draw_methods(axes, rows, runs[runs["target"] == target])
            axes.set_title("Average" if target == AVERAGE else print_name(target))
            axes.set_xlabel("mAP, %")
            if target != targets[0]:
                axes.tick_params(labelleft=False)
        seeds = int(table["seeds"].max())
        interval = ", with 95% bootstrap intervals" if seeds > 1 else ""
        dots = "; small dots: seeds" if seeds > 1 else ""
        figure.suptitle(
            f"Study {study.name} ({study.data} data), mean of {seeds} seed{'s' * (seeds > 1)}{interval}{dots}"
        )
    return figure
