"""Which identities a training step shows: every layout's rule as a pure function of (seed, step).

Each domain deals its identities by seeded permutations, one for every pass over them, so that nobody is dealt twice in
a pass. P identities make a step, D is the number of domains, n_d that of a domain's identities.
    OneDomain       step t shows one domain, drawn uniformly: P identities. v counts the earlier steps of that domain;
                    the step takes positions v*P .. v*P + P - 1 of the domain's pass, and what does not fill a block
                    sits out that pass
    EqualShares     every step shows P / D identities of each domain (a remainder goes round); block v of P identities,
                    as above, is spread over the D steps from v*D
    NaturalShares   every step shows P n_d / N identities of each domain, N of all: rounded up or down, and never less
                    than one. A round of R = N // P steps is one pass over all domains: within it a domain gets R times
                    its share, rounded, and who is left over sits out that round. A domain whose share is below one
                    gets one identity in every step, from passes of its own; the others share what remains
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lda.batch import Layout
from lda.data.catalogue import title
from lda.data.sources import SourceDomain
from lda.errors import UsageError

Ints = NDArray[np.int64]

Dealt = list[tuple[int, Ints]]
"""The identities of a step: (domain, their labels) for every domain in it."""

# What a random stream is for: the last number of its seed. Those of lda/data/batches.py go on from 2.
_DOMAINS, _IDENTITIES, _ROUNDING = 0, 1, 5

_SPAN = 4096  # steps whose domains are drawn together


def dealer(layout: Layout, sources: Sequence[SourceDomain], ids_per_batch: int, seed: int) -> Callable[[int], Dealt]:
    """The rule of a layout: step -> its identities.

    Raises UsageError if a domain has fewer than P identities, or P cannot be spread over the domains.
    """
    for source in sources:
        if source.num_ids < ids_per_batch:
            raise UsageError(
                f"{title(source.name)} has {source.num_ids} identities to train on, "
                f"ids_per_batch is {ids_per_batch}; lower ids_per_batch or validation_fraction"
            )
    counts = [source.num_ids for source in sources]
    if layout.domains == "one":
        return OneDomain(counts, ids_per_batch, seed)
    if ids_per_batch < len(sources):
        raise UsageError(f"ids_per_batch: {ids_per_batch} identities cannot be spread over {len(sources)} domains")
    return (EqualShares if layout.shares == "equal" else NaturalShares)(counts, ids_per_batch, seed)


class _Blocks:
    """Blocks of P identities of each domain; `counts`: identities of each, `size`: P."""

    def __init__(self, counts: Sequence[int], size: int, seed: int) -> None:
        self.counts, self.size, self.seed = counts, size, seed

    def block(self, domain: int, number: int) -> Ints:
        """The P identities of a domain's block."""
        passes, position = divmod(number, self.counts[domain] // self.size)
        order = permutation(self.seed, domain, passes, self.counts[domain])
        return order[position * self.size : (position + 1) * self.size]


class OneDomain(_Blocks):
    """One domain a step."""

    def __init__(self, counts: Sequence[int], size: int, seed: int) -> None:
        super().__init__(counts, size, seed)
        self._span = self._before_all()

    def __call__(self, step: int) -> Dealt:
        """The identities of a step."""
        domain, earlier = self.domain_of(step)
        return [(domain, self.block(domain, earlier))]

    def domain_of(self, step: int) -> tuple[int, int]:
        """(domain of a step, number of earlier steps of that domain)."""
        number, position = divmod(step, _SPAN)
        if self._span.number > number:
            self._span = self._before_all()
        while self._span.number < number:
            ended = np.bincount(self._span.domains, minlength=len(self.counts))
            following = self._span.number + 1
            random = np.random.default_rng([self.seed, following, _DOMAINS])
            self._span = _Span(following, random.integers(len(self.counts), size=_SPAN), self._span.earlier + ended)
        domain = int(self._span.domains[position])
        return domain, int(self._span.earlier[domain] + np.count_nonzero(self._span.domains[:position] == domain))

    def _before_all(self) -> _Span:
        return _Span(-1, np.zeros(0, np.int64), np.zeros(len(self.counts), np.int64))


class _Span(NamedTuple):
    """The domains of steps number * _SPAN onwards, and how many steps of each domain lie before."""

    number: int
    domains: Ints
    earlier: Ints


class EqualShares(_Blocks):
    """All domains in every step, in equal parts."""

    def __call__(self, step: int) -> Dealt:
        """The identities of a step."""
        block, turn = divmod(step, len(self.counts))
        dealt = []
        for domain in range(len(self.counts)):
            ends = np.cumsum([0, *(self._share(domain, position) for position in range(turn + 1))])
            dealt.append((domain, self.block(domain, block)[ends[-2] : ends[-1]]))
        return dealt

    def _share(self, domain: int, turn: int) -> int:
        """Identities of a domain in the step `turn` (0 .. D - 1) of a round; they sum to P over either index."""
        base, rest = divmod(self.size, len(self.counts))
        return base + ((domain - turn * rest) % len(self.counts) < rest)


class NaturalShares:
    """All domains in every step, in proportion to their identities."""

    def __init__(self, counts: Sequence[int], size: int, seed: int) -> None:
        self.counts, self.seed = counts, seed
        self._single = _below_one(counts, size)
        shared = [0 if domain in self._single else count for domain, count in enumerate(counts)]
        self._ends = tuple(np.cumsum(shared).tolist())
        self._shared = size - len(self._single)  # identities of a step for the domains that share
        self.steps = self._ends[-1] // self._shared
        """Steps of a round."""

    def __call__(self, step: int) -> Dealt:
        """The identities of a step."""
        number, position = divmod(step, self.steps)
        dealt = []
        for domain, count in enumerate(self.counts):
            if domain in self._single:
                passes, place = divmod(step, count)
                chosen = permutation(self.seed, domain, passes, count)[place : place + 1]
            else:
                starts = _round(self.seed, number, self.steps, self._shared, self._ends)
                start, end = starts[position : position + 2, domain]
                chosen = permutation(self.seed, domain, number, count)[start:end]
            dealt.append((domain, chosen))
        return dealt


def _below_one(counts: Sequence[int], size: int) -> frozenset[int]:
    """The domains whose share of a step is below one identity, where each of them takes one all the same."""
    single: frozenset[int] = frozenset()
    while True:
        rest = sum(count for domain, count in enumerate(counts) if domain not in single)
        left = size - len(single)
        more = {d for d, count in enumerate(counts) if d not in single and count * left < rest}
        if not more:
            return single
        single |= more


@lru_cache(maxsize=32)
def _round(seed: int, number: int, steps: int, size: int, ends: tuple[int, ...]) -> Ints:
    """(steps + 1, D): how many identities each domain has dealt before each step of a round.

    In one step, the points u, 1 + u, .. size - 1 + u on a line of length `size` are counted within the domain's part of
    it, whose length is its share: that rounds all shares at once, and they sum to `size`. Over a round u takes the
    values (k + 1/2) / steps, k = 0 .. steps - 1 in seeded order, so that points lie evenly and totals are exact.
    """
    order = np.random.default_rng([seed, number, _ROUNDING]).permutation(steps)[:, None]
    total = ends[-1]
    # Points below the right end of a part, b = size * end / total: ceil(b - u), here in whole numbers.
    below = -((total * (2 * order + 1) - 2 * steps * size * np.array(ends, dtype=np.int64)) // (2 * steps * total))
    shares = np.diff(below, axis=1, prepend=0)
    return np.concatenate([np.zeros((1, len(ends)), np.int64), np.cumsum(shares, axis=0)])


@lru_cache(maxsize=32)
def permutation(seed: int, domain: int, passes: int, count: int) -> Ints:
    """The order of a domain's identities in one pass."""
    return np.random.default_rng([seed, domain, passes, _IDENTITIES]).permutation(count)
