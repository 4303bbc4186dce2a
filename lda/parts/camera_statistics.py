"""Batch normalisation by the images of one camera of the target: transductive, so never among the strict results.

Every layer of batch normalisation that the pass goes through takes for its running statistics those of what enters it,

    m <- mean,   V <- unbiased variance      over the images and their positions, (C,) each

where the layers below normalise by their own statistics of the same images: one forward pass in training mode with
momentum 1. Layers of all dimensions, and the BN part of batch-instance normalisation, which is one of them. MDA's
release does so with up to 200 test images of every camera, queries and gallery apart (haoni0812/MDA 57faa14,
evaluator.py); a control for any method, since nothing in it is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lda.settings import Range, Settings, setting


@dataclass(frozen=True, kw_only=True)
class CameraSettings(Settings):
    """Settings of a method that can be tested by camera statistics as a control."""

    camera_statistics: Literal["off", "on"] = setting(
        "off", "on: normalise a test image by statistics of its camera's test images; looks at the target",
        "MDA's release", test=True, later=True,
    )  # fmt: skip
    camera_images: int = setting(
        200, "images of a camera, at most, that camera_statistics takes", "MDA's release", low=2, high=10**4,
        search=Range(10, 1000, log=True), test=True, later=True,
    )  # fmt: skip


def images_of_camera(target: Iterable[tuple[Tensor, Tensor, str]], number: int) -> Tensor:
    """The first `number` of a camera's images, or all that there are, (n, 3, H, W).

    target: batches of (images, camera ids, side) of one camera of one side, as `lda.methods.base.TargetImages`; no more
    of them are taken than are needed. Raises ValueError for images of several cameras or sides, or for none.
    """
    taken: list[Tensor] = []
    groups: set[tuple[int, str]] = set()
    for images, camids, side in target:
        groups |= {(camera, side) for camera in camids.tolist()}
        taken.append(images[: number - sum(map(len, taken))])
        if sum(map(len, taken)) >= number:
            break
    if len(groups) != 1:
        raise ValueError(f"expected images of one camera of one side, got {sorted(groups)}")
    return torch.cat(taken)


@torch.no_grad()
def take_camera_statistics(network: Callable[[Tensor], object], images: Tensor, layers: Iterable[nn.Module]) -> bool:
    """Give the running statistics of all batch normalisations in `layers` those of `images` (n, 3, H, W).

    `network` is what the images pass through, in evaluation mode and at once: memory grows with n. Layers that it does
    not reach, and everything but running statistics, stay as they are. A single image has no variance: nothing is done
    then, and False is returned.
    """
    if len(images) < 2:
        return False
    norms = [m for layer in layers for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        with torch.autocast(images.device.type, enabled=False):
            network(images)
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum
    return True
