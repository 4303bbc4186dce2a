"""Batches of look-alikes: one clean image of every identity, and which identities resemble each other most.

Shapes: N identities of all sources, by joint label; P identities of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lda.batch import Batch

_ANCHORS, _IMAGES = 9101, 9102  # keep these draws apart from others of the same seed and number


def one_of_each(
    sources: Iterable[Batch], offsets: Tensor, count: int, encode: Callable[[Tensor], Tensor], seed: int, epoch: int
) -> Tensor:
    """Encodings (N, ...) in fp32 of one image of every identity, drawn from (seed, epoch), whatever the batches' size.

    Every image gets a random number as it comes by, and an identity's smallest wins; so about ln(n) + 0.6 of its n
    images are encoded, and no more images are held than a batch.

    Args:
        sources: all images, in a fixed order.
        offsets: (K,) where each domain's labels begin among the joint ones, on the CPU.
        count: N. Raises ValueError when one of them has no image.
        encode: images (B, 3, H, W) -> (B, ...).
    """
    random = np.random.default_rng([seed, epoch, _IMAGES])
    best = np.full(count, np.inf)
    found: Tensor | None = None
    for batch in sources:
        labels = (batch.labels.cpu() + offsets[batch.domains]).numpy()
        numbers = random.random(len(labels))
        order = np.argsort(numbers)
        identities, first = np.unique(labels[order], return_index=True)
        rows = order[first]
        better = numbers[rows] < best[identities]
        if not better.any():
            continue
        identities, rows = identities[better], rows[better]
        best[identities] = numbers[rows]
        codes = encode(batch.images[torch.from_numpy(rows).to(batch.images.device)]).float()
        if found is None:
            found = codes.new_zeros(count, *codes.shape[1:])
        found[torch.from_numpy(identities).to(codes.device)] = codes
    if found is None or np.isinf(best).any():
        raise ValueError(f"{int(np.isinf(best).sum())} of {count} identities have no image among the sources")
    return found


@torch.no_grad()
def nearest(scores: Callable[[slice, slice], Tensor], count: int, number: int, pairs: int) -> Tensor:
    """(N, number) int64: for every identity the others that score highest with it, best first.

    Args:
        scores: (identities asking, identities answering) -> their scores, one block.
        count: N > number.
        pairs: most pairs of a block.
    """
    width = min(count, pairs)
    height = max(1, pairs // width)
    found = []
    for start in range(0, count, height):
        rows = slice(start, min(start + height, count))
        blocks = [scores(rows, slice(at, min(at + width, count))) for at in range(0, count, width)]
        row = torch.cat(blocks, 1)
        itself = torch.arange(rows.start, rows.stop, device=row.device)[:, None]
        found.append(row.scatter(1, itself, -torch.inf).topk(number, dim=1).indices)
    return torch.cat(found)


def anchor(position: int, count: int, seed: int, epoch: int) -> int:
    """The identity whose turn it is at a position of an epoch: all N in an order drawn from (seed, epoch), then again
    from the first."""
    order = np.random.default_rng([seed, epoch, _ANCHORS]).permutation(count)
    return int(order[position % count])


def by_domain(identities: NDArray[np.int64], num_ids: Sequence[int]) -> list[tuple[int, NDArray[np.int64]]]:
    """Joint labels -> (domain, labels within it) for every domain among them, by rising domain."""
    ends = np.cumsum(num_ids)
    domains = np.searchsorted(ends, identities, side="right")
    return [(int(k), identities[domains == k] - (ends[k] - num_ids[k])) for k in np.unique(domains)]
