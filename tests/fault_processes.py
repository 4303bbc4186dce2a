"""Faults of processes and machines: killed, asleep, two at once; and configurations that cannot succeed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from contextlib import suppress

from fault_arena import FAULTS, RETRIES, Arena, Play, injected, named, points, training
from studies import REPOSITORY, Command, log_of, wait_for

from lda.files import read_json

_SECOND_MOMENTUM = points(3)["space"]["bank_momentum"]["choices"][1]  # type: ignore[index]


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
    with suppress(ProcessLookupError):  # its coordinator has killed it already: others have its trial
        os.kill(sleeper, signal.SIGCONT)
    wait_for(lambda: sleeper not in command.workers(), 10)  # or it is fenced
    return 1, [command], process.wait(300)


def _works_on(command: Command, pid: int, trial: str) -> bool:
    """Whether the worker has the trial: its slot is in its log's name, its status says the rest."""
    slot = log_of(pid).rsplit("-", 1)[1].removesuffix(".log")
    statuses = [read_json(path) for path in (command.study / "workers").glob(f"*-{slot}.*.json")]
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
    code = two.wait(300)
    return 1, [first, second], max(code, first.run())  # and the first machine, back again, has the whole table too


@named("two machines with disks of their own (PostgreSQL)")
def own_disks(arena: Arena) -> Play:
    """Each trains a part; both must end with the whole table."""
    arena.server()
    first, second = (arena.command(name, search=points(6), spec={"confirm": {"seeds": 1}}) for name in "ab")
    one = first.start()
    wait_for(training(first, 0), process=one)
    two = second.start("--join")
    code = max(one.wait(300), two.wait(300))
    everything = [set(command.results()) for command in (first, second)]
    assert everything[0] == everything[1], everything
    assert "checkpoints of" in first.output + second.output
    return 1, [first, second], code


@named("a second --output on the same database (PostgreSQL)")
def second_output(arena: Arena) -> Play:
    """After the end: not an empty folder and "all done", but the whole study again."""
    arena.server()
    first, second = arena.command("a"), arena.command("b")
    assert first.run() == 0, first.output
    return 1, [first, second], second.run()


@named("a sick machine: every first step raises (PostgreSQL)")
def sick_machine(arena: Arena) -> Play:
    """It fails at once what the healthy one needs minutes for; nothing may be given up, and it says that it stops."""
    arena.server()
    raises = """
        import lda.trainer
        def train_step(self, batch):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        lda.trainer.Trainer.train_step = train_step
    """
    first = arena.command("a", search=points(8))
    second = arena.command("b", search=points(8), environment=injected(arena.folder / "sick", raises))
    one = first.start()
    wait_for(training(first, 0), process=one)
    sick = second.start("--join", "--workers", "2")
    code = one.wait(300)
    assert sick.wait(60) == 1, second.output
    assert "no worker of this machine can work: RuntimeError: CUDA error" in second.output, second.output
    return sum(" failed: RuntimeError" in event for event in second.events()), [first], code


@named("a hang without death")
def hang(arena: Arena) -> Play:
    """The process lives and beats, and makes no step: its trial goes to another worker."""
    marker = arena.folder / "hung"
    hangs = f"""
        import pathlib, time
        import lda.trainer
        step, marker = lda.trainer.Trainer.train_step, pathlib.Path({str(marker)!r})
        def train_step(self, batch):
            if self.step == 5 and not marker.exists():
                marker.touch()
                time.sleep(10**6)
            return step(self, batch)
        lda.trainer.Trainer.train_step = train_step
    """
    command = arena.command(environment=injected(arena.folder / "hangs", hangs), spec={"stall_seconds": 12})
    code = command.run("--workers", "2")
    told = " ".join(command.events())
    assert "no step for" in told, told
    assert "hung and gave its trial away" in told, told
    return 1, [command], code


@named("memory kill of the worker of one trial, twice")
def memory_kill(arena: Arena) -> Play:
    """As the kernel's: SIGKILL in the middle of a step, of whoever works on that trial."""
    marker = arena.folder / "killed"
    kills = f"""
        import os, pathlib, signal
        import lda.trainer
        step, marker = lda.trainer.Trainer.train_step, pathlib.Path({str(marker)!r})
        def train_step(self, batch):
            times = marker.stat().st_size if marker.exists() else 0
            if self.step == 7 and times < 2 and self.method.settings.bank_momentum == {_SECOND_MOMENTUM}:
                with marker.open("ab") as file:
                    file.write(b"x")
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, batch)
        lda.trainer.Trainer.train_step = train_step
    """
    command = arena.command(environment=injected(arena.folder / "kills", kills))
    return 2, [command], command.run("--workers", "2")


@named("clock stepped by hours")
def clock_stepped(arena: Arena) -> Play:
    """Every heartbeat looks two hours old, as after a step of the clock, while its worker works on."""
    command = arena.command()
    process = command.start("--workers", "2")
    for _ in range(2):
        wait_for(training(command, 0, "cuhk03"), process=process)
        connection = sqlite3.connect(command.study / "optuna.db", timeout=60)
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-2 hours')")
        connection.commit()
        connection.close()
        time.sleep(2)
    return 2, [command], process.wait(300)


@named("code changed in mid-study")
def code_changed(arena: Arena) -> Play:
    """The checkout is edited while the study runs: its next workers must not mix; the old code goes on."""
    checkout = arena.folder / "checkout"
    for package in ("lda", "sweeps", "analysis"):
        shutil.copytree(REPOSITORY / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = arena.command(environment={"PYTHONPATH": str(checkout)}, repository=checkout)
    process = command.start()
    wait_for(training(command, 1), process=process)
    edited = checkout / "lda" / "trainer.py"
    before = edited.read_text()
    edited.write_text(before + "\n# another idea\n")
    os.kill(command.workers()[0], signal.SIGKILL)
    assert process.wait(120) == 2, command.output
    assert "the code was changed while the study ran" in command.output, command.output
    assert command.run() == 2, command.output
    assert "was begun with other code" in command.output, command.output
    edited.write_text(before)
    return 2, [command], command.run()


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
    """Kills drawn from a seed on two machines with disks of their own and one PostgreSQL: a worker, a coordinator, or
    everything on a machine; whatever ends a command starts it again.

    The study has more trials than time until the last kill; then it ends with those it has begun.
    """
    draw = random.Random(seed)
    arena.server()
    search = {"sampler": "random", "trials": 100 * count}
    machines = [arena.command(name, search=search) for name in "ab"]
    processes = [machines[0].start()]
    wait_for(training(machines[0], 0), process=processes[0])
    processes.append(machines[1].start("--join"))
    killed = 0
    while killed < count:
        time.sleep(draw.uniform(0.5, 12.0))
        which = draw.randrange(2)
        command, process = machines[which], processes[which]
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
            processes[which] = command.start(*(["--join"] if which else []))
    for command, process in zip(machines, processes, strict=True):
        wait_for(lambda command=command: "Test (" in command.output, process=process)  # type: ignore[misc]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, command.output
    ends = [command.start("--trials", "1") for command in machines]
    code = max(process.wait(600) for process in ends)
    assert set(machines[0].results()) == set(machines[1].results())
    return killed, machines, code
