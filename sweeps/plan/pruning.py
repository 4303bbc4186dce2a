"""Stopping trials that trail, where a trial is few units and its targets differ in difficulty.

A trial's units run in one order. After every unit, and at every source validation within one, the trial reports the
running mean, over its units so far, of (score - score of the defaults on that target); Optuna's percentile rule then
compares it with what other trials reported at the same step. While a score of the defaults is missing, because that
trial still runs elsewhere, nothing is judged.

The Wilcoxon rule is not offered: it pairs trials unit by unit, and with 3 or 4 units its smallest reachable p-value
(.125, .0625) is above or near every sensible threshold.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from optuna.pruners import BasePruner, NopPruner, PercentilePruner

from sweeps.plan.spec import Pruning


class PrunedError(Exception):
    """The trial trails the others: it ends here, as pruned."""


def build_pruner(pruning: Pruning, epochs: int) -> BasePruner:
    """The study's rule. A step is an epoch of a unit, counted through all units of the trial."""
    if pruning.rule == "none":
        return NopPruner()
    return PercentilePruner(
        pruning.percentile, n_startup_trials=pruning.startup_trials, n_warmup_steps=pruning.warmup_units * epochs
    )


def running_mean(targets: Sequence[str], scores: Mapping[str, float], defaults: Mapping[str, float]) -> float | None:
    """Mean of (score - the defaults' score) over the targets scored so far; None while one of the latter is missing."""
    scored = [target for target in targets if target in scores]
    if not scored or any(target not in defaults for target in scored):
        return None
    return statistics.fmean(scores[target] - defaults[target] for target in scored)
