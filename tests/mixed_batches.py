"""Methods with the stand-in's settings and batches of three domains, for the tests of single methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lda import methods
from lda.batch import Batch
from lda.config import preset
from lda.methods.base import Method

NUM_IDS = (5, 7, 6)


def build(method: str, num_ids: tuple[int, ...] = NUM_IDS, **changes: Any) -> Method:
    """A method in training mode; the weights that two methods share are the same."""
    config = preset("standin", method=method, **changes)
    return methods.build(config.method, config.setup(num_ids)).train()


def mixed_batch(seed: int = 0) -> Batch:
    """Twelve images, two of every identity, two identities of every domain."""
    images = torch.randn(12, 3, 64, 32, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 1, 0, 3, 2, 4]).repeat_interleave(2)
    return Batch(images, labels, torch.tensor([0, 1, 2]).repeat_interleave(4))


def gradients(method: Method) -> dict[str, Tensor]:
    """Name -> gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def shaken(method: Method) -> Method:
    """The method with random gammas and betas: at 1 and 0, a layer that forgets them would not be seen."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=random))
    return method
