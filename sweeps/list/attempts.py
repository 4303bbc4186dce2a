"""What the storage knows of a study: attempts, and the configurations that they are attempts at.

An Optuna trial is one attempt. What is interrupted or fails is enqueued again as a new attempt with the same
parameters; the attempts at the same parameters form a `Configuration`, named by the number of the first. That is what
everything for people calls a trial: trial-0007 is a folder, however many attempts it took.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from lda.config import METHOD

Kind = Literal["interrupted", "silent", "lost", "error", "final"]
"""Why an attempt ended early: stopped by the user, with the whole study, or by its machine (no failure); no sign of
life for longer than the grace period (its machine, its network or its database: the third counts as a failure); its
worker gone; an exception; or a failure of the configuration itself that a further attempt would only repeat."""

_SILENT = 3  # silences that count as one failure: an outage is no fault of a configuration, but one may freeze machines

UNIT = "unit:"
"""Prefix of the trial attributes that hold the results of finished units."""


@dataclass(frozen=True)
class Configuration:
    """One configuration and its attempts, oldest first."""

    attempts: tuple[FrozenTrial, ...]
    excused: frozenset[int] = frozenset()
    """Numbers of attempts that a sick machine failed; see `sweeps.list.machines`."""

    @property
    def number(self) -> int:
        """Number of the configuration: that of its first attempt."""
        return self.attempts[0].number

    @property
    def last(self) -> FrozenTrial:
        """The newest attempt."""
        return self.attempts[-1]

    @property
    def params(self) -> dict[str, Any]:
        """Swept settings, those given in advance included: an attempt that waits has no others yet. With the method,
        where several are compared."""
        given = self.last.system_attrs.get("fixed_params", {})
        return {**given_method(self.last.user_attrs), **given, **self.last.params}

    @property
    def failures(self) -> int:
        """Attempts that failed through what may be the configuration's fault."""
        failed = [a for a in self.attempts if a.state == TrialState.FAIL and a.number not in self.excused]
        kinds = [fault(attempt)[0] for attempt in failed]
        return sum(kind in ("lost", "error", "final") for kind in kinds) + kinds.count("silent") // _SILENT

    @property
    def begun(self) -> bool:
        """Whether any attempt was ever started."""
        return self.last.state != TrialState.WAITING or len(self.attempts) > 1

    @property
    def units(self) -> dict[str, dict[str, Any]]:
        """Target -> the recorded result of its finished unit."""
        attributes = self.last.user_attrs
        return {key.removeprefix(UNIT): value for key, value in attributes.items() if key.startswith(UNIT)}

    def given_up(self, retries: int) -> bool:
        """Whether the configuration failed for good."""
        failed = self.last.state == TrialState.FAIL
        return failed and (fault(self.last)[0] == "final" or self.failures > retries)

    def ended(self, retries: int) -> bool:
        """Whether nothing more will happen to the configuration."""
        return self.last.state in (TrialState.COMPLETE, TrialState.PRUNED) or self.given_up(retries)


def fault(attempt: FrozenTrial) -> tuple[Kind, str]:
    """(kind, reason) of an attempt that failed."""
    recorded = attempt.user_attrs.get("fault")
    if recorded is None:  # failed by Optuna, which leaves no room for a reason
        return "silent", "its worker gave no sign of life for longer than grace_seconds"
    return recorded["kind"], recorded["reason"]


def configurations(trials: list[FrozenTrial], excused: Collection[int] = ()) -> list[Configuration]:
    """The configurations among `trials`, by number; duplicates and trials given back at once are left out."""
    keys: set[str] = set()
    attempts: dict[int, list[FrozenTrial]] = defaultdict(list)
    for trial in sorted(trials, key=lambda trial: trial.number):
        key = trial.user_attrs.get("key")
        if trial.user_attrs.get("withdrawn") or key in keys:
            continue
        if key is not None:
            keys.add(key)
        attempts[trial.user_attrs.get("root", trial.number)].append(trial)
    return [Configuration(tuple(attempts[root]), frozenset(excused)) for root in sorted(attempts)]


def given_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entry that names a method, where there is one."""
    return {key: value for key, value in values.items() if key == METHOD.name}
