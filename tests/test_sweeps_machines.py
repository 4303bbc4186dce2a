"""A retry goes to another worker; a worker that finishes nothing is sick, and its failures are no configuration's."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, Trial, TrialState
from test_sweeps_ledger import SPACE, ledger

from sweeps.list.attempts import UNIT
from sweeps.list.ledger import Ledger
from sweeps.list.machines import host_of, is_sick, slot_of
from sweeps.list.storage import storage_url


@pytest.fixture
def work(tmp_path: Path) -> Ledger:
    return ledger(storage_url(None, tmp_path), trials=4)


def fail(work: Ledger, worker: str) -> int:
    """Take an attempt and fail it. Returns the place of its configuration on the list."""
    trial = work.ask(SPACE, worker)
    assert trial is not None
    work.release(trial.number, "error", "CUDA error")
    work.requeue()
    return place(work, trial)


def failures(work: Ledger) -> list[FrozenTrial]:
    """What the first slot of host a is charged with."""
    return work.failures_of("a-0")[0]


def place(work: Ledger, trial: Trial) -> int:
    """Of an attempt's configuration on the list: their numbers have gaps."""
    return [c.number for c in work.configurations()].index(trial.user_attrs.get("root", trial.number))


def test_a_worker_is_named_by_host_slot_and_chance() -> None:
    assert (slot_of("gpu-box-3-ab12cd"), host_of("gpu-box-3-ab12cd")) == ("gpu-box-3", "gpu-box")


def test_a_retry_waits_for_another_worker_while_there_is_one(work: Ledger) -> None:
    other = work.ask(SPACE, "b-0-000000")
    assert [fail(work, "a-0-000001") for _ in range(3)] == [1, 2, 3]  # never what it has failed
    assert work.ask(SPACE, "a-0-000002") is None  # nothing else is left, and another worker will come
    work.study.tell(other, 0.5)
    taken = work.ask(SPACE, "b-0-000000")
    assert taken is not None
    assert place(work, taken) == 1


def test_alone_a_worker_tries_again_at_once(work: Ledger) -> None:
    assert [fail(work, "a-0-000001") for _ in range(5)] == [0, 0, 0, 1, 1]


def test_who_has_finished_something_may_try_again_what_it_failed_before(work: Ledger) -> None:
    other = work.ask(SPACE, "b-0-000000")
    assert other is not None
    assert fail(work, "a-0-000001") == 1
    good = work.ask(SPACE, "a-0-000002")
    assert good is not None
    work.study.tell(good, 0.5)
    assert fail(work, "a-0-000002") == 1


def test_another_host_comes_before_another_slot_of_the_same(work: Ledger) -> None:
    work.enqueue("first", {"bank_momentum": 0.9})
    work.enqueue("second", {"bank_momentum": 0.8})
    work.enqueue("third", {"bank_momentum": 0.7})
    busy = work.ask(SPACE, "b-1-000001")
    assert busy is not None
    assert place(work, busy) == 0
    assert fail(work, "a-0-000001") == 1
    beside = work.ask(SPACE, "a-1-000001")  # another slot of the host that failed it: something else first
    assert beside is not None
    assert place(work, beside) == 2
    elsewhere = work.ask(SPACE, "b-0-000001")
    assert elsewhere is not None
    assert place(work, elsewhere) == 1


def test_several_configurations_in_a_row_and_nothing_finished_is_the_workers_fault(work: Ledger) -> None:
    for _ in range(4):  # three of the first, which is given up for it, and one of the next
        assert not is_sick(failures(work))
        fail(work, "a-0-000001")
    failed = failures(work)
    assert is_sick(failed)
    work.excuse("a-0", failed)
    assert [c.failures for c in work.configurations()] == [0, 0]
    assert failures(work) == []  # mended and started again, it begins anew


def test_excused_configurations_that_were_given_up_come_back(work: Ledger) -> None:
    for number in range(9):
        fail(work, f"a-0-{number:06}")
    assert [c.given_up(2) for c in work.configurations()].count(True) >= 1
    work.excuse("a-0", failures(work))
    assert not any(c.given_up(2) for c in work.configurations())
    work.requeue()
    assert all(c.last.state == TrialState.WAITING for c in work.configurations())


def test_one_configuration_that_fails_again_and_again_is_at_fault_itself(tmp_path: Path) -> None:
    work = ledger(storage_url(None, tmp_path), trials=1)
    assert [fail(work, "a-0-000001") for _ in range(3)] == [0, 0, 0]
    assert not is_sick(failures(work))
    assert work.configurations()[0].given_up(2)


@pytest.mark.parametrize("how", ["trial", "unit"])
def test_anything_finished_ends_the_row(work: Ledger, how: str) -> None:
    fail(work, "a-0-000001")
    fail(work, "a-0-000002")
    trial = work.ask(SPACE, "a-0-000003")
    assert trial is not None
    if how == "trial":
        work.study.tell(trial, 0.5)
    else:
        trial.set_user_attr(f"{UNIT}cuhk03", {"unit": "abc", "worker": "a-0-000003"})
        work.release(trial.number, "error", "after a unit was finished")
    assert failures(work) == []


def test_silence_is_a_failure_the_third_time_only(work: Ledger) -> None:
    """Optuna ends what no heartbeat was recorded for: an outage of the database is no configuration's fault."""
    for attempt in range(8):
        trial = work.ask(SPACE, f"w{attempt}-0-000000")
        assert trial is not None
        assert trial.user_attrs.get("root", trial.number) == 0
        work.study.tell(trial, state=TrialState.FAIL)
        work.requeue()
    assert work.configurations()[0].failures == 2
    assert not work.configurations()[0].given_up(2)
