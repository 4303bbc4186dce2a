"""The work list: nothing is started twice, lost attempts come back, failures are counted, budgets hold."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from sweeps.list.attempts import UNIT, fault
from sweeps.list.ledger import Budget, Ledger
from sweeps.list.storage import open_storage, storage_url
from sweeps.list.study import create_or_load
from sweeps.plan.space import Axis, distributions

SPACE = distributions({"bank_momentum": Axis(low=0.5, high=0.99)}, "lda")


@pytest.fixture(params=["sqlite", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return storage_url("journal" if request.param == "journal" else None, tmp_path)


def ledger(url: str, trials: int = 3, **options: Any) -> Ledger:
    storage = open_storage(url, 1, 3)
    study = create_or_load(storage, "s", lambda study: None)[0]
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    return Ledger(storage, study, Budget(trials=trials, **{"retries": 2, **options}))


def over(work: Ledger) -> bool:
    """Whether nothing is left to run."""
    return work.budget.exhausted(work.configurations(), time.time())


def test_budget_and_first_points(url: str) -> None:
    work = ledger(url)
    work.enqueue("defaults", {"bank_momentum": 0.9})
    work.enqueue("defaults", {"bank_momentum": 0.9})
    found = []
    while (trial := work.ask(SPACE, "w")) is not None:
        assert not over(work)
        work.study.tell(trial, trial.params["bank_momentum"])
        found.append(trial.params["bank_momentum"])
    assert found[0] == 0.9
    assert len(set(found)) == 3
    assert over(work)
    assert not over(ledger(url, trials=4))  # the budget may grow


def test_a_lost_attempt_comes_back_first_with_its_parameters_and_finished_units(url: str) -> None:
    work = ledger(url)
    trial = work.ask(SPACE, "dead")
    assert trial is not None
    trial.set_user_attr(f"{UNIT}cuhk03", {"unit": "abc", "score": 0.5, "seconds": 7.0})
    assert work.release_worker("someone else", "lost", "gone") == []
    assert work.release_worker("dead", "lost", "gone") == [0]
    assert [configuration.number for configuration in work.requeue()] == [0]
    work.requeue()
    again = work.ask(SPACE, "alive")
    assert again is not None
    assert (again.number, again.params) == (1, trial.params)
    (configuration,) = work.configurations()
    assert (configuration.number, configuration.failures) == (0, 1)
    assert configuration.units["cuhk03"]["unit"] == "abc"
    assert fault(configuration.attempts[0]) == ("lost", "gone")
    work.study.tell(again, 0.5)
    assert len(work.configurations()) == 1  # one configuration, however many attempts


def test_what_was_begun_is_brought_to_an_end_under_a_lower_budget(url: str) -> None:
    """Retries of a proposed trial beyond the new budget were handed back and enqueued again, for ever."""
    work = ledger(url, trials=3)
    begun = [work.ask(SPACE, "dead") for _ in range(3)]
    assert all(begun)
    assert len(work.release_worker("dead", "lost", "gone")) == 3
    lowered = ledger(url, trials=1)
    lowered.requeue()
    for _ in range(3):
        trial = lowered.ask(SPACE, "alive")
        assert trial is not None
        lowered.study.tell(trial, 0.5)
    assert over(lowered)
    assert lowered.requeue() == []


@pytest.mark.parametrize(("kind", "attempts"), [("error", 3), ("lost", 3), ("final", 1), ("interrupted", 6)])
def test_retries_are_counted_by_kind(url: str, kind: Any, attempts: int) -> None:
    work = ledger(url, trials=1)
    for _ in range(6):
        trial = work.ask(SPACE, "w")
        if trial is None:
            break
        work.release(trial.number, kind, "reason")
        work.requeue()
    assert len(work.trials()) == attempts + (kind == "interrupted")
    assert over(work) == (kind != "interrupted")
    assert all(t.state != TrialState.RUNNING for t in work.trials())


def test_what_has_ended_is_not_released(url: str) -> None:
    work = ledger(url)
    trial = work.ask(SPACE, "w")
    assert trial is not None
    work.study.tell(trial, 0.25)
    work.release(trial.number, "lost", "too late")
    assert work.configurations()[0].last.value == 0.25


def test_workers_that_ask_at_the_same_moment_keep_to_the_budget(url: str) -> None:
    """Each of 6 threads with a connection of its own asks for the last 2 places at once."""
    ledgers = [ledger(url, trials=2) for _ in range(6)]
    barrier = threading.Barrier(6)
    taken: list[int] = []

    def ask(work: Ledger) -> None:
        barrier.wait()
        trial = work.ask(SPACE, "w")
        if trial is not None:
            taken.append(trial.number)

    threads = [threading.Thread(target=ask, args=(work,)) for work in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 2
    assert len(ledgers[0].configurations()) == 2


def test_twins_count_once(url: str) -> None:
    """Two coordinators enqueued the same point at the same moment: the later one is given back."""
    work = ledger(url, proposes=False)
    for _ in range(2):
        work.study.enqueue_trial({"bank_momentum": 0.9}, user_attrs={"key": "defaults"})
    first, second = work.ask(SPACE, "a"), work.ask(SPACE, "b")
    assert first is not None
    assert second is None
    work.withdraw_twins()
    assert [trial.state for trial in work.trials()] == [TrialState.RUNNING, TrialState.FAIL]
    (only,) = work.configurations()
    assert only.failures == 0


def test_silent_workers_lose_their_trial(tmp_path: Path) -> None:
    work = ledger(storage_url(None, tmp_path))
    trial = work.ask(SPACE, "silent")
    assert trial is not None
    beat = work.heartbeat(trial.number)
    assert beat is not None
    beat()
    work.reap(3)
    assert work.configurations()[0].last.state == TrialState.RUNNING
    threading.Event().wait(4.5)
    work.reap(3)
    (configuration,) = work.configurations()
    assert configuration.last.state == TrialState.FAIL
    assert "no sign of life" in fault(configuration.last)[1]


def test_an_attempt_nobody_owns_is_taken_back(url: str) -> None:
    """A worker killed between asking and signing leaves neither a name nor a heartbeat."""
    work = ledger(url)
    work.study.ask(SPACE)
    work.reap(60)
    assert work.configurations()[0].last.state == TrialState.RUNNING
    work.reap(0)
    assert work.configurations()[0].last.state == TrialState.FAIL


def test_limits_of_time(url: str) -> None:
    work = ledger(url, trials=9, until=0.0)
    assert work.ask(SPACE, "w") is None
    assert over(work)
    work = ledger(url, trials=9, device_hours=1.0)
    trial = work.ask(SPACE, "w")
    assert trial is not None
    trial.set_user_attr(f"{UNIT}cuhk03", {"seconds": 3601.0})
    work.study.tell(trial, 0.5)
    assert work.ask(SPACE, "w") is None
    assert over(work)


POINTS = [{"bank_momentum": momentum} for momentum in (0.9, 0.8, 0.7)]


def listed(url: str, **options: Any) -> Ledger:
    """A list of three points to which nothing may be added, as a grid's."""
    work = ledger(url, trials=3, proposes=False, **options)
    for index, point in enumerate(POINTS):
        work.enqueue(f"point {index}", point)
    return work


def test_what_is_on_the_list_is_all_where_nothing_is_proposed(url: str) -> None:
    work = listed(url)
    for point in POINTS:
        trial = work.ask(SPACE, "w")
        assert trial is not None
        assert trial.params == point
        work.study.tell(trial, 0.5)
    assert over(work)
    everything = ledger(url, trials=None, proposes=False)
    assert everything.ask(SPACE, "w") is None
    assert over(everything)


@pytest.mark.parametrize("limit", [{"until": 0.0}, {"device_hours": 1.0}], ids=str)
def test_limits_of_time_hold_for_what_is_on_the_list(url: str, limit: dict[str, float]) -> None:
    """Points that wait are not begun once a limit has passed; what was begun is brought to an end; more time, more."""
    work = listed(url)
    first = work.ask(SPACE, "w")
    assert first is not None
    first.set_user_attr(f"{UNIT}cuhk03", {"seconds": 3601.0})
    late = ledger(url, trials=3, proposes=False, **limit)
    assert late.ask(SPACE, "w") is None
    assert not over(late)  # the first runs
    late.release(first.number, "lost", "gone")
    late.requeue()
    assert not over(late)
    again = late.ask(SPACE, "w")
    assert again is not None
    assert again.params == POINTS[0]
    late.study.tell(again, 0.5)
    assert over(late)
    assert late.ask(SPACE, "w") is None
    more = listed(url)
    rest = []
    while (trial := more.ask(SPACE, "w")) is not None:
        more.study.tell(trial, 0.5)
        rest.append(trial.params)
    assert sorted(rest, key=str) == sorted(POINTS[1:], key=str)
    assert over(more)


def test_a_lower_number_of_trials_holds_for_the_list_too(url: str) -> None:
    listed(url)
    work = ledger(url, trials=1, proposes=False)
    trial = work.ask(SPACE, "w")
    assert trial is not None
    assert work.ask(SPACE, "w") is None
    work.study.tell(trial, 0.5)
    assert over(work)
