"""What has to be run, what runs, what failed: read from the study's Optuna storage, which is the only work list.

An Optuna trial is one attempt. A configuration that is interrupted or fails is enqueued again as a new attempt with the
same parameters; the attempts of one configuration form an `Entry`, named by the number of the first (so is its folder).
Everything here may be done by several processes and machines at once: whatever they enqueue carries a key, and of two
trials with one key only the first counts.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeps.list.storage import turn

Kind = Literal["interrupted", "lost", "error", "final"]
"""Why an attempt ended early: stopped by the user or with the whole study (does not count as a failure), its worker
gone, an exception, or a failure of the configuration itself that a further attempt would only repeat."""

UNIT = "unit:"
"""Prefix of the trial attributes that hold the results of finished units."""


@dataclass(frozen=True)
class Entry:
    """One configuration and its attempts, oldest first."""

    attempts: tuple[FrozenTrial, ...]

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
        """Swept settings, those given in advance included: an attempt that waits has no others yet."""
        return {**self.last.system_attrs.get("fixed_params", {}), **self.last.params}

    @property
    def failures(self) -> int:
        """Attempts that failed, interruptions not counted."""
        return sum(a.state == TrialState.FAIL and fault(a)[0] != "interrupted" for a in self.attempts)

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
        return "lost", "its worker gave no sign of life for longer than grace_seconds"
    return recorded["kind"], recorded["reason"]


def entries(trials: list[FrozenTrial]) -> list[Entry]:
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
    return [Entry(tuple(attempts[root])) for root in sorted(attempts)]


@dataclass(frozen=True)
class Budget:
    """How many configurations may be proposed, and until when.

    Attributes:
        trials: configurations in all.
        retries: further attempts after a failure.
        device_hours: training time in all, summed over devices.
        until: seconds since the epoch after which nothing new is proposed.
    """

    trials: int
    retries: int
    device_hours: float | None = None
    until: float | None = None

    def allows(self, known: list[Entry]) -> bool:
        """Whether one more configuration may be proposed."""
        late = self.until is not None and time.time() > self.until
        return len(known) < self.trials and not late and not self._spent(known)

    def _spent(self, known: list[Entry]) -> bool:
        return self.device_hours is not None and device_seconds(known) > 3600 * self.device_hours

    def exhausted(self, known: list[Entry]) -> bool:
        """Whether every configuration has ended and no more may be proposed."""
        return all(entry.ended(self.retries) for entry in known) and not self.allows(known)


def device_seconds(known: list[Entry]) -> float:
    """Time spent in finished units."""
    return float(sum(unit["seconds"] for entry in known for unit in entry.units.values()))


class Ledger:
    """The work list of one Optuna study. Methods that change it are safe to call from anywhere, at any time, twice."""

    def __init__(self, storage: BaseStorage, study: Study, budget: Budget) -> None:
        self.storage, self.study, self.budget = storage, study, budget
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def trials(self) -> list[FrozenTrial]:
        """All attempts."""
        return self.study.get_trials(deepcopy=False)

    def entries(self) -> list[Entry]:
        """All configurations."""
        return entries(self.trials())

    def finished(self) -> bool:
        """Whether nothing is left to run, here or on another machine."""
        return self.budget.exhausted(self.entries())

    def enqueue(self, key: str, params: Mapping[str, Any], **attributes: Any) -> None:
        """Put a configuration on the list unless one with this key is there."""
        if all(trial.user_attrs.get("key") != key for trial in self.trials()):
            self.study.enqueue_trial(dict(params), user_attrs={**attributes, "key": key})

    def ask(self, distributions: dict[str, BaseDistribution], worker: str) -> Trial | None:
        """The next attempt, now running for `worker`; None when nothing can be started at the moment."""
        with turn(self.storage):
            known = self.entries()
            if not any(entry.last.state == TrialState.WAITING for entry in known) and not self.budget.allows(known):
                return None
            trial = self.study.ask(distributions)
        trial.set_user_attr("worker", worker)
        if self._surplus(trial.number):
            trial.set_user_attr("withdrawn", True)
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        return trial

    def _surplus(self, number: int) -> bool:
        """Whether two workers asked at the same moment for the last place, or a duplicate was drawn.

        All see the same numbers, so exactly the later ones step back. Further attempts of a configuration never do: it
        was begun, and is brought to an end also when the budget was lowered meanwhile.
        """
        known = self.entries()
        mine = next((entry for entry in known if any(attempt.number == number for attempt in entry.attempts)), None)
        if mine is None:
            return True
        proposed = number == mine.number and "key" not in mine.attempts[0].user_attrs
        return proposed and sum(entry.number < mine.number for entry in known) >= self.budget.trials

    def release(self, number: int, kind: Kind, reason: str) -> None:
        """End a running attempt as failed, unless it has ended meanwhile."""
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        try:
            self.storage.set_trial_user_attr(trial_id, "fault", {"kind": kind, "reason": reason})
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # another process was faster

    def release_worker(self, worker: str, kind: Kind, reason: str) -> list[int]:
        """End what a dead worker was running. Returns the attempts' numbers."""
        running = [t for t in self.trials() if t.state == TrialState.RUNNING and t.user_attrs.get("worker") == worker]
        for trial in running:
            self.release(trial.number, kind, reason)
        return [trial.number for trial in running]

    def reap(self, grace_seconds: float) -> None:
        """End attempts whose worker fell silent, on whatever machine it was."""
        optuna.storages.fail_stale_trials(self.study)
        oldest = datetime.now() - timedelta(seconds=grace_seconds)
        for trial in self.trials():
            nobody = trial.state == TrialState.RUNNING and "worker" not in trial.user_attrs
            if nobody and trial.datetime_start is not None and trial.datetime_start < oldest:
                self.release(trial.number, "lost", "its worker died before it began")

    def requeue(self) -> list[Entry]:
        """Enqueue another attempt of everything that failed and may be retried. Returns those entries."""
        again = [e for e in self.entries() if e.last.state == TrialState.FAIL and not e.given_up(self.budget.retries)]
        for entry in again:
            last = entry.last
            inherited = {k: v for k, v in last.user_attrs.items() if k.startswith(UNIT) or k == "job"}
            self.enqueue(f"after-{last.number}", entry.params, root=entry.number, **inherited)
        return again

    def heartbeat(self, number: int) -> Callable[[], None] | None:
        """What records a sign of life for a running attempt; None for a journal file, which keeps none."""
        record = getattr(self.storage, "record_heartbeat", None)
        if record is None:
            return None
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        return lambda: record(trial_id)


def point_key(point: Mapping[str, Any]) -> str:
    """Key of a given point: its content."""
    return json.dumps(point, sort_keys=True)
