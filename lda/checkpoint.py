"""Checkpoints: everything a run needs to go on exactly, in one file that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lda.config import Config, from_mapping
from lda.errors import UsageError
from lda.files import atomic
from lda.method import Method, build_method

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `step` gradient steps.

    Attributes:
        num_ids: identities per source domain, in the order of `sources`.
        seconds: wall-clock time spent on the unit so far.
        method, optimizer: state dicts.
        trained_in: folder name of the unit that did the training, "" for this one.
    """

    unit: str
    config: Config
    sources: tuple[str, ...]
    num_ids: tuple[int, ...]
    step: int
    seconds: float
    method: dict[str, Any]
    optimizer: dict[str, Any]
    trained_in: str = ""

    def save(self, path: Path) -> None:
        """Write atomically: a run killed meanwhile keeps its previous checkpoint."""
        content = {**vars(self), "format": _FORMAT, "config": self.config.to_dict()}
        with atomic(path, "wb") as file:
            torch.save(content, file)


def read_checkpoint(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint. Raises UsageError when it is missing, damaged or not one of ours."""
    if not path.is_file():
        raise UsageError(f"checkpoint {str(path)!r} is not a file; a run writes it as <run folder>/checkpoint.pt")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file that is damaged or no checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"checkpoint {str(path)!r} cannot be read ({reason}); it may be truncated") from error
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise UsageError(f"checkpoint {str(path)!r} is not of format {_FORMAT}: it was not written by this version")
    return Checkpoint(**{**content, "config": from_mapping(content["config"])})


def load_method(checkpoint: Checkpoint) -> Method:
    """The trained method in evaluation mode, on the CPU."""
    method = build_method(checkpoint.config.replace(pretrained="none"), checkpoint.num_ids)
    method.load_state_dict(checkpoint.method)
    return method.eval()


def load(checkpoint: str | Path) -> Method:
    """A trained feature extractor: normalised images (B, 3, H, W) -> features (B, D). `lda.load` in a notebook."""
    return load_method(read_checkpoint(Path(checkpoint)))
