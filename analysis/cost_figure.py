"""What accuracy costs: mAP on the average of the unseen targets against training passes, and against passes at test.

    python analysis/cost_figure.py runs/budget --output budget.png

A pass is one through the plain network, see `lda.runs.Cost`. A cost that all have in common gets no panel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analysis.comparison import AVERAGE, protocol_table, seed_table
from analysis.house_style import new_figure, save, style
from analysis.records import tell
from analysis.study import Study, load_study
from lda.arguments import Parser, existing_folder, output_file
from lda.command import exit_code
from lda.errors import UsageError

COSTS = {"passes": "training passes of a run", "test_forwards": "forward passes a test image"}
"""Column -> its name in print."""

_SAME = 1.25  # costs whose largest is below so many times the smallest are one: an epoch has whole numbers of steps
_APART = 1.3  # a cost and the next that has a number of its own below the axis
_COLOURS = ("#d55e00", "#0173b2", "#029e73", "#cc78bc", "#56b4e9", "#949494")
_MARKERS = ("D", "o", "s", "^", "v", "P", "X")


def cost_table(study: Study) -> pd.DataFrame:
    """One row per configuration: label, method (in print), seeds, passes, test_forwards, seconds (a run), mAP with its
    95% interval mAP_low and mAP_high, percent. Raises UsageError as `protocol_table` does."""
    table = protocol_table(study)
    rows = table[table["target"] == AVERAGE].reset_index(drop=True)
    columns = ["label", "method", "seeds", "passes", "test_forwards", "seconds", "mAP", "mAP_low", "mAP_high"]
    return rows.assign(passes=rows["steps"] * rows["train_passes"])[columns]


def differing(table: pd.DataFrame) -> list[str]:
    """The costs of `COSTS` that differ between configurations."""
    return [cost for cost in COSTS if table[cost].max() > _SAME * table[cost].min()]


def draw_cost(axes: Axes, table: pd.DataFrame, seeds: pd.DataFrame, cost: str) -> Axes:
    """Every configuration of `cost_table` over one of its costs; those of one method are joined in the order of the
    cost, where each has its own. `seeds`: `seed_table` of the average, drawn as small dots."""
    for place, (method, rows) in enumerate(table.groupby("method", sort=False)):
        colour, shape = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
        rows = rows.sort_values(cost, kind="stable")
        look = f"{shape}-" if rows[cost].is_unique else shape  # at one cost there is no order to follow
        axes.plot(rows[cost], rows["mAP"], look, color=colour, linewidth=1.2, markersize=5, label=method, zorder=3)
        own = seeds.merge(rows[["label", cost, "seeds"]], on="label")
        own = own[own["seeds"] > 1]
        axes.plot(own[cost], own["mAP"], ".", color=colour, alpha=0.5, markersize=4, zorder=2)
    axes.set_xscale("log", base=2)
    ticks = _ticks(table[cost])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(COSTS[cost])
    return axes


def _ticks(costs: pd.Series) -> list[float]:
    """The costs there are, without those too close to the one before for their numbers to stand apart."""
    kept: list[float] = []
    for cost in sorted(costs.round(2).unique()):
        if not kept or cost >= _APART * kept[-1]:
            kept.append(float(cost))
    return kept


def cost_figure(study: Study) -> Figure:
    """A panel per cost that differs. Raises UsageError where none does, and as `protocol_table` does."""
    table = cost_table(study)
    costs = differing(table)
    if not costs:
        raise UsageError(f"{study.folder}: every configuration costs the same, so there is no cost to draw against")
    runs = seed_table(study)
    methods = table["method"].nunique()
    figure, panels = new_figure(1, len(costs), width=2.6 + 3.2 * len(costs), height=max(3.0, 0.6 + 0.19 * methods))
    with style():
        for axes, cost in zip(panels[0], costs, strict=True):
            draw_cost(axes, table, runs[runs["target"] == AVERAGE], cost)
        panels[0][0].set_ylabel("mAP, average of the unseen targets, %")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper")
        seeds = int(table["seeds"].max())
        dots = "; small dots: seeds" if seeds > 1 else ""
        mean = f"mean of {seeds} seed{'s' * (seeds > 1)}{dots}"
        panels[0][0].set_title(f"Study {study.name} ({study.data} data)\n{mean}", loc="left")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/cost_figure.py STUDY`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _draw(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python analysis/cost_figure.py", description="Draw a study's mAP against what it cost.")
    parser.add_argument("study", type=existing_folder, help="folder of the study, for example runs/budget")
    parser.add_argument("--output", type=output_file, required=True, help="picture to write, .png or .pdf")
    return parser.parse_args(arguments)


def _draw(options: argparse.Namespace) -> None:
    if options.output.suffix not in (".png", ".pdf"):
        raise UsageError(f"--output: expected a name that ends in .png or .pdf, got {str(options.output)!r}")
    study = load_study(options.study)
    tell(study.flaws)
    print(save(cost_figure(study), options.output))


if __name__ == "__main__":
    sys.exit(main())
