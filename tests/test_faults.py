"""A study survives every fault of tests/faults.py: nothing finished is lost or run twice, no trial is left RUNNING."""

from __future__ import annotations

from pathlib import Path

import faults
import pytest
from fault_processes import random_kills
from studies import no_leftovers

pytestmark = pytest.mark.chaos

__all__ = ["no_leftovers"]

GIVEN_UP = {"a unit that raises": 1, "a loss that is NaN": 1}
"""Configurations that must fail, being at fault themselves."""


def check(outcome: faults.Outcome) -> None:
    assert (outcome.lost, outcome.twice, outcome.running, outcome.different) == (0, 0, 0, 0)
    assert outcome.finished
    assert outcome.injected > 0


@pytest.mark.parametrize("name", list(faults.FAULTS))
def test_fault(name: str, tmp_path: Path, standin_tiny: Path) -> None:
    try:
        outcome = faults.strike(name, tmp_path, standin_tiny)
    except faults.Skip as reason:
        pytest.skip(str(reason))
    check(outcome)
    assert outcome.failed == GIVEN_UP.get(name, 0)


@pytest.mark.slow
def test_fifty_random_kills(tmp_path: Path, standin_tiny: Path) -> None:
    outcome = faults.strike("kills", tmp_path, standin_tiny, lambda arena: random_kills(arena, 50, seed=0))
    check(outcome)
    assert outcome.injected == 50
