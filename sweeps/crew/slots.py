"""Which devices and cores this machine lends to workers. Found without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from lda.command import cores
from lda.errors import UsageError


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
    """Visible GPUs as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    if listed.returncode != 0:  # the tool is there, a driver is not
        return []
    return [str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def plan_slots(workers: int | None, threads: int, device: str) -> list[Slot]:
    """The slots of `workers` workers: by default one per GPU, else as many as `threads` each leave cores for.

    `threads` 0 means one on a CPU, and an equal share of the cores beside a GPU. `device` is the setting of the study's
    units: "cpu" leaves the GPUs alone, and "cuda:N" picks one; its worker sees that one alone, as "cuda".

    Raises UsageError for a GPU that is not there.
    """
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
