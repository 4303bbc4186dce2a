"""Faults of Weights & Biases: its process killed, its server stalled, an account without a network."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fault_arena import Arena, Play, named, training
from postgres import free_port
from studies import Command, children_of, wait_for
from wandb_server import Server

KEY = "0123456789" * 4


@named("W&B's process killed")
def wandb_killed(arena: Arena) -> Play:
    command = arena.command(base={"wandb": "offline"})
    process = command.start()
    wait_for(training(command, 0), process=process)
    (worker,) = command.workers()
    services = [pid for pid, name in children_of(worker) if "lda.tracking.child" in name]
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    return len(services), [command], process.wait(300)


def logged_offline(command: Command) -> int:
    """Units with an offline log, which `wandb sync` uploads."""
    return len({path.name.rsplit("-", 2)[-2] for path in command.study.glob("wandb/offline-run-*")})


def _online(arena: Arena, url: str) -> Command:
    account = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "LDA_WANDB_SECONDS": "3"}
    return arena.command(base={"wandb": "online"}, environment=account)


def _ends(command: Command) -> int:
    code = command.run()
    units = len(command.results())
    assert logged_offline(command) >= units, list(command.study.glob("wandb/*"))
    log = next((command.study / "workers").glob("*.log")).read_text()
    assert log.count("logging offline in") == 1, log
    leaked = [p for p in command.study.rglob("*") if p.is_file() and KEY.encode() in Path(p).read_bytes()]
    assert leaked == [], leaked
    return code


@named("W&B's server stalls after login")
def wandb_stalls(arena: Arena) -> Play:
    """Every unit of the worker is logged offline after one wait."""
    with Server(answers=1, then="stall") as server:
        command = _online(arena, server.url)
        return 1, [command], _ends(command)


@named("an account and no network")
def no_network(arena: Arena) -> Play:
    command = _online(arena, f"http://127.0.0.1:{free_port()}")
    return 1, [command], _ends(command)
