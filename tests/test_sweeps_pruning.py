"""Pruning on the running mean of differences to the defaults."""

from __future__ import annotations

import optuna
import pytest

from sweeps.plan.pruning import build_pruner, running_mean
from sweeps.plan.spec import Pruning

TARGETS = ("cuhk03", "msmt17", "market1501")
EASY = {"cuhk03": 0.9, "msmt17": 0.2, "market1501": 0.6}


def test_running_mean() -> None:
    assert running_mean(TARGETS, {}, EASY) is None
    assert running_mean(TARGETS, {"cuhk03": 0.8}, EASY) == pytest.approx(-0.1)
    assert running_mean(TARGETS, {"cuhk03": 0.8, "msmt17": 0.4}, EASY) == pytest.approx(0.05)
    assert running_mean(TARGETS, {"cuhk03": 0.8, "msmt17": 0.4}, {"cuhk03": 0.9}) is None


def trial_of(study: optuna.Study, offset: float, epochs: int) -> tuple[bool, int]:
    """A trial `offset` above the defaults on every target. Returns (pruned, units run)."""
    trial = study.ask()
    scores: dict[str, float] = {}
    for index, target in enumerate(TARGETS):
        scores[target] = EASY[target] + offset
        value = running_mean(TARGETS, scores, EASY)
        assert value is not None
        trial.report(value, (index + 1) * epochs)
        if trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return True, index + 1
    study.tell(trial, offset)
    return False, len(TARGETS)


def test_a_trial_below_the_median_ends_after_its_warmup_units() -> None:
    study = optuna.create_study(
        direction="maximize", pruner=build_pruner(Pruning(startup_trials=3, warmup_units=2), 10)
    )
    assert [trial_of(study, offset, 10) for offset in (0.0, 0.1, 0.2)] == [(False, 3)] * 3
    assert trial_of(study, -0.1, 10) == (True, 2)  # both targets of the warm-up, and not the third
    assert trial_of(study, 0.3, 10) == (False, 3)


def test_no_pruning() -> None:
    study = optuna.create_study(direction="maximize", pruner=build_pruner(Pruning(rule="none", startup_trials=0), 10))
    assert all(trial_of(study, offset, 10) == (False, 3) for offset in (0.0, 0.1, -0.5))
