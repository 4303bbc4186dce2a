"""A memory of one unit vector per identity, which takes the place of a classifier's weights and has no gradient.

Shapes: N identities of all sources, N_k those of domain k, one domain's rows after the other; D feature size; b images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(vectors: Tensor) -> Tensor:
    """(b, D) to length one, in fp32; a vector shorter than 1e-6 stays shorter than one.

    Not `F.normalize`: that one's second derivative is nan at zero, where a batch of equal images begins.
    """
    vectors = vectors.float()
    return vectors * vectors.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()


class IdentityMemory(nn.Module):
    """One unit row per identity of every domain; an image is compared with those of its own domain only.

    Args:
        num_ids: identities of each domain.
        size: D.
        momentum: m of `update`, share of the old row.
        temperature: tau of `loss`.

    Attributes:
        rows: (N, D), of length one; zero where nothing was seen.
        seen: (N,) bool, which rows hold something.
    """

    def __init__(self, num_ids: Sequence[int], size: int, momentum: float, temperature: float) -> None:
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self._starts = [0, *accumulate(num_ids)]
        self.register_buffer("rows", torch.zeros(sum(num_ids), size))
        self.register_buffer("seen", torch.zeros(sum(num_ids), dtype=torch.bool))
        self.rows: Tensor
        self.seen: Tensor

    def loss(self, vectors: Tensor, labels: Tensor, domain: int) -> Tensor:
        """Mean of CE(M_k z / tau, y) over the images of one domain; rows without content are no candidates.

        vectors: z (b, D) of length one. labels: y (b,) within the domain. An image whose own row has no content is left
        out; without any other image the loss is 0.
        """
        there = slice(self._starts[domain], self._starts[domain + 1])
        seen = self.seen[there]
        with torch.autocast(vectors.device.type, enabled=False):
            logits = F.linear(vectors.float(), self.rows[there]) / self.temperature
            own = torch.arange(len(seen), device=seen.device) == labels[:, None]
            losses = F.cross_entropy(logits.masked_fill(~(seen | own), -torch.inf), labels, reduction="none")
            known = seen[labels].to(losses.dtype)
            return (losses * known).sum() / known.sum().clamp_min(1.0)

    @torch.no_grad()
    def update(self, vectors: Tensor, labels: Tensor, domain: int) -> None:
        """M[y] <- unit(m M[y] + (1 - m) z), image by image in their order; what an identity is first seen with is
        copied instead, unit(mean of its z in these images).

        vectors: z (b, D) of length one. labels: y (b,) within the domain.
        """
        rows, vectors = labels + self._starts[domain], vectors.float()
        known = self.seen[rows]
        with torch.autocast(vectors.device.type, enabled=False):
            first = unit((labels[:, None] == labels).to(vectors.dtype) @ vectors)
        for i in range(len(rows)):  # no number leaves the GPU
            row = rows[i : i + 1]
            moved = unit(self.momentum * self.rows[row] + (1.0 - self.momentum) * vectors[i : i + 1])
            self.rows[row] = torch.where(known[i], moved, first[i : i + 1])
        self.seen[rows] = True

    @torch.no_grad()
    def fill(self, passed: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Begin anew: every row the direction of its images' mean vector.

        passed: of some images each, z (b, D) of length one, labels (b,) within the domain, domains (b,) on the CPU.
        """
        starts = torch.tensor(self._starts)
        self.rows.zero_()
        self.seen.zero_()
        for vectors, labels, domains in passed:
            rows = labels + starts[domains].to(labels.device)
            self.rows.index_add_(0, rows, vectors.float())
            self.seen[rows] = True
        self.rows.copy_(unit(self.rows))
