"""Where a run computes: device, threads and number format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from lda.command import cores, openmp_threads
from lda.errors import FailedError, UsageError
from lda.groups import Machine

_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch's on a CPU, a RuntimeError


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


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Within it, memory that runs out is one line that says what needs less. Raises FailedError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        ours = isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error)
        if not ours:
            raise
        raise FailedError(
            f"out of memory on {device}: fewer or smaller images in a batch (ids_per_batch, images_per_id, "
            "image_height, image_width), or a smaller backbone, need less"
        ) from error
