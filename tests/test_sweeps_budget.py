"""What a dry run says is what runs, and limits end a search; real studies on the tiny stand-in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from studies import Command, no_leftovers

from sweeps.list.attempts import Configuration, configurations
from sweeps.list.storage import open_storage, storage_url

__all__ = ["no_leftovers"]

GRID = {
    "sampler": "grid",
    "trials": 9,
    "space": {"bank_momentum": {"choices": [0.9, 0.6]}, "gem_p": {"choices": [3, 1]}},
}


OTHER = {"space": {"gem_p": {"low": 1, "high": 5}}}


def held(command: Command) -> tuple[list[Configuration], list[Configuration]]:
    """The search and the confirmation in the study's storage."""
    storage = open_storage(storage_url(None, command.study), 60, 180)
    names = optuna.study.get_all_study_names(storage)
    assert set(names) <= {"mine", "mine-confirm"}
    search, confirm = (
        configurations(optuna.load_study(study_name=name, storage=storage).get_trials()) if name in names else []
        for name in ("mine", "mine-confirm")
    )
    return search, confirm


def announced(command: Command, *options: str) -> tuple[int, int, int, str]:
    """(trials, confirmation runs, units, what is compared) that a dry run prints."""
    assert command.run("--dry-run", *options) == 0, command.output
    trials = re.search(r"^search +(\d+) trials?", command.output, re.M)
    confirm = re.search(r"^confirm +(?:(\d+) runs: (.*); seeds|none)", command.output, re.M)
    units = re.search(r"^units +(\d+) \(one per target\)", command.output, re.M)
    assert trials is not None
    assert confirm is not None
    assert units is not None
    return int(trials[1]), int(confirm[1] or 0), int(units[1]), confirm[2] or ""


@dataclass(frozen=True)
class Expected:
    """A study, and what is to be announced and to run."""

    search: dict[str, Any]
    top: int
    options: list[str]
    targets: list[str]
    numbers: tuple[int, int, int]
    compared: str


EXPECTED = {
    "defaults": Expected({}, 5, [], ["cuhk03"], (2, 3, 5), "baseline, defaults, top 1"),
    "baseline": Expected(OTHER, 1, ["--set", "method=baseline"], ["cuhk03"], (2, 2, 4), "defaults, top 1"),
    "grid": Expected(GRID, 2, [], ["cuhk03"], (4, 4, 8), "baseline, defaults, top 1, top 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_dry_run_says_is_what_runs(tmp_path: Path, standin_tiny: Path, name: str) -> None:
    """A study of the baseline ends whole too, without a row for another baseline and without a warning."""
    study = EXPECTED[name]
    spec = {"targets": study.targets, "confirm": {"top": study.top, "seeds": 1}}
    command = Command(tmp_path, standin_tiny, spec=spec, search=study.search)
    assert announced(command, *study.options) == (*study.numbers, study.compared)
    assert not command.study.exists()
    assert command.run("--workers", "2", *study.options) == 0, command.output
    assert "warning" not in command.output
    searched, confirmed = held(command)
    trials, confirmations, units = study.numbers
    assert (len(searched), len(confirmed)) == (trials, confirmations)
    assert sum(len(configuration.units) for configuration in searched + confirmed) == units
    assert len(command.results()) == units
    assert f"{trials} of {trials} trials (0 pruned, 0 failed" in command.output
    assert f"confirmed {confirmations} of {confirmations}" in command.output
    assert (command.study / "trial-baseline").exists() == ("baseline" in study.compared)


@pytest.mark.slow
def test_training_time_ends_a_grid_and_what_is_complete_is_confirmed(tmp_path: Path, standin_tiny: Path) -> None:
    """The defaults use up the limit; the three points that wait are left, until the limit is lifted."""
    spec = {"targets": ["cuhk03"], "confirm": {"top": 1, "seeds": 1}}
    command = Command(tmp_path, standin_tiny, spec=spec, search={**GRID, "device_hours": 1e-6})
    assert command.run("--dry-run") == 0
    assert "no trial is begun after 1e-06 hours of training" in command.output
    assert "units      7 at most" in command.output
    assert command.run() == 0, command.output
    assert "the search ends at its limit of device_hours: 3 of 4 trials were not begun" in command.output
    assert "1 of 4 trials (0 pruned, 0 failed, 0 retried), confirmed 2 of 2" in command.output
    searched, confirmed = held(command)
    assert [configuration.begun for configuration in searched] == [True, False, False, False]
    assert {path.split("/")[0] for path in command.results()} == {"trial-0000", "trial-baseline"}
    assert len(confirmed) == 2

    more = Command(tmp_path, standin_tiny, spec=spec, search=GRID)
    assert more.run("--workers", "2") == 0, more.output
    assert "4 of 4 trials (0 pruned, 0 failed, 0 retried), confirmed 3 of 3" in more.output


@pytest.mark.slow
def test_the_wall_clock_ends_a_grid(tmp_path: Path, standin_tiny: Path) -> None:
    """It passes before a worker is up: nothing is begun, and the command ends instead of waiting for it."""
    command = Command(tmp_path, standin_tiny, search={**GRID, "hours": 1e-6})
    assert command.run() == 1, command.output
    assert "the search ends at its limit of hours: 4 of 4 trials were not begun" in command.output
    assert command.output.count("ends at its limit") == 1
    assert command.results() == {}
