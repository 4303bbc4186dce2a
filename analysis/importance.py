"""How much each swept setting matters for the selection score: what the sweep wrote when the study ended, as a figure.

Optuna is the sweep's; here its numbers are only read, from importance.json (see sweeps/finish.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from analysis.house_style import new_figure, style
from analysis.study import Study
from lda.errors import UsageError
from lda.runs import read_record

IMPORTANCE = "importance.json"

_COLOURS = ("#0173b2", "#d55e00")


@dataclass(frozen=True)
class Importance:
    """What importance.json says: how many complete trials were looked at, and evaluator -> setting -> share of 1."""

    trials: int
    evaluators: dict[str, dict[str, float]]


def read_importance(study: Study) -> Importance | None:
    """None where there is none: too few trials, a comparison, or an older study."""
    path = study.folder / IMPORTANCE
    if not path.exists():
        return None
    try:
        return read_record(path, Importance)
    except UsageError:
        return None


def importances(study: Study) -> pd.DataFrame:
    """setting, evaluator, share, trials; empty without importance.json."""
    found = read_importance(study)
    rows = [
        {"setting": setting, "evaluator": evaluator, "share": share, "trials": found.trials}
        for evaluator, shares in (found.evaluators if found else {}).items()
        for setting, share in shares.items()
        if found
    ]
    return pd.DataFrame(rows, columns=["setting", "evaluator", "share", "trials"])


def importance_figure(study: Study) -> Figure | None:
    """Bars by setting, a colour per evaluator; None where nothing is known."""
    table = importances(study)
    if table.empty:
        return None
    wide = table.pivot(index="setting", columns="evaluator", values="share")
    wide = wide.loc[wide.mean(axis=1).sort_values().index]
    figure, panels = new_figure(1, 1, width=6.0, height=1.4 + 0.4 * len(wide))
    with style():
        axes = panels[0, 0]
        height = 0.8 / len(wide.columns)
        for place, evaluator in enumerate(wide.columns):
            at = [row + (place - (len(wide.columns) - 1) / 2) * height for row in range(len(wide))]
            axes.barh(at, wide[evaluator], height=height, color=_COLOURS[place % 2], label=str(evaluator))
        axes.set_yticks(range(len(wide)), list(map(str, wide.index)))
        axes.set_xlabel("share")
        axes.set_xlim(0, 1)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")
        n = int(table["trials"].iloc[0])
        figure.suptitle(f"Study {study.name} ({study.data} data): importance of settings, n = {n} trials")
    return figure
