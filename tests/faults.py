"""What a study survives: real studies on the tiny stand-in with faults injected, and what each cost.

    python tests/faults.py [--fault NAME ...] [--kills N] [--output reports/faults.md]

Every fault runs a study of real training to its end. A watcher notes when each unit's result.json appears and whether
it ever changes or vanishes afterwards; metrics.jsonl must hold every step exactly once; the study's storage is read at
the end. tests/test_faults.py asserts the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import optuna
from optuna.trial import TrialState
from postgres import Server, binaries
from studies import Command, children_of, log_of, wait_for

from lda.files import read_json
from lda.runs import environment
from sweeps.list.ledger import Configuration, configurations, fault
from sweeps.list.storage import open_storage, storage_url

STEPS = 40
RETRIES = 2


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        injected: how often the fault struck.
        lost: finished units whose result vanished.
        twice: finished units whose result was written again, or whose metrics hold a step twice.
        running: trials left RUNNING in the storage.
        finished: whether every configuration ended and the last command exited as it should.
        failed: configurations given up, each with a reason.
        retried: attempts beyond the first of a configuration.
    """

    fault: str
    injected: int
    lost: int
    twice: int
    running: int
    finished: bool
    failed: int
    retried: int
    seconds: float


class Skip(Exception):  # noqa: N818
    """This machine cannot inject the fault; the text says why."""


class Watch:
    """Notes every change of every finished unit 20 times a second."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Path, tuple[int, int]] = {}
        self.twice: set[Path] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._done.wait(0.05):
            self._look()

    def _look(self) -> None:
        for path in self._folder.glob("*/runs/mine/trial-*/*/result.json"):
            state = path.stat()
            now = (state.st_ino, state.st_mtime_ns)
            if self._seen.setdefault(path, now) != now:
                self.twice.add(path)

    @property
    def lost(self) -> set[Path]:
        """Results that were there once."""
        return {path for path in self._seen if not path.exists()}


@dataclass
class Arena:
    """Where a fault plays: one or two machines (folders), one storage. `stack` is what to undo when all is examined."""

    folder: Path
    data_root: Path
    stack: ExitStack
    url: str | None = None

    def command(self, name: str = "a", **options: object) -> Command:
        """A command of machine `name`."""
        (self.folder / name).mkdir()
        spec = {"search": {"trials": 3}, **options}
        base = {"steps_per_epoch": STEPS, **spec.pop("base", {})}  # type: ignore[dict-item]
        environment = {"LDA_STORAGE": self.url} if self.url else {}
        return Command(self.folder / name, self.data_root, base=base, environment=environment, **spec)  # type: ignore[arg-type]

    def server(self) -> Server:
        """A PostgreSQL server for the fault's studies."""
        if binaries() is None:
            raise Skip("no PostgreSQL here: install the package postgresql")
        server = Server()
        self.stack.callback(server.remove)
        self.url = server.url
        return server


Play = tuple[int, list[Command], int]
"""(times injected, the machines' commands, last exit code) of a study run with a fault."""

FAULTS: dict[str, Callable[[Arena], Play]] = {}


def named(name: str) -> Callable[[Callable[[Arena], Play]], Callable[[Arena], Play]]:
    """Enter a fault in the table under this name."""

    def enter(function: Callable[[Arena], Play]) -> Callable[[Arena], Play]:
        FAULTS[name] = function
        return function

    return enter


def unit(command: Command, index: int, target: str = "market1501") -> Path | None:
    """A unit's folder by its trial's place among the trials, whose numbers have gaps; None before it starts."""
    found = sorted(path.parent for path in command.study.glob(f"trial-*/{target}-s0/metrics.jsonl"))
    return found[index] if len(found) > index else None


def training(command: Command, index: int, target: str = "market1501", steps: int = 5) -> Callable[[], bool]:
    """Holds once that unit has trained a few steps."""

    def holds() -> bool:
        folder = unit(command, index, target)
        return folder is not None and (folder / "metrics.jsonl").read_bytes().count(b"\n") >= steps

    return holds


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


@named("PostgreSQL crashed and restarted")
def postgresql_restarted(arena: Arena) -> Play:
    server = arena.server()
    command = arena.command()
    process = command.start()
    for trial in (0, 1):
        wait_for(training(command, trial), process=process)
        server.stop()
        time.sleep(2)
        server.start()
    return 2, [command], process.wait(300)


@named("joined machine, first one killed (PostgreSQL)")
def machine_killed(arena: Arena) -> Play:
    arena.server()
    many = {"trials": 12}  # for the second machine to find work when it is up
    first, second = arena.command("a", search=many), arena.command("b", search=many)
    one = first.start("--workers", "2")
    wait_for(training(first, 0), process=one)
    two = second.start("--join")
    wait_for(lambda: bool(list(second.study.glob("trial-*/*/config.json"))), process=two)
    first.kill_everything(one)
    return 1, [first, second], two.wait(300)


@named("network cut longer than the grace period (PostgreSQL)")
def network_cut(arena: Arena) -> Play:
    """The second machine is a network namespace; its link goes down, its trial is taken over, its link comes back."""
    name, address = arena.stack.enter_context(_namespace())
    arena.server()
    assert arena.url is not None
    arena.url = arena.url.replace("127.0.0.1", address)
    many = {"trials": 12}  # for the second machine to find work when it is up
    first, second = arena.command("a", search=many), arena.command("b", search=many)
    second.prefix = ("ip", "netns", "exec", name)
    one = first.start()
    wait_for(training(first, 0), process=one)
    two = second.start("--join")
    wait_for(lambda: bool(list(second.study.glob("trial-*/*/metrics.jsonl"))), process=two)
    (cut,) = {path.parts[-3] for path in second.study.glob("trial-*/*/metrics.jsonl")}
    _ip("netns", "exec", name, "ip", "link", "set", "lda1", "down")
    again = f"{cut} will be tried again"
    wait_for(lambda: any(again in event for event in first.events()), 120, one)
    _ip("netns", "exec", name, "ip", "link", "set", "lda1", "up")
    return 1, [first, second], max(one.wait(300), two.wait(300))


@named("disk full while a unit writes")
def disk_full(arena: Arena) -> Play:
    """The study lies on a small file system that is filled up for a while, twice."""
    arena.stack.enter_context(_small_disk(arena.folder, mebibytes=200))
    command = arena.command()
    process = command.start()
    for trial in (0, 1):
        wait_for(training(command, trial), process=process)
        filling = arena.folder / "filling"
        with filling.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(65536))
        time.sleep(2.5)
        filling.unlink()
    return 2, [command], process.wait(300)


@named("last line of metrics.jsonl half written")
def metrics_cut(arena: Arena) -> Play:
    command = arena.command()
    process = command.start()
    wait_for(training(command, 1), process=process)
    command.kill_everything(process)
    folder = unit(command, 1)
    assert folder is not None
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    return 1, [command], command.run()


@named("checkpoint truncated")
def checkpoint_cut(arena: Arena) -> Play:
    command = arena.command(base={"epochs": 4, "steps_per_epoch": STEPS // 4})
    process = command.start()
    wait_for(training(command, 1, steps=STEPS // 4 + 2), process=process)
    command.kill_everything(process)
    folder = unit(command, 1)
    assert folder is not None
    checkpoint = folder / "checkpoint.pt"
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    return 1, [command], command.run()


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


@named("W&B's process killed")
def wandb_killed(arena: Arena) -> Play:
    command = arena.command(base={"wandb": "offline"})
    process = command.start()
    wait_for(training(command, 0), process=process)
    (worker,) = command.workers()
    services = [pid for pid, name in children_of(worker) if "wandb-core" in name]
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    return len(services), [command], process.wait(300)


def random_kills(arena: Arena, count: int, seed: int) -> Play:
    """Kills drawn from a seed: a worker, the coordinator, or everything; whatever ends the command starts it again.

    The study has more trials than time until the last kill; then it ends with those it has begun.
    """
    draw = random.Random(seed)
    command = arena.command(search={"trials": 100 * count})
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


# --- what the faults need --------------------------------------------------------------------------------------------


def _root(what: str) -> None:
    if os.getuid() != 0:
        raise Skip(f"{what} needs root")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def _namespace() -> Iterator[tuple[str, str]]:
    """A network namespace linked to this one. Yields its name and this side's address."""
    _root("a network namespace")
    if shutil.which("ip") is None:
        raise Skip("no ip command here: install the package iproute2")
    name = f"lda-{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        raise Skip(f"no network namespaces here: {error.stderr.strip()}") from None
    try:
        _ip("link", "add", "lda0", "type", "veth", "peer", "name", "lda1", "netns", name)
        _ip("addr", "add", "10.213.77.1/24", "dev", "lda0")
        _ip("link", "set", "lda0", "up")
        for command in (["addr", "add", "10.213.77.2/24", "dev", "lda1"], ["link", "set", "lda1", "up"]):
            _ip("netns", "exec", name, "ip", *command)
        _ip("netns", "exec", name, "ip", "link", "set", "lo", "up")
        yield name, "10.213.77.1"
    finally:
        _ip("netns", "delete", name)


@contextmanager
def _small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    _root("mounting a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        raise Skip(f"no mounting here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- what came of it -------------------------------------------------------------------------------------------------


def strike(name: str, folder: Path, data_root: Path, play: Callable[[Arena], Play] | None = None) -> Outcome:
    """Run one fault in an empty folder. Raises Skip where this machine cannot."""
    began = time.monotonic()
    with ExitStack() as stack:
        arena = Arena(folder, data_root, stack)
        with Watch(folder) as watch:
            injected, commands, code = (play or FAULTS[name])(arena)
        known = _entries(arena, commands[0])
        ended = all(configuration.ended(RETRIES) for configuration in known)
        given_up = [configuration for configuration in known if configuration.given_up(RETRIES)]
        assert all(fault(configuration.last)[1] for configuration in given_up)
        return Outcome(
            fault=name,
            injected=injected,
            lost=len(watch.lost),
            twice=len(watch.twice | {path for command in commands for path in _repeated(command.study)}),
            running=sum(a.state == TrialState.RUNNING for configuration in known for a in configuration.attempts),
            finished=ended and code == 0,
            failed=len(given_up),
            retried=sum(len(configuration.attempts) - 1 for configuration in known),
            seconds=time.monotonic() - began,
        )


def _entries(arena: Arena, command: Command) -> list[Configuration]:
    storage = open_storage(storage_url(arena.url, command.study), 60, 180)
    return [
        configuration
        for name in optuna.study.get_all_study_names(storage)
        for configuration in configurations(optuna.load_study(study_name=name, storage=storage).get_trials())
    ]


def _repeated(study: Path) -> set[Path]:
    """Finished units whose metrics do not hold every step exactly once."""
    wrong = set()
    for result in study.glob("trial-*/*/result.json"):
        rows = [json.loads(line) for line in (result.parent / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "lr" in row]
        if steps != list(range(1, read_json(result)["steps"] + 1)):
            wrong.add(result)
    return wrong


def table(outcomes: Sequence[Outcome], skipped: dict[str, str]) -> str:
    """Markdown."""
    lines = [
        "| fault | injected | finished units lost | run twice | trials left RUNNING | study finished "
        "| configurations given up | retries | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        cells = [
            o.injected,
            o.lost,
            o.twice,
            o.running,
            "yes" if o.finished else "NO",
            o.failed,
            o.retried,
            f"{o.seconds:.0f}",
        ]
        lines.append(f"| {o.fault} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines + [f"| {name} | not run: {reason} |" for name, reason in skipped.items()]) + "\n"


_REPORT = """# What a study survives

Every row is a study of real training (tiny stand-in, the small network) into which a fault was injected, run to its end
by the commands a user would type. Regenerate, as root on Linux with PostgreSQL installed:

```bash
{command}
```

Injected: how often the fault struck. Lost: finished units whose result vanished. Run twice: finished units whose result
was written again, or whose metrics hold a step twice. Left RUNNING: trials in the storage after the end. Given up:
configurations that failed for good, each with its reason: a unit that raises and a loss that is NaN are configurations
that cannot succeed, and random kills may strike the workers of one configuration three times. Retries: attempts beyond
the first.

{table}
Run on {date}, commit {commit}, {cores} CPU cores, optuna {optuna}, torch {torch}; the random kills draw their times and
victims (a worker, the coordinator, everything) from the seed.
"""


def report(text: str) -> str:
    """The kept page around the table."""
    machine = environment("cpu")
    versions = machine["versions"]
    command = shlex.join(["python", *sys.argv])
    facts = {"commit": machine["commit"][:7], "optuna": versions["optuna"], "torch": versions["torch"]}
    return _REPORT.format(command=command, table=text, date=f"{date.today()}", cores=os.cpu_count(), **facts)


def main() -> None:
    """Run faults and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fault", nargs="+", default=list(FAULTS), choices=list(FAULTS), metavar="NAME")
    parser.add_argument("--kills", type=int, default=0, help="also so many random kills of one study")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    parser.add_argument("--output", type=Path, help="file of the table (default: print it)")
    given = parser.parse_args()
    plays = {name: FAULTS[name] for name in given.fault}
    if given.kills:
        plays[f"{given.kills} random kills, seed {given.seed}"] = lambda arena: random_kills(
            arena, given.kills, given.seed
        )
    outcomes, skipped = [], {}
    with tempfile.TemporaryDirectory(prefix="lda-faults-") as scratch:
        os.environ["LDA_CACHE_DIR"] = str(Path(scratch) / "cache")
        from lda.data.standin.tree import generate

        generate(Path(scratch) / "standin", "tiny", processes=1)
        for index, (name, play) in enumerate(plays.items()):
            folder = Path(scratch) / str(index)
            folder.mkdir()
            try:
                outcomes.append(strike(name, folder, Path(scratch) / "standin", play))
                print(table(outcomes[-1:], {}).splitlines()[-1], flush=True)
            except Skip as reason:
                skipped[name] = str(reason)
    text = table(outcomes, skipped)
    if given.output:
        given.output.write_text(report(text))
    print(text)


if __name__ == "__main__":
    sys.exit(main())
