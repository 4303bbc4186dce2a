"""Where a run computes: device, threads and number format."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from lda.command import cores, openmp_threads
from lda.errors import UsageError
from lda.groups import Machine


def choose_device(machine: Machine) -> torch.device:
    """The configured device; `auto` is the first GPU, else the CPU. Also sets the number of CPU threads.

    Raises UsageError for a device that is not there, and for an OMP_NUM_THREADS that is no number.
    """
    torch.set_num_threads(machine.threads or openmp_threads() or cores())
    name = machine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def forward_context(device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast on a GPU, fp32 on a CPU. Statistics and losses stay in fp32 on both."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()
