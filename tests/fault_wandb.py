"""Faults of Weights & Biases."""

from __future__ import annotations

import os
import signal

from fault_arena import Arena, Play, named, training
from studies import children_of, wait_for


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
