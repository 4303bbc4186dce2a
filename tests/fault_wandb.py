"""Faults of Weights & Biases."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import wandb_server
from fault_arena import Arena, Play, named, training
from studies import Command, children_of, wait_for

KEY = "k" * 40
START = 3  # requests until a run has begun


def exported(command: Command) -> int:
    """Finished units whose every logged row is in one offline log, as `wandb sync` will upload it."""
    found = 0
    for result in command.study.glob("trial-*/*/result.json"):
        rows = [json.loads(line) for line in (result.parent / "metrics.jsonl").read_text().splitlines()]
        unit = json.loads(result.read_text())["unit"]
        logs = [steps(log) for log in command.study.glob(f"wandb/offline-run-*/run-{unit}*.wandb")]
        found += {row["step"] for row in rows} in logs
    return found


def steps(log: os.PathLike[str]) -> set[int]:
    """Of the rows in a run's offline log."""
    inspect = [os.path.join(os.path.dirname(sys.executable), "wandb"), "leet", "inspect", os.fspath(log), "--json"]
    done = subprocess.run(inspect, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return {item["step"] for item in items if "step" in item}


def ended(command: Command, code: int) -> int:
    """0 when the study ended as it should and W&B lacks nothing."""
    return code if exported(command) == len(command.results()) > 0 else 1


@named("W&B's process killed")
def wandb_killed(arena: Arena) -> Play:
    command = arena.command(base={"wandb": "offline"})
    process = command.start()
    wait_for(training(command, 0), process=process)
    (worker,) = command.workers()
    services = [pid for pid, name in children_of(worker) if "wandb-core" in name]
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    return len(services), [command], ended(command, process.wait(300))


@named("W&B's server stalls after login")
def wandb_stalls(arena: Arena) -> Play:
    server = arena.stack.enter_context(wandb_server.Server(START, "stall"))
    command = online(arena, server.url)
    code = command.run()
    return int(server.requests > START), [command], ended(command, code)


@named("a W&B account and no network")
def no_network(arena: Arena) -> Play:
    command = online(arena, "http://127.0.0.1:9")
    return 1, [command], ended(command, command.run())


def online(arena: Arena, url: str) -> Command:
    """A study whose user is logged in there."""
    account = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "LDA_WANDB_SECONDS": "5", "WANDB_MODE": "online"}
    return arena.command(base={"wandb": "auto"}, environment=account)
