"""Training batches of P identities with K images each, every one a pure function of (seed, step).

Nothing is remembered between batches that the step number does not imply, so any number of loader workers, and a run
that goes on from any step, see the same batches. Which identities a step shows: `lda/data/dealing.py`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from lda.batch import Batch, Layout
from lda.data.dealing import Dealt, dealer
from lda.data.options import BatchSettings
from lda.data.packed import PackedImages
from lda.data.processes import follow_parent
from lda.data.sources import SourceDomain
from lda.data.transforms import Augment, StrongAugment, normalise

_Ints = NDArray[np.int64]

# What a random stream is for: the last number of its seed. Those of lda/data/dealing.py are 0, 1 and 5.
_IMAGES, _AUGMENTATION, _SECOND_VIEW = 2, 3, 4


class IdentityBatches(Dataset[Batch]):
    """Batches by step number.

    Args:
        sources: the source domains.
        packed: their images, packed in the order of their records.
        settings: P, K and the augmentation. An identity with fewer than K images repeats them, each as often as the
            others or once more.
        layout: which images a step shows.
        seed: of everything random here.
        deal: step -> its identities, where the method chooses them; None: by the layout.
        augmented: False leaves the images as uint8 and `second` None, for a caller that takes `augment` where the
            images are then.

    Raises:
        UsageError: a domain has fewer than P identities; P identities cannot be spread over the domains.
    """

    def __init__(
        self,
        sources: Sequence[SourceDomain],
        packed: Sequence[PackedImages],
        settings: BatchSettings,
        layout: Layout,
        seed: int,
        *,
        deal: Callable[[int], Dealt] | None = None,
        augmented: bool = True,
    ) -> None:
        self.packed = tuple(packed)
        self.settings, self.layout, self.seed, self.augmented = settings, layout, seed, augmented
        self._deal = deal or dealer(layout, sources, settings.ids_per_batch, seed)
        self._members = [_Members(source) for source in sources]
        second = Augment(settings) if layout.strong is None else StrongAugment(settings, layout.strong)
        self._augments = (Augment(settings), second)[: layout.views]

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        number = step * self.layout.batches
        batch = self._drawn(number)
        if self.layout.batches == 2:
            batch = batch._replace(extra=self._drawn(number + 1))
        return self.augment(batch, step) if self.augmented else batch

    def _drawn(self, number: int) -> Batch:
        chosen = self.identities(number)
        random = self._random(_IMAGES, number)
        count = self.settings.images_per_id
        images, labels, domains = [], [], []
        for domain, identities in chosen:
            members = self._members[domain]
            rows = np.concatenate([members.draw(identity, count, random) for identity in identities.tolist()])
            images.append(self.packed[domain].batch(rows))
            labels.append(np.repeat(identities, count))
            domains.append(np.full(len(rows), domain, np.int64))
        pixels = images[0] if len(images) == 1 else torch.cat(images)
        return Batch(pixels, torch.from_numpy(np.concatenate(labels)), torch.from_numpy(np.concatenate(domains)))

    def identities(self, number: int) -> Dealt:
        """The identities of a batch: (domain, their labels) for every domain in it.

        `number`: the step; with two batches a step, step t has the numbers 2t and 2t + 1.
        """
        if number < 0:
            raise IndexError(f"step {number}: expected 0 or more")
        return self._deal(number)

    def augment(self, batch: Batch, step: int) -> Batch:
        """A step's uint8 images augmented, once for every view of the layout, on the device that they are on."""
        number = step * self.layout.batches
        extra = None if batch.extra is None else self._augmented(batch.extra, number + 1)
        return self._augmented(batch, number)._replace(extra=extra)

    def _augmented(self, batch: Batch, number: int) -> Batch:
        views = [view(batch.images, self.generator(number, place)) for place, view in enumerate(self._augments)]
        return batch._replace(images=views[0], second=views[1] if len(views) == 2 else None)

    def generator(self, number: int, view: int = 0) -> Generator:
        """The generator of a batch's augmentation, in its first state; `view`: 0, or 1 for `Batch.second`."""
        purpose = (_AUGMENTATION, _SECOND_VIEW)[view]
        return Generator().manual_seed(int(self._random(purpose, number).integers(2**63)))

    def _random(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number, purpose])


class CleanImages:
    """Every source image once, not augmented: for a method that looks at its sources before the first step.

    Iterates batches of at most `size` images, each of one domain: images normalised float32, labels within the domain,
    domains in order, images in the order of their records (by path). An identity's images need not be side by side.
    """

    def __init__(self, sources: Sequence[SourceDomain], packed: Sequence[PackedImages], size: int) -> None:
        self.sources, self.packed, self.size = tuple(sources), tuple(packed), size

    def __len__(self) -> int:
        return sum(-(-len(source.records) // self.size) for source in self.sources)

    def __iter__(self) -> Iterator[Batch]:
        for domain, (source, packed) in enumerate(zip(self.sources, self.packed, strict=True)):
            for start in range(0, len(source.records), self.size):
                rows = np.arange(start, min(start + self.size, len(source.records)))
                labels, domains = torch.from_numpy(source.labels[rows]), torch.full((len(rows),), domain)
                yield Batch(normalise(packed.batch(rows)), labels, domains)


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
        generator=Generator(),  # it draws a number that nothing here uses: not from the global one
    )
    return iter(loader)


def _start_worker(worker: int) -> None:
    # torch's own watch on the parent sees the fork server, which lives as long as its workers.
    follow_parent()
