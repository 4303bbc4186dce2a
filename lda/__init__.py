"""LDA: Latent Distribution Alignment for domain-generalizable person re-identification.

`lda.load(checkpoint)` gives a trained feature extractor: normalised images (B, 3, H, W) -> features (B, D).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lda.method import Method

__version__ = "0.1.0"


def load(checkpoint: str | Path) -> Method:
    """A trained feature extractor: normalised images (B, 3, H, W) -> features (B, D). See `lda.checkpoint.load`."""
    from lda import checkpoint as checkpoints  # imports torch: the command line must start without it

    return checkpoints.load(checkpoint)
