"""Faults of the storage: a database that crashes or refuses, a network that is cut, a journal that is torn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fault_arena import Arena, Play, ip, named, namespace, points, training
from postgres import Server
from studies import Command, wait_for

_FOR_A_WHILE = (2.0, 8.0)  # seconds; the grace period of these studies lies between


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


@named("network cut longer than the grace period (PostgreSQL)")
def network_cut(arena: Arena) -> Play:
    """The second machine is a network namespace; its link goes down, its trial is taken over, its link comes back."""
    name, address = arena.stack.enter_context(namespace())
    arena.server()
    assert arena.url is not None
    arena.url = arena.url.replace("127.0.0.1", address)
    many = points(12)  # for the second machine to find work when it is up
    first, second = arena.command("a", search=many), arena.command("b", search=many)
    second.prefix = ("ip", "netns", "exec", name)
    one = first.start()
    wait_for(training(first, 0), process=one)
    two = second.start("--join")
    wait_for(lambda: bool(_begun(second)), process=two)
    (worker,) = second.workers()
    os.kill(worker, signal.SIGSTOP)  # or it may end the trial before the link is down
    cut = _begun(second)[-1]
    ip("netns", "exec", name, "ip", "link", "set", "lda1", "down")
    os.kill(worker, signal.SIGCONT)
    again = f"{cut} will be tried again"
    wait_for(lambda: any(again in event for event in first.events()), 120, one)
    ip("netns", "exec", name, "ip", "link", "set", "lda1", "up")
    return 1, [first, second], max(one.wait(300), two.wait(300))


def _begun(command: Command) -> list[str]:
    """The trials of a machine of which a unit trains."""
    units = [path.parent for path in sorted(command.study.glob("trial-*/*/metrics.jsonl"))]
    return [unit.parent.name for unit in units if not (unit / "result.json").exists()]


# --- a database that refuses -----------------------------------------------------------------------------------------


@named("connection storm")
def connection_storm(arena: Arena) -> Play:
    """Every connection is cut ten times a second for as long as the first two configurations take."""
    server = arena.server()
    arena.url = server.ordinary()
    command = arena.command()
    process = command.start()
    wait_for(training(command, 0), process=process)
    over, cuts = threading.Event(), 0

    def cut() -> None:
        nonlocal cuts
        while not over.wait(0.1):
            server.cut()
            cuts += 1

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        wait_for(training(command, 2), 120, process)
    finally:
        over.set()
        thread.join()
    return cuts, [command], process.wait(300)


def _for_a_while(arena: Arena, begin: Callable[[Server], None], end: Callable[[Server], None]) -> Play:
    """Twice, for less and for more than the grace period."""
    server = arena.server()
    arena.url = server.ordinary()
    command = arena.command()
    process = command.start()
    for trial, seconds in enumerate(_FOR_A_WHILE):
        wait_for(training(command, trial), process=process)
        begin(server)
        time.sleep(seconds)
        end(server)
    return len(_FOR_A_WHILE), [command], process.wait(300)


@named("connection limit reached for a while")
def connection_limit(arena: Arena) -> Play:
    def begin(server: Server) -> None:
        server.sql("ALTER ROLE study CONNECTION LIMIT 0")
        server.cut()

    return _for_a_while(arena, begin, lambda server: server.sql("ALTER ROLE study CONNECTION LIMIT -1"))


@named("database read-only for a while")
def read_only(arena: Arena) -> Play:
    """As after a failover to a standby."""
    reload = "SELECT pg_reload_conf()"

    def begin(server: Server) -> None:
        server.sql("ALTER SYSTEM SET default_transaction_read_only = on", reload)

    return _for_a_while(
        arena, begin, lambda server: server.sql("ALTER SYSTEM RESET default_transaction_read_only", reload)
    )


# --- a journal -------------------------------------------------------------------------------------------------------


def _journal(arena: Arena, tear: Callable[[Path], None]) -> Play:
    """Everything is killed in mid-unit, twice, and the journal torn."""
    arena.url = "journal"
    command = arena.command()
    for trial in (0, 1):
        process = command.start()
        wait_for(training(command, trial), process=process)
        command.kill_everything(process)
        tear(journal_of(command))
    return 2, [command], command.run()


def journal_of(command: Command) -> Path:
    """The journal of a study."""
    return command.study / "optuna-journal.log"


@named("journal: last line torn")
def journal_torn(arena: Arena) -> Play:
    """Half of what was to come next, then half of what was there."""
    torn = []

    def tear(journal: Path) -> None:
        text = journal.read_bytes()
        last = text.splitlines(keepends=True)[-1]
        whole = text if not torn else text[: -len(last)]
        journal.write_bytes(whole + last[: len(last) // 2])
        torn.append(last)

    return _journal(arena, tear)


@named("journal: zeros after a power cut")
def journal_zeros(arena: Arena) -> Play:
    """The file had grown, its last block was never written."""

    def tear(journal: Path) -> None:
        os.truncate(journal, journal.stat().st_size + 4096)

    return _journal(arena, tear)


_HOLD = """
import sys, time
from pathlib import Path
from sweeps.list.journal import Journal
with Journal(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


@named("journal: lock left by a killed process")
def journal_locked(arena: Arena) -> Play:
    """While the study runs, a process is killed that holds the journal's lock."""
    arena.url = "journal"
    command = arena.command()
    process = command.start()
    for trial in (0, 1):
        wait_for(training(command, trial), process=process)
        arguments = [sys.executable, "-c", _HOLD, str(journal_of(command))]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            holder.kill()
    return 2, [command], process.wait(300)
