"""What one training step is given, and which images a method wants in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One training batch of B = P x K images, the K images of an identity side by side.

    Attributes:
        images: (B, 3, H, W) float32 normalised; uint8 if the batches were made without augmentation.
        labels: (B,) int64 identity within its domain.
        domains: (B,) int64 position of the image's domain among the sources; on the CPU, wherever the images are, so
            that a method may read it without waiting for a GPU.
        second: (B, 3, H, W) another augmentation of the same images, for a method whose layout has two views.
        extra: other images, drawn after these by the same rule, for a method whose layout has two batches.
    """

    images: Tensor
    labels: Tensor
    domains: Tensor
    second: Tensor | None = None
    extra: Batch | None = None


@dataclass(frozen=True)
class Layout:
    """Which images a step shows.

    Attributes:
        domains: "one": a step shows one source domain, drawn uniformly; "all": every step shows all of them.
        views: 2 adds a second, independent augmentation of every image (`Batch.second`).
        shares: of the domains in a step that shows all: "equal", or "natural": in proportion to their identities.
        strong: None: the second view is drawn as the first is. A probability: it is drawn by strong augmentation
            (`lda.data.transforms.StrongAugment`), each part of which happens with it.
        batches: 2 adds an independent batch to every step (`Batch.extra`), and doubles the images that a run sees.
        dealt: who chooses a step's identities: the trainer, in passes over all of them, or `Method.identities`.
    """

    domains: Literal["one", "all"] = "all"
    views: Literal[1, 2] = 1
    shares: Literal["equal", "natural"] = "equal"
    strong: float | None = None
    batches: Literal[1, 2] = 1
    dealt: Literal["trainer", "method"] = "trainer"
