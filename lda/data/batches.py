"""Training batches of P identities with K images each, every one a pure function of (seed, step).

Nothing is remembered between batches that the step number does not imply, so any number of loader workers, and a run
that goes on from any step, see the same batches.

Each domain deals its identities in blocks of P: block v of a domain holds positions v*P .. v*P + P - 1 of a seeded
permutation that is drawn anew for every pass over the identities; what does not fill a block sits out that pass.
    pure   step t shows one domain, drawn uniformly; v counts the earlier steps of that domain (LDA needs one domain's
           statistics at a time; ReNorm and META draw the same way)
    mixed  step t shows all D domains, P / D identities each (a remainder goes round); block v is spread over the D
           steps from v*D (the plain baseline)
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from lda.data.packed import PackedImages
from lda.data.processes import follow_parent
from lda.data.sources import SourceDomain
from lda.data.transforms import Augment
from lda.errors import UsageError
from lda.protocols import DATASETS

_Ints = NDArray[np.int64]

# What a random stream is for: the last number of its seed.
_DOMAINS, _IDENTITIES, _IMAGES, _AUGMENTATION = range(4)

_SPAN = 4096  # steps whose domains are drawn together


class Batch(NamedTuple):
    """One training batch of B = P x K images, the K images of an identity side by side.

    Attributes:
        images: (B, 3, H, W) float32 normalised; uint8 if the batches were made without augmentation.
        labels: (B,) int64 identity within its domain.
        domains: (B,) int64 position of the image's domain among the sources.
    """

    images: Tensor
    labels: Tensor
    domains: Tensor


class IdentityBatches(Dataset[Batch]):
    """Batches by step number.

    Args:
        sources: the source domains.
        packed: their images, packed in the order of their records.
        ids_per_batch: P.
        images_per_id: K; an identity with fewer images repeats them, each as often as the others or once more.
        augment: None leaves the images as uint8, for a caller that augments elsewhere (see `generator`).
        seed: of everything random here.
        pure: one domain per batch, or all.

    Raises:
        UsageError: a domain has fewer than P identities; P identities cannot be spread over the domains.
    """

    def __init__(
        self,
        sources: Sequence[SourceDomain],
        packed: Sequence[PackedImages],
        ids_per_batch: int,
        images_per_id: int,
        augment: Augment | None,
        seed: int,
        pure: bool,
    ) -> None:
        for source in sources:
            if source.num_ids < ids_per_batch:
                raise UsageError(
                    f"{DATASETS.get(source.name, source.name)} has {source.num_ids} identities to train on, "
                    f"ids_per_batch is {ids_per_batch}; lower ids_per_batch or validation_fraction"
                )
        if not pure and ids_per_batch < len(sources):
            raise UsageError(f"ids_per_batch: {ids_per_batch} identities cannot be spread over {len(sources)} domains")
        self.packed = tuple(packed)
        self.ids_per_batch, self.images_per_id = ids_per_batch, images_per_id
        self.augment, self.seed, self.pure = augment, seed, pure
        self._members = [_Members(source) for source in sources]
        self._identity_counts = [source.num_ids for source in sources]
        self._span = _Span(-1, np.zeros(0, np.int64), np.zeros(len(sources), np.int64))

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        chosen = self.identities(step)
        random = self._random(_IMAGES, step)
        images, labels, domains = [], [], []
        for domain, identities in chosen:
            rows = np.concatenate(
                [self._members[domain].draw(identity, self.images_per_id, random) for identity in identities.tolist()]
            )
            images.append(self.packed[domain].batch(rows))
            labels.append(np.repeat(identities, self.images_per_id))
            domains.append(np.full(len(rows), domain, np.int64))
        pixels = images[0] if len(images) == 1 else torch.cat(images)
        if self.augment is not None:
            pixels = self.augment(pixels, self.generator(step))
        return Batch(pixels, torch.from_numpy(np.concatenate(labels)), torch.from_numpy(np.concatenate(domains)))

    def identities(self, step: int) -> list[tuple[int, _Ints]]:
        """The identities of a step: (domain, their labels) for every domain in it."""
        if step < 0:
            raise IndexError(f"step {step}: expected 0 or more")
        if self.pure:
            domain, earlier = self._domain_of(step)
            return [(domain, self._block(domain, earlier))]
        count = len(self._members)
        block, turn = divmod(step, count)
        parts = []
        for domain in range(count):
            ends = np.cumsum([0, *(self._share(domain, position) for position in range(turn + 1))])
            parts.append((domain, self._block(domain, block)[ends[-2] : ends[-1]]))
        return parts

    def generator(self, step: int) -> Generator:
        """The generator of a step's augmentation, in its first state."""
        return Generator().manual_seed(int(self._random(_AUGMENTATION, step).integers(2**63)))

    def _share(self, domain: int, turn: int) -> int:
        """Identities of a domain in the step `turn` (0 .. D - 1) of a mixed round; they sum to P over either index."""
        count = len(self._members)
        base, rest = divmod(self.ids_per_batch, count)
        return base + ((domain - turn * rest) % count < rest)

    def _block(self, domain: int, block: int) -> _Ints:
        """The P identities of a domain's block."""
        size = self.ids_per_batch
        passes, position = divmod(block, self._identity_counts[domain] // size)
        order = _permutation(self.seed, domain, passes, self._identity_counts[domain])
        return order[position * size : (position + 1) * size]

    def _domain_of(self, step: int) -> tuple[int, int]:
        """(domain of a pure step, number of earlier steps of that domain)."""
        number, position = divmod(step, _SPAN)
        if self._span.number > number:
            self._span = _Span(-1, np.zeros(0, np.int64), np.zeros(len(self._members), np.int64))
        while self._span.number < number:
            ended = np.bincount(self._span.domains, minlength=len(self._members))
            following = self._span.number + 1
            domains = self._random(_DOMAINS, following).integers(len(self._members), size=_SPAN)
            self._span = _Span(following, domains, self._span.earlier + ended)
        domain = int(self._span.domains[position])
        return domain, int(self._span.earlier[domain] + np.count_nonzero(self._span.domains[:position] == domain))

    def _random(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number, purpose])


class _Span(NamedTuple):
    """The domains of steps number * _SPAN onwards, and how many steps of each domain lie before."""

    number: int
    domains: _Ints
    earlier: _Ints


class _Members:
    """Which images belong to which identity of one domain, and from which camera they are."""

    def __init__(self, source: SourceDomain) -> None:
        self.rows: _Ints = np.argsort(source.labels, kind="stable")
        self.starts: _Ints = np.searchsorted(source.labels[self.rows], np.arange(source.num_ids + 1))
        self.camids: _Ints = np.array([record.camid for record in source.records], dtype=np.int64)[self.rows]

    def draw(self, identity: int, count: int, random: np.random.Generator) -> _Ints:
        """Positions of `count` images of an identity, from as many cameras as possible.

        Each camera's images are shuffled and dealt in rounds, one of every camera in each round, cameras in random
        order; too few images are dealt again from the start.
        """
        where = slice(self.starts[identity], self.starts[identity + 1])
        rows, camids = self.rows[where], self.camids[where]
        order = random.permutation(len(rows))
        order = order[np.argsort(camids[order], kind="stable")]  # by camera, shuffled within
        first = np.flatnonzero(np.diff(camids[order], prepend=-1))  # where each camera's images begin
        rounds = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows)))
        dealt = order[np.lexsort((random.random(len(rows)), rounds))]
        return rows[dealt[np.arange(count) % len(rows)]]


@lru_cache(maxsize=32)
def _permutation(seed: int, domain: int, passes: int, count: int) -> _Ints:
    """The order of a domain's identities in one pass."""
    return np.random.default_rng([seed, domain, passes, _IDENTITIES]).permutation(count)


def batch_loader(
    batches: IdentityBatches, start: int, stop: int, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """The batches of steps `start` to `stop` - 1, prepared ahead by `workers` processes (0: here, when asked for).

    `pin_memory`: in page-locked memory, for fast copies to a GPU.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)  # a plain fork would inherit the locks of this process's threads
    context.set_forkserver_preload(["__main__", __name__])  # so that torch is loaded once, not once per worker
    loader = DataLoader(
        batches,
        batch_size=None,  # a step is a batch already
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=context if workers else None,
        worker_init_fn=_start_worker,
    )
    return iter(loader)


def _start_worker(worker: int) -> None:
    # torch's own watch on the parent sees the fork server, which lives as long as its workers.
    follow_parent()
