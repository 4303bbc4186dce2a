"""Faults of processes and machines: killed, asleep, two at once; and configurations that cannot succeed."""

from __future__ import annotations

import os
import random
import signal
import time

from fault_arena import FAULTS, RETRIES, Arena, Play, named, points, training
from studies import Command, log_of, wait_for

from lda.files import read_json


@named("worker killed in mid-unit")
def worker_killed(arena: Arena) -> Play:
    command = arena.command()
    process = command.start()
    for trial in (0, 1):
        wait_for(training(command, trial), process=process)
        os.kill(command.workers()[0], signal.SIGKILL)
    return 2, [command], process.wait(300)


@named("coordinator killed")
def coordinator_killed(arena: Arena) -> Play:
    command = arena.command()
    for trial in (0, 1):
        process = command.start()
        wait_for(training(command, trial), process=process)
        process.kill()
        process.wait()
        wait_for(lambda: command.workers() == [])
    return 2, [command], command.run()


@named("everything killed at once")
def everything_killed(arena: Arena) -> Play:
    command = arena.command()
    for trial in (0, 1):
        process = command.start("--workers", "2")
        wait_for(training(command, trial, "cuhk03"), process=process)
        command.kill_everything(process)
    return 2, [command], command.run("--workers", "2")


@named("worker asleep longer than the grace period")
def worker_stopped(arena: Arena) -> Play:
    """SIGSTOP; another worker takes the trial over; SIGCONT: the sleeper must not write into it."""
    command = arena.command()
    process = command.start("--workers", "2")
    wait_for(training(command, 0, "cuhk03"), process=process)
    (sleeper,) = [pid for pid in command.workers() if _works_on(command, pid, "trial-0000")]
    os.kill(sleeper, signal.SIGSTOP)
    wait_for(lambda: any("trial-0000 will be tried again" in event for event in command.events()), process=process)
    wait_for(lambda: sum("trial-0000 started" in event for event in command.events()) == 2, 120, process)
    os.kill(sleeper, signal.SIGCONT)
    wait_for(lambda: sleeper not in command.workers(), 10)  # fenced
    return 1, [command], process.wait(300)


def _works_on(command: Command, pid: int, trial: str) -> bool:
    """Whether the worker has the trial: its slot is in its log's name, its status says the rest."""
    slot = log_of(pid).rsplit("-", 1)[1].removesuffix(".log")
    statuses = [read_json(path) for path in (command.study / "workers").glob(f"*-{slot}-*.json")]
    return any(status.get("trial") == trial for status in statuses)


def _two_at_once(arena: Arena) -> Play:
    command = arena.command()
    first = command.start()
    second = command.start()
    codes = [process.wait(300) for process in (first, second)]
    return 1, [command], max(codes)


FAULTS["two coordinators at once on a fresh sqlite"] = _two_at_once


@named("two coordinators at once on a fresh PostgreSQL")
def two_at_once_postgresql(arena: Arena) -> Play:
    arena.server()
    return _two_at_once(arena)


@named("joined machine, first one killed (PostgreSQL)")
def machine_killed(arena: Arena) -> Play:
    arena.server()
    many = points(12)  # for the second machine to find work when it is up
    first, second = arena.command("a", search=many), arena.command("b", search=many)
    one = first.start("--workers", "2")
    wait_for(training(first, 0), process=one)
    two = second.start("--join")
    wait_for(lambda: bool(list(second.study.glob("trial-*/*/config.json"))), process=two)
    first.kill_everything(one)
    return 1, [first, second], two.wait(300)


@named("a unit that raises")
def unit_raises(arena: Arena) -> Play:
    """A file stands where a unit's folder must be: every attempt at that trial raises."""
    command = arena.command()
    obstacle = command.study / "trial-0001" / "market1501-s0"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    return 1 + RETRIES, [command], command.run()


@named("a loss that is NaN")
def loss_nan(arena: Arena) -> Play:
    space = {"learning_rate": {"low": 0.0001, "high": 10.0, "log": True}}
    bad = {"trials": 2, "space": space, "enqueue": [{"learning_rate": 10.0}]}
    command = arena.command(search=bad, base={"optimizer": "sgd", "steps_per_epoch": 200})
    return 1, [command], command.run()


def random_kills(arena: Arena, count: int, seed: int) -> Play:
    """Kills drawn from a seed: a worker, the coordinator, or everything; whatever ends the command starts it again.

    The study has more trials than time until the last kill; then it ends with those it has begun.
    """
    draw = random.Random(seed)
    command = arena.command(search={"sampler": "random", "trials": 100 * count})
    process = command.start("--workers", "2")
    killed = 0
    while killed < count:
        time.sleep(draw.uniform(0.5, 12.0))
        assert process.poll() is None, command.output
        victim = draw.choice(["worker", "worker", "coordinator", "everything"])
        workers = command.workers()
        if victim == "everything":
            command.kill_everything(process)
        elif victim == "coordinator":
            process.kill()
            process.wait()
        elif workers:
            os.kill(draw.choice(workers), signal.SIGKILL)
        else:
            continue
        killed += 1
        if process.poll() is not None:
            process = command.start("--workers", "2")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, command.output
    return killed, [command], command.run("--workers", "2", "--trials", "1")
