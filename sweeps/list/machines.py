"""Which machine failed what: retries go elsewhere, and a worker that finishes nothing is sick, not its configurations.

A worker's id is host-slot-random: a slot is the place that a command gives to one worker of its machine (a GPU, a
core), whatever process holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sweeps.list.attempts import UNIT, Configuration, fault

SICK = "sick:"
"""Prefix of the study attributes that name the attempts a sick slot failed."""

FAILURES_IN_A_ROW = 3
"""Of at least two configurations, and nothing finished: it is the slot."""


def slot_of(worker: str) -> str:
    """The slot of a worker's id."""
    return worker.rpartition("-")[0] or worker


def host_of(worker: str) -> str:
    """The host of a worker's id."""
    return slot_of(worker).rpartition("-")[0] or worker


def works_at(attempt: FrozenTrial, worker: str) -> bool:
    """Whether an attempt is, or was, run in the slot of a worker."""
    return slot_of(_worker(attempt)) == slot_of(worker)


def excused(study: Mapping[str, Any]) -> frozenset[int]:
    """Numbers of the attempts that sick slots failed, from a study's attributes."""
    return frozenset(number for key, sick in study.items() if key.startswith(SICK) for number in sick["attempts"])


def failures_at(
    place: str, place_of: Callable[[str], str], attempts: Sequence[FrozenTrial], excused: Collection[int] = ()
) -> list[FrozenTrial]:
    """What failed at a slot or host (`place_of` tells it from a worker's id) since anything was finished there."""
    there = [a for a in attempts if a.state.is_finished() and place_of(_worker(a)) == place]
    failed: list[FrozenTrial] = []
    for attempt in sorted(there, key=lambda attempt: (attempt.datetime_complete, attempt.number)):
        if _finished_something(attempt):
            failed = []
        elif _failed(attempt) and attempt.number not in excused:
            failed.append(attempt)
    return failed


def is_sick(failed: Sequence[FrozenTrial]) -> bool:
    """Whether `failures_at` a slot are its own. A single configuration may be at fault, however often it fails."""
    return len(failed) >= FAILURES_IN_A_ROW and len({a.user_attrs.get("root", a.number) for a in failed}) > 1


def by_preference(waiting: Sequence[Configuration], known: Sequence[Configuration], worker: str) -> list[Configuration]:
    """What a worker may take, best first: by number, but last what its host failed since it last finished anything.

    What its own slot failed is left to others, as long as anything runs elsewhere; alone it tries again at once.
    """
    if not any(c.last.state == TrialState.RUNNING and not works_at(c.last, worker) for c in known):
        return sorted(waiting, key=lambda c: c.number)
    attempts = [attempt for configuration in known for attempt in configuration.attempts]
    by_slot = {a.number for a in failures_at(slot_of(worker), slot_of, attempts)}
    by_host = {a.number for a in failures_at(host_of(worker), host_of, attempts)}

    def failed(configuration: Configuration, where: set[int]) -> bool:
        return any(attempt.number in where for attempt in configuration.attempts)

    return sorted((c for c in waiting if not failed(c, by_slot)), key=lambda c: (failed(c, by_host), c.number))


def _worker(attempt: FrozenTrial) -> str:
    return str(attempt.user_attrs.get("worker", ""))


def _failed(attempt: FrozenTrial) -> bool:
    withdrawn = attempt.user_attrs.get("withdrawn", False)
    return attempt.state == TrialState.FAIL and not withdrawn and fault(attempt)[0] in ("error", "lost")


def _finished_something(attempt: FrozenTrial) -> bool:
    """Whether an attempt ended well, or finished a unit itself before it failed."""
    if attempt.state in (TrialState.COMPLETE, TrialState.PRUNED):
        return True
    units = (value for key, value in attempt.user_attrs.items() if key.startswith(UNIT))
    return any(unit.get("worker") == _worker(attempt) for unit in units)
