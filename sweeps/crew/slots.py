"""Which devices and cores this machine lends to workers. Found without importing torch."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lda.command import cores
from lda.errors import UsageError

_SMI_SECONDS = 30
_DEVICES = Path("/dev")
_NOT_LISTED = ("dxg", "nvhost-gpu", "kfd")  # devices of GPUs that nvidia-smi may not list: WSL's, small boards', AMD's
_MOST_PER_CORE = 16


@dataclass(frozen=True)
class Slot:
    """Place of one worker.

    Attributes:
        index: 0-based on this machine.
        gpu: what CUDA_VISIBLE_DEVICES of the worker says; empty for a CPU.
        threads: CPU threads of a unit.
    """

    index: int
    gpu: str
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables that must be set before the worker imports torch."""
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        return {**threads, "CUDA_VISIBLE_DEVICES": self.gpu}


def gpus() -> list[str]:
    """Visible GPUs as CUDA_VISIBLE_DEVICES names them; one line on stderr where it names others than are there."""
    visible, there = os.environ.get("CUDA_VISIBLE_DEVICES"), _hardware()
    if visible is None:
        return [str(index) for index in range(there.count)]
    named = [name.strip() for name in visible.split(",") if name.strip()]
    if there.count == 0 and any((_DEVICES / name).exists() for name in _NOT_LISTED):
        return named
    found = list(itertools.takewhile(there.has, named))  # as CUDA does: after a wrong name all others are invisible
    if len(found) < len(named) and (wrong := named[len(found)]) != "-1":
        used = f"{', '.join(found)} used" if found else "the CPU is used"
        lacks = f"{wrong!r} is not there, this machine has {there.count} GPU(s)"
        print(f"CUDA_VISIBLE_DEVICES={visible}: {lacks}; {used}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class _Hardware:
    """What is built in: how many GPUs, and the UUIDs of these and of their MIG parts, as far as they can be listed."""

    count: int
    uuids: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether CUDA would find what an entry of CUDA_VISIBLE_DEVICES names: an index, or the beginning of a UUID."""
        if name.isdecimal():
            return int(name) < self.count
        kind = name.partition("-")[0]
        alike = [uuid for uuid in self.uuids if uuid.startswith(f"{kind}-")]
        if name.startswith("MIG-GPU-") or not alike:  # the older names of parts, and what nothing lists
            return self.count > 0 and kind in ("GPU", "MIG")
        return any(uuid.startswith(name) for uuid in alike)


def _hardware() -> _Hardware:
    """By nvidia-smi, which lists UUIDs; without it by the driver's devices, of which a container sees its own."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", errors="replace", timeout=_SMI_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):  # not there, or stuck with its driver
        return _Hardware(sum(path.name[6:].isdecimal() for path in _DEVICES.glob("nvidia[0-9]*")))
    if listed.returncode != 0:  # the tool is there, a driver is not
        return _Hardware(0)
    lines = listed.stdout.splitlines()
    return _Hardware(
        sum(line.startswith("GPU ") for line in lines), tuple(re.findall(r"\(UUID: ([^)]+)\)", listed.stdout))
    )


def plan_slots(workers: int | None, threads: int, device: str) -> list[Slot]:
    """The slots of `workers` workers: by default one per GPU, else as many as `threads` each leave cores for.

    `threads` 0 means one on a CPU, and an equal share of the cores beside a GPU. `device` is the setting of the study's
    units: "cpu" leaves the GPUs alone, and "cuda:N" picks one; its worker sees that one alone, as "cuda".

    Raises UsageError for a GPU that is not there, and for more workers than the machine can start.
    """
    if workers is not None and workers > (most := _MOST_PER_CORE * max(4, cores())):
        raise UsageError(
            f"--workers: expected {most} at most, got {workers}: each is a process with its own copy of torch (about "
            f"0.5 GB), and this machine lends {cores()} core(s)"
        )
    found = [] if device == "cpu" else gpus()
    kind, _, number = device.partition(":")
    if kind == "cuda" and (not found or (number and not (number.isdigit() and int(number) < len(found)))):
        raise UsageError(f"device: {device!r} is not there; this machine has {len(found)} CUDA device(s)")
    if number:
        found = [found[int(number)]]
    if found:
        count = workers or len(found)
        share = threads or max(1, cores() // count)
        return [Slot(index, found[index % len(found)], share) for index in range(count)]
    threads = threads or 1
    return [Slot(index, "", threads) for index in range(workers or max(1, cores() // threads))]
