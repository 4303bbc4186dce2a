"""What has to be run, what runs, what failed: read from the study's Optuna storage, which is the only work list.

Everything here may be done by several processes and machines at once: whatever they enqueue carries a key, and of two
trials with one key only the first counts.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from lda.config import METHOD
from sweeps.list.attempts import UNIT, Configuration, Kind, configurations, fault, given_method
from sweeps.list.machines import SICK, by_preference, excused, failures_at, slot_of
from sweeps.list.storage import patiently, turn

_OWNING_SECONDS = 60.0  # an attempt that was taken waits so long for the database to note by whom

Distributions = dict[str, BaseDistribution] | Callable[[str], dict[str, BaseDistribution]]


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
        return configurations(self.trials(), excused(self.study.user_attrs))

    def failures_of(self, *slots: str) -> list[list[FrozenTrial]]:
        """Per slot what it failed since it last finished anything, oldest first; nothing that was excused."""
        trials, pardoned = self.trials(), excused(self.study.user_attrs)
        return [failures_at(slot, slot_of, trials, pardoned) for slot in slots]

    def excuse(self, slot: str, failed: Sequence[FrozenTrial]) -> None:
        """Say that these failures were the slot's: they count against no configuration any more."""
        numbers = [attempt.number for attempt in failed]
        self.study.set_user_attr(f"{SICK}{slot}/{numbers[-1]}", {"attempts": numbers, "reason": fault(failed[-1])[1]})

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
                trial = self._taken(worker)
                if trial is None:
                    return None
                # Until it has a worker it is nobody's: a link that is cut here costs a grace period, see `reap`.
                patiently(lambda trial=trial: trial.set_user_attr("worker", worker), _OWNING_SECONDS)  # type: ignore[misc]
                chosen = distributions(trial.user_attrs[METHOD.name]) if callable(distributions) else distributions
                for name, distribution in chosen.items():
                    _suggest(trial, name, distribution)
            if not self._surplus(trial.number):
                return trial
            trial.set_user_attr("withdrawn", True)
            self.study.tell(trial, state=TrialState.FAIL)

    def _taken(self, worker: str) -> Trial | None:
        """An attempt that waited, or a new one that the sampler may fill; nothing of Optuna's own order: a retry goes
        to another worker than the one that failed it, as long as there is one."""
        known = self.configurations()
        begins = self.budget.begins(known, time.time())
        waiting = [c for c in known if c.last.state == TrialState.WAITING and (c.begun or begins)]
        for configuration in by_preference(waiting, known, worker):
            if (trial := self._started(configuration)) is not None:
                return trial
        if self.budget.proposes and begins and all(c.begun for c in waiting):
            return Trial(self._view(), self.storage.create_new_trial(self._study_id))
        return None

    def _started(self, configuration: Configuration) -> Trial | None:
        """Its waiting attempt, now running; None if another process was faster."""
        number = configuration.last.number
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        try:
            started = self.storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            return None
        return Trial(self._view(), trial_id) if started else None

    def _view(self) -> Study:
        """The study without the trials that a `Study` remembers between its own calls of `ask`."""
        return Study(self.study.study_name, self.storage, sampler=self.study.sampler, pruner=self.study.pruner)

    def _surplus(self, number: int) -> bool:
        """Whether an attempt that was just begun is a duplicate, or begins a configuration that the budget has no room
        for: two workers asked at the same moment for the last place, or a limit has passed meanwhile.

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
                self.release(trial.number, "interrupted", "it was taken by nobody: the storage did not answer")

    def withdraw_twins(self) -> None:
        """End what waits and nobody will take: two coordinators enqueued the same thing at the same moment."""
        trials = self.trials()
        listed = {attempt.number for known in configurations(trials) for attempt in known.attempts}
        for twin in (t for t in trials if t.state == TrialState.WAITING and t.number not in listed):
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, twin.number)
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another coordinator was faster
                self.storage.set_trial_user_attr(trial_id, "withdrawn", True)
                self.storage.set_trial_state_values(trial_id, state=TrialState.FAIL)

    def requeue(self) -> list[Configuration]:
        """Enqueue another attempt of everything that failed and may be retried. Returns those configurations."""
        again = [
            c for c in self.configurations() if c.last.state == TrialState.FAIL and not c.given_up(self.budget.retries)
        ]
        for configuration in again:
            self.again(configuration)
        return again

    def again(self, configuration: Configuration, without: Collection[str] = ()) -> None:
        """Enqueue another attempt of what has ended. It need not run the targets that are done, except `without`."""
        last = configuration.last
        lost = [UNIT + target for target in without]
        kept = {k: v for k, v in last.user_attrs.items() if (k.startswith(UNIT) and k not in lost) or k == "job"}
        self.enqueue(f"after-{last.number}", configuration.params, root=configuration.number, **kept)

    def heartbeat(self, number: int) -> Callable[[], None] | None:
        """What records a sign of life for a running attempt; None for a journal file, which keeps none."""
        record = getattr(self.storage, "record_heartbeat", None)
        if record is None:
            return None
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        return lambda: record(trial_id)


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
