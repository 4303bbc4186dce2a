"""Faults of disks and files: full, torn, truncated."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from fault_arena import STEPS, Arena, Play, named, small_disk, training, unit
from studies import wait_for


@named("disk full while a unit writes")
def disk_full(arena: Arena) -> Play:
    """The study lies on a small file system that is filled up for a while, twice."""
    arena.stack.enter_context(small_disk(arena.folder, mebibytes=200))
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
