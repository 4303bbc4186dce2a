"""What has to be run, what runs, what failed: read from the study's Optuna storage, which is the only work list.

An Optuna trial is one attempt. What is interrupted or fails is enqueued again as a new attempt with the same
parameters; the attempts at the same parameters form a `Configuration`, named by the number of the first. That is what
everything for people calls a trial: trial-0007 is a folder, however many attempts it took.
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
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from lda.config import METHOD
from sweeps.list.storage import turn

Kind = Literal["interrupted", "lost", "error", "final"]
"""Why an attempt ended early: stopped by the user or with the whole study (does not count as a failure), its worker
gone, an exception, or a failure of the configuration itself that a further attempt would only repeat."""

Distributions = dict[str, BaseDistribution] | Callable[[str], dict[str, BaseDistribution]]

UNIT = "unit:"
"""Prefix of the trial attributes that hold the results of finished units."""


@dataclass(frozen=True)
class Configuration:
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
        """Swept settings, those given in advance included: an attempt that waits has no others yet. With the method,
        where several are compared."""
        given = self.last.system_attrs.get("fixed_params", {})
        return {**given_method(self.last.user_attrs), **given, **self.last.params}

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


def configurations(trials: list[FrozenTrial]) -> list[Configuration]:
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
    return [Configuration(tuple(attempts[root])) for root in sorted(attempts)]


@dataclass(frozen=True)
class Budget:
    """How many configurations may be begun, and until when.

    It holds for what the sampler proposes and for what was put on the list in advance alike. What was begun is brought
    to an end, further attempts included, whatever limit has passed meanwhile.

    Attributes:
        trials: configurations in all; None: as many as are on the list.
        retries: further attempts after a failure.
        proposes: whether the sampler adds to the list; that of a grid or a confirmation is complete.
        device_hours: training time in all, summed over devices.
        until: seconds since the epoch after which no configuration is begun.
    """

    trials: int | None
    retries: int
    proposes: bool = True
    device_hours: float | None = None
    until: float | None = None

    def limit(self, known: list[Configuration], at: float) -> str:
        """The limit of the study file that has passed at a time (seconds since the epoch); empty where none has."""
        if self.until is not None and at > self.until:
            return "hours"
        if self.device_hours is not None and device_seconds(known) > 3600 * self.device_hours:
            return "device_hours"
        return ""

    def begins(self, known: list[Configuration], at: float) -> bool:
        """Whether one more configuration may be begun, and there is one."""
        begun = sum(configuration.begun for configuration in known)
        room = self.trials is None or begun < self.trials
        return room and (self.proposes or begun < len(known)) and not self.limit(known, at)

    def exhausted(self, known: list[Configuration], at: float) -> bool:
        """Whether every configuration that was begun has ended and no other may be begun.

        `at` lies before the list was read: what was begun in time by another process is then on it.
        """
        return all(c.ended(self.retries) for c in known if c.begun) and not self.begins(known, at)


def device_seconds(known: list[Configuration]) -> float:
    """Time spent in finished units."""
    return float(sum(unit["seconds"] for configuration in known for unit in configuration.units.values()))


class Ledger:
    """The work list of one Optuna study. Methods that change it are safe to call from anywhere, at any time, twice."""

    def __init__(self, storage: BaseStorage, study: Study, budget: Budget) -> None:
        self.storage, self.study, self.budget = storage, study, budget
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def trials(self) -> list[FrozenTrial]:
        """All attempts."""
        return self.study.get_trials(deepcopy=False)

    def configurations(self) -> list[Configuration]:
        """All configurations."""
        return configurations(self.trials())

    def enqueue(self, key: str, params: Mapping[str, Any], **attributes: Any) -> None:
        """Put a configuration on the list unless one with this key is there.

        A method among `params` becomes an attribute: Optuna's categories cannot grow when another method joins.
        """
        keys = {trial.user_attrs.get("key") for trial in self.trials() if not trial.user_attrs.get("withdrawn")}
        if key not in keys:
            swept = {name: value for name, value in params.items() if name != METHOD.name}
            self.study.enqueue_trial(swept, user_attrs={**attributes, **given_method(params), "key": key})

    def ask(self, distributions: Distributions, worker: str) -> Trial | None:
        """The next attempt, now running for `worker`; None when nothing can be started at the moment.

        distributions: of what the sampler chooses, or, where that depends on the method, a function of its name.
        """
        while True:
            with turn(self.storage):
                if not self._startable():
                    return None
                if callable(distributions):
                    trial = self.study.ask()
                    for name, distribution in distributions(trial.user_attrs[METHOD.name]).items():
                        _suggest(trial, name, distribution)
                else:
                    trial = self.study.ask(distributions)
            trial.set_user_attr("worker", worker)
            if not self._surplus(trial.number):
                return trial
            trial.set_user_attr("withdrawn", True)
            self.study.tell(trial, state=TrialState.FAIL)

    def _startable(self) -> bool:
        """Whether a further attempt waits, or a configuration may be begun."""
        known = self.configurations()
        again = any(c.begun and c.last.state == TrialState.WAITING for c in known)
        return again or self.budget.begins(known, time.time())

    def _surplus(self, number: int) -> bool:
        """Whether an attempt that was just begun is a duplicate, or begins a configuration that the budget has no room
        for: two workers asked at the same moment for the last place, or a limit has passed and only a further attempt
        of another configuration may be started (Optuna hands out what waits by number).

        All see the same numbers, so exactly the later ones step back. Further attempts of a configuration never do: it
        was begun, and is brought to an end also when the budget was lowered meanwhile.
        """
        known = self.configurations()
        mine = next((c for c in known if any(attempt.number == number for attempt in c.attempts)), None)
        if mine is None:
            return True
        if number != mine.number:
            return False
        earlier = sum(c.begun and c.number < mine.number for c in known)
        full = self.budget.trials is not None and earlier >= self.budget.trials
        return full or bool(self.budget.limit(known, time.time()))

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

    def requeue(self) -> list[Configuration]:
        """Enqueue another attempt of everything that failed and may be retried. Returns those configurations."""
        again = [
            c for c in self.configurations() if c.last.state == TrialState.FAIL and not c.given_up(self.budget.retries)
        ]
        for configuration in again:
            last = configuration.last
            inherited = {k: v for k, v in last.user_attrs.items() if k.startswith(UNIT) or k == "job"}
            self.enqueue(f"after-{last.number}", configuration.params, root=configuration.number, **inherited)
        return again

    def heartbeat(self, number: int) -> Callable[[], None] | None:
        """What records a sign of life for a running attempt; None for a journal file, which keeps none."""
        record = getattr(self.storage, "record_heartbeat", None)
        if record is None:
            return None
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        return lambda: record(trial_id)


def given_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entry that names a method, where there is one."""
    return {key: value for key, value in values.items() if key == METHOD.name}


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    """Let the sampler choose, unless the value was given in advance."""
    match distribution:
        case CategoricalDistribution():
            trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log, step=distribution.step)
        case FloatDistribution():
            trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log, step=distribution.step)
        case _:
            raise TypeError(f"{name}: expected a distribution of Optuna's, got {distribution!r}")


def point_key(point: Mapping[str, Any]) -> str:
    """Key of a given point: its content."""
    return json.dumps(point, sort_keys=True)
