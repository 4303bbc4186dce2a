"""Checkpoints: everything a run needs to go on exactly, in one file that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import torch

from lda import methods
from lda.config import Config, from_mapping
from lda.errors import DamagedError, UsageError
from lda.files import atomic, damage_of_zip
from lda.methods.base import Method

_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `step` training steps.

    Attributes:
        unit, training: hashes, see `lda.config`: what the result is called, and what was learnt.
        sources: the source domains, in order; num_ids: identities of each.
        seconds: wall-clock time spent on the unit so far.
        method, optimizer: state dicts.
        trained_in: folder of the unit that did the training, "" for this one.
        rows: of metrics.jsonl before this step; None: an older version did not say.
    """

    unit: str
    training: str
    config: Config
    sources: tuple[str, ...]
    num_ids: tuple[int, ...]
    step: int
    seconds: float
    method: dict[str, Any]
    optimizer: dict[str, Any]
    trained_in: str = ""
    rows: int | None = None

    @property
    def complete(self) -> bool:
        """Whether the training it belongs to is over."""
        return self.step == self.config.schedule.total_steps

    def save(self, path: Path) -> None:
        """Write atomically: a run killed meanwhile keeps its previous checkpoint. Raises the disk's own OSError."""
        content = {**vars(self), "format": _FORMAT, "config": self.config.to_dict()}
        with atomic(path, "wb") as file:
            sink = _Sink(file)
            try:
                torch.save(content, cast(IO[bytes], sink))
            except RuntimeError:
                if sink.error is not None:
                    raise sink.error from None
                raise


class _Sink:
    """A file that remembers what ended a write, the disk or a signal: torch makes a RuntimeError of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def read_checkpoint(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint. Raises DamagedError when it is missing or damaged, UsageError when not of this version."""
    if not path.is_file():
        raise DamagedError(f"checkpoint {str(path)!r} is not a file; a run writes it as <run folder>/checkpoint.pt")
    if reason := damage_of_zip(path):
        raise DamagedError(f"checkpoint {str(path)!r} cannot be read ({reason}); it may be truncated")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):  # the file is not to blame, and must not be given up
        raise
    except Exception as error:  # torch raises half a dozen types for a file that is no checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"checkpoint {str(path)!r} cannot be read ({reason}); it may be truncated") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != _FORMAT:
        whose = f"was written by an older version (format {found})" if isinstance(found, int) else "is none of ours"
        raise UsageError(f"checkpoint {str(path)!r} {whose}; this version reads format {_FORMAT}")
    try:
        return Checkpoint(**{**content, "config": from_mapping(content["config"])})
    except (KeyError, TypeError) as error:
        raise UsageError(f"checkpoint {str(path)!r} is of another version of this software ({error})") from None


def load_method(checkpoint: Checkpoint, config: Config | None = None) -> Method:
    """The trained method in evaluation mode, on the CPU, under its own settings or those of `config`."""
    config = (config or checkpoint.config).replace(pretrained="none")
    method = methods.build(config.method, replace(config.setup(checkpoint.num_ids), fresh=False))
    method.load_state_dict(checkpoint.method)
    return method.eval()


def load(checkpoint: str | Path) -> Method:
    """A trained method: called on normalised images (B, 3, H, W) it gives their encodings. See `lda.load`."""
    return load_method(read_checkpoint(Path(checkpoint)))
