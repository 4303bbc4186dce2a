"""Faults of disks and files: full, torn, truncated."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fault_arena import STEPS, Arena, Play, Skip, injected, named, root, small_disk, training, unit
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
    def damage(finished: Path, running: Path) -> None:
        path = running / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-7])

    return _damaged_between(arena, damage)


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


def _damaged_between(arena: Arena, damage: Callable[[Path, Path], None]) -> Play:
    """Everything is killed in the second trial; `damage` strikes (a finished unit, the running one); on it goes."""
    command = arena.command()
    process = command.start()
    wait_for(training(command, 1), process=process)
    command.kill_everything(process)
    finished, running = unit(command, 0), unit(command, 1)
    assert finished is not None
    assert running is not None
    damage(finished, running)
    return 1, [command], command.run()


@named("result.json emptied")
def result_emptied(arena: Arena) -> Play:
    return _damaged_between(arena, lambda finished, running: (finished / "result.json").write_bytes(b"") and None)


@named("result.json torn")
def result_torn(arena: Arena) -> Play:
    return _damaged_between(arena, lambda finished, running: os.truncate(finished / "result.json", 100))


@named("a finished unit's folder removed")
def unit_removed(arena: Arena) -> Play:
    return _damaged_between(arena, lambda finished, running: shutil.rmtree(finished))


@named("config.json torn")
def config_torn(arena: Arena) -> Play:
    def damage(finished: Path, running: Path) -> None:
        for folder in (finished, running):
            os.truncate(folder / "config.json", 50)

    return _damaged_between(arena, damage)


@named("checkpoint zeroed")
def checkpoint_zeroed(arena: Arena) -> Play:
    def damage(finished: Path, running: Path) -> None:
        checkpoint = finished / "checkpoint.pt"
        checkpoint.write_bytes(bytes(checkpoint.stat().st_size))
        (running / "checkpoint.pt").write_bytes(bytes(4096))

    return _damaged_between(arena, damage)


@named("a bad line inside metrics.jsonl")
def metrics_bad(arena: Arena) -> Play:
    def damage(finished: Path, running: Path) -> None:
        path = running / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:2], b"\0" * 40 + b"\n", *lines[3:]]))

    return _damaged_between(arena, damage)


@named("buffer_bank.npz torn")
def bank_torn(arena: Arena) -> Play:
    return _damaged_between(arena, lambda finished, running: os.truncate(finished / "buffer_bank.npz", 300))


@named("a dangling link in a unit's place")
def dangling_link(arena: Arena) -> Play:
    def damage(finished: Path, running: Path) -> None:
        shutil.rmtree(running)
        running.symlink_to(arena.folder / "nowhere", target_is_directory=True)

    return _damaged_between(arena, damage)


@named("events.jsonl and a status torn")
def events_torn(arena: Arena) -> Play:
    def damage(finished: Path, running: Path) -> None:
        study = finished.parents[1]
        events = study / "events.jsonl"
        events.write_bytes(events.read_bytes()[:-9])
        (study / "workers" / "elsewhere-0-000000.json").write_bytes(b'{"worker": "else')

    return _damaged_between(arena, damage)


@named("study.json and trial.json emptied")
def study_emptied(arena: Arena) -> Play:
    def damage(finished: Path, running: Path) -> None:
        (finished.parents[1] / "study.json").write_bytes(b"")
        (finished.parent / "trial.json").write_bytes(b"")

    return _damaged_between(arena, damage)


@named("read-only disk for a while")
def read_only(arena: Arena) -> Play:
    """The study's disk is mounted read-only in the middle of a unit, as after an error of its file system: a read-only
    view lies over it, so that files which are open stay writable, and no other can be opened, made or renamed."""
    root("mounting")
    command = arena.command()
    process = command.start()
    for trial in (0, 1):
        wait_for(training(command, trial), process=process)
        folder = str(arena.folder)
        for options in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
            done = subprocess.run(["mount", *options], capture_output=True, text=True)
            if done.returncode != 0:
                raise Skip(f"no mounting here: {done.stderr.strip()}")
        time.sleep(3)
        subprocess.run(["umount", "--lazy", folder], check=True)
    return 2, [command], process.wait(300)


@named("no inodes left for a while")
def no_inodes(arena: Arena) -> Play:
    arena.stack.enter_context(small_disk(arena.folder, mebibytes=400, inodes=1500))
    command = arena.command()
    process = command.start()
    for trial in (0, 1):
        wait_for(training(command, trial), process=process)
        filling = arena.folder / "filling"
        filling.mkdir()
        with suppress(OSError):
            for number in range(2000):
                (filling / str(number)).touch()
        time.sleep(3)
        shutil.rmtree(filling)
    return 2, [command], process.wait(300)


@named("killed inside checkpoint writing")
def killed_writing(arena: Arena) -> Play:
    """SIGKILL between the temporary file and its name, in the checkpoint of the first epoch and of the second."""
    marker = arena.folder / "killed"
    kills = f"""
        import os, pathlib, signal
        replace, marker = os.replace, pathlib.Path({str(marker)!r})
        def killing(source, target, **more):
            times = marker.stat().st_size if marker.exists() else 0
            if str(target).endswith("checkpoint.pt") and times < 2:
                with marker.open("ab") as file:
                    file.write(b"x")
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(source, target, **more)
        os.replace = killing
    """
    command = arena.command(
        base={"epochs": 2, "steps_per_epoch": STEPS // 2}, environment=injected(arena.folder / "kills", kills)
    )
    code = command.run()
    left = list(command.study.glob("trial-*/*/.checkpoint.pt.*"))
    assert left == [], left
    return marker.stat().st_size, [command], code


@named("unsynced writes dropped at a power cut")
def unsynced(arena: Arena) -> Play:
    """What was not synced when everything was killed is cut off or gone, as after a power cut: a record of fsync calls
    says what was."""
    record = arena.folder / "synced"
    record.mkdir()
    tracks = f"""
        import os, pathlib
        fsync, record = os.fsync, pathlib.Path({str(record)!r})
        def recorded(descriptor):
            fsync(descriptor)
            stat = os.fstat(descriptor)
            (record / f"{{stat.st_dev}}-{{stat.st_ino}}").write_text(str(stat.st_size))
        os.fsync = recorded
    """
    command = arena.command(environment=injected(arena.folder / "tracks", tracks))
    process = command.start()
    wait_for(training(command, 1), process=process)
    command.kill_everything(process)
    dropped = 0
    for path in [path for path in command.study.glob("trial-*/*/*") if path.is_file() and path.name != ".lock"]:
        stat = path.stat()
        known = record / f"{stat.st_dev}-{stat.st_ino}"
        kept = int(known.read_text()) if known.exists() else 0
        if kept < stat.st_size:
            dropped += 1
            os.truncate(path, kept)
    finished = list(command.study.glob("trial-*/*/result.json"))
    assert finished
    assert all(path.stat().st_size for path in finished), "a result was recorded before it was on the disk"
    return dropped, [command], command.run()


@named("SIGTERM with 30 s of grace in a long evaluation")
def long_evaluation(arena: Arena) -> Play:
    """As a batch system that takes its machine back: the command ends in time, and loses nothing."""
    marker = arena.folder / "evaluating"
    slow = f"""
        import pathlib, time
        import lda.testing
        rows, marker = lda.testing.Evaluator._encodings, pathlib.Path({str(marker)!r})
        def slowly(self, method, scorer, chosen):
            if not marker.exists():
                marker.touch()
                self._batch = 1
                for _ in range(600):
                    self._check()
                    time.sleep(0.5)
            return rows(self, method, scorer, chosen)
        lda.testing.Evaluator._encodings = slowly
    """
    command = arena.command(environment=injected(arena.folder / "slow", slow))
    process = command.start()
    wait_for(marker.exists, process=process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130, command.output
    (folder,) = command.study.glob("trial-*/*/checkpoint.pt")
    before = folder.stat().st_mtime_ns
    code = command.run()
    assert folder.stat().st_mtime_ns == before  # it was not trained again
    return 1, [command], code
