"""Faults of images: packed files and the stand-in damaged between two commands, killed while they are made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from fault_arena import Arena, Play, Skip, injected, named, root, training
from studies import Command, wait_for

from lda.runs import Result, read_unit


def cached(arena: Arena, **options: object) -> Command:
    """A command with a cache of its own."""
    environment = {"LDA_CACHE_DIR": str(arena.folder / "cache"), **options.pop("environment", {})}  # type: ignore[dict-item]
    return arena.command(environment=environment, **options)


def packed(arena: Arena) -> list[Path]:
    return sorted((arena.folder / "cache" / "packed").glob("*.u8"))


def _between_two_commands(arena: Arena, damage: str) -> Play:
    command = cached(arena)
    process = command.start()
    wait_for(training(command, 1), process=process)
    command.kill_everything(process)
    files = packed(arena)
    for file in files:
        size = file.stat().st_size
        if damage == "zeroed":
            file.write_bytes(bytes(size))
        else:
            os.truncate(file, size // 2)
    code = command.run()
    log = next((command.study / "workers").glob("*.log")).read_text()
    assert log.count("packing the images again") >= 1, log
    return len(files), [command], code


@named("packed images zeroed between two commands")
def packed_zeroed(arena: Arena) -> Play:
    return _between_two_commands(arena, "zeroed")


@named("packed images truncated between two commands")
def packed_truncated(arena: Arena) -> Play:
    return _between_two_commands(arena, "truncated")


@named("killed while packing")
def killed_packing(arena: Arena) -> Play:
    marker = arena.folder / "killed"
    kills = f"""
        import os, pathlib, signal
        import lda.data.packed as packed
        write, marker = packed.write_chunk, pathlib.Path({str(marker)!r})
        def write_chunk(chunk):
            done = write(chunk)
            times = marker.stat().st_size if marker.exists() else 0
            if times < 2:
                with marker.open("ab") as file:
                    file.write(b"x")
                os.kill(os.getpid(), signal.SIGKILL)
            return done
        packed.write_chunk = write_chunk
    """
    command = cached(arena, environment=injected(arena.folder / "kills", kills))
    code = command.run()
    left = [path for path in (arena.folder / "cache" / "packed").iterdir() if path.name.startswith(".")]
    assert left == [], left
    return marker.stat().st_size, [command], code


@named("killed while drawing the stand-in")
def killed_drawing(arena: Arena) -> Play:
    cache = arena.folder / "cache"
    command = cached(arena)
    for _ in range(2):
        drawing = subprocess.Popen(
            [sys.executable, "-m", "lda.data.standin", "--scale", "tiny", "--output", str(cache / "standin")],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        wait_for(lambda: any(cache.glob(".standin.tmp-*/*/*")), process=drawing)  # type: ignore[arg-type]
        drawing.send_signal(signal.SIGKILL)
        drawing.wait()
    again = [sys.executable, "-m", "lda.data.standin", "--scale", "tiny", "--output", str(cache / "standin")]
    subprocess.run(again, check=True, capture_output=True)
    assert [path.name for path in cache.iterdir()] == ["standin"], list(cache.iterdir())
    arena.data_root = command.data_root = cache / "standin"
    return 2, [command], command.run()


def _host(name: str) -> tuple[str, ...]:
    """Before a command: it gets process ids and a host name of its own, as containers have."""
    return ("unshare", "--pid", "--fork", "--mount-proc", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh")


@named("two hosts on a fresh shared cache")
def two_hosts(arena: Arena) -> Play:
    """They draw the stand-in at once, and then pack the same images at once."""
    root("namespaces of processes and host names")
    if shutil.which("unshare") is None:
        raise Skip("no unshare command here: install the package util-linux")
    tried = subprocess.run([*_host("host-a"), "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        raise Skip(f"no namespaces here: {tried.stderr.strip()}")
    cache = arena.folder / "cache"
    draw = [sys.executable, "-m", "lda.data.standin", "--scale", "tiny", "--output", str(cache / "standin")]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    hosts = [subprocess.Popen([*_host(name), *draw], **pipes, text=True) for name in ("a", "b")]  # type: ignore[call-overload]
    said = [host.communicate(timeout=240)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert sum(errors.startswith("drawing stand-in tiny") for errors in said) == 1, said
    assert sum(errors.startswith("waiting for another process that is drawing") for errors in said) == 1, said
    assert [path.name for path in cache.iterdir()] == ["standin"], list(cache.iterdir())
    arena.data_root = cache / "standin"
    commands = [cached(arena, name=name, prefix=_host(name)) for name in "ab"]
    codes = [process.wait(300) for process in [command.start() for command in commands]]
    assert [path.name for path in (cache / "packed").iterdir() if path.name.startswith(".")] == []
    first, second = (measured(command) for command in commands)
    assert first == second, (first, second)
    return 2, commands[:1], max(codes)  # two studies: their tables differ in seconds


def measured(command: Command) -> dict[str, dict[str, object]]:
    """Unit -> what its result says of the method, not of the machine."""
    units = [path.parent for path in command.study.glob("trial-*/*/result.json")]
    machine = {"seconds": 0, "images_per_second": 0, "trained_in": ""}
    return {read_unit(unit).unit: {**vars(Result.read(unit)), **machine} for unit in units}
