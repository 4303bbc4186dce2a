"""LDA: Latent Distribution Alignment for domain-generalizable person re-identification, and the methods beside it.

`lda.load(checkpoint)` gives a trained method: called on normalised images (B, 3, H, W) it gives their encodings, and
its `scorer()` says how two of them compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lda.methods.base import Method

__version__ = "0.1.0"


def load(checkpoint: str | Path) -> Method:
    """A trained method: embeds (`method(images)`) and says how encodings compare (`method.scorer()`)."""
    from lda import checkpoint as checkpoints  # imports torch: the command line must start without it

    return checkpoints.load(checkpoint)
