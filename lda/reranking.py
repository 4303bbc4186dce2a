"""k-reciprocal re-ranking: the gallery ranked again by the neighbours that two images have in common.

Zhong, Zheng, Cao, Li: "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. Query and gallery
are one set of N images; p, q, g are images of it, d their distance, N(p, k) the k images nearest to p:

    (1) R(p, k) = {g in N(p, k): p in N(g, k)}
    (2) R*(p) = R(p, k1), and every R(q, k1/2) of a q in R(p, k1) that has at least 2/3 of itself in R(p, k1)
    (3) V_p(g) = exp(-d(p, g)) for g in R*(p), 0 for the others
    (4) V_p <- mean of V_g over N(p, k2)
    (5) d_J(p, g) = 1 - sum_j min(V_p(j), V_g(j)) / sum_j max(V_p(j), V_g(j))
    (6) d*(p, g) = (1 - lambda) d_J(p, g) + lambda d(p, g)

What they leave open is as in the authors' release (zhunzhong07/person-re-ranking 278f2c7): d is the squared Euclidean
distance of unit vectors over the largest that p has to anybody; an image is its own first neighbour, one more than k in
(1) and one of the k in (4); V_p sums to 1 before (4). The release takes "more than 2/3" in (2), we what is printed.

Ties are as in `lda.ranking`, so that neither the order of the images nor the blocks matter: cosines closer than the
scorer's `tie` are equal, and a neighbour as far as the first one that is left out is left out with it. So a collapsed
network has no neighbours, and every gallery image the same d*.

No N x N matrix is made: cosines come by blocks of rows, and of V only what is not 0 is kept. In float64, for N^2 D
multiply-adds, twice for the queries' rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from lda.ranking import Scorer, Scores

_ROWS = 128  # images whose neighbours are looked for at a time
_PAIRS = 4096  # pairs whose distance is taken at a time

_Entries = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]  # rows, columns, values of a sparse matrix


@dataclass(frozen=True)
class KReciprocal:
    """k1, k2 and lambda of the equations above."""

    k1: int = 20
    k2: int = 6
    share: float = 0.3

    def scores(self, scorer: Scorer, query: Tensor, gallery: Tensor) -> Scores:
        """-d* of query (Q, D) and gallery (G, D), float64 between -1 and 0.

        `scorer` must give cosines: see `lda.ranking.CosineScorer`.
        """
        images = scorer.prepare(torch.cat([query, gallery]).double())  # (N, D)
        nearest = _nearest(scorer, images, max(self.k1, self.k2 - 1))
        encoded = self._expanded(self._encoded(images, nearest), nearest)
        first = len(query)  # of the gallery
        asking, searched = encoded[:first], csc_array(encoded[first:])

        def scores(rows: slice, columns: slice) -> Tensor:
            distance = _distances(scorer, images[:first][rows], images[first:][columns]) / nearest.largest[rows, None]
            shared = torch.from_numpy(_shared(asking[rows], searched)[:, columns]).to(distance.device)
            jaccard = 1 - shared / (2 - shared)  # both V sum to 1
            return -((1 - self.share) * jaccard + self.share * distance)

        return scores

    def _encoded(self, images: Tensor, nearest: _Nearest) -> csr_array:
        """Eqs. (1) to (3): V (N, N)."""
        near, nearer = _mutual(nearest.within(self.k1)), _mutual(nearest.within(self.k1 // 2))
        parts = []
        for rows in _blocks(len(images)):
            row, column = _members(_with_neighbours(near[rows], nearer))
            row = row + rows.start
            parts.append(
                (row, column, torch.exp(-_pair_distances(images, row, column, nearest) / nearest.largest[row]))
            )
        entries = [torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)]
        return _rows_of_one((entries[0], entries[1], entries[2]), len(images))

    def _expanded(self, encoded: csr_array, nearest: _Nearest) -> csr_array:
        """Eq. (4)."""
        itself = torch.arange(encoded.shape[0], device=nearest.images.device)[:, None]
        row, column = _members(torch.cat([itself, nearest.within(self.k2 - 1)], 1))
        entries = (row.cpu().numpy(), column.cpu().numpy(), np.ones(len(row)))
        return csr_array(_rows_of_one(entries, encoded.shape[0]) @ encoded)


# --- neighbours ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Nearest:
    """The images nearest to each, themselves apart.

    Attributes:
        images: (N, K + 1) positions, nearest first; fewer where there are not so many.
        distances: the same of their distances, before they are divided by
        largest: (N,) an image's distance to whoever is farthest; 1 where all are equal.
        tie: distances this close are equal.
    """

    images: Tensor
    distances: Tensor
    largest: Tensor
    tie: float

    def within(self, k: int) -> Tensor:
        """The k nearest (N, k), without those that tie with the one after them: -1."""
        if k >= self.images.shape[1]:
            return self.images
        clear = self.distances[:, :k] < self.distances[:, k : k + 1] - self.tie
        return self.images[:, :k].where(clear, -1)


def _nearest(scorer: Scorer, images: Tensor, k: int) -> _Nearest:
    count = len(images)
    found, distances, largest = [], [], []
    for rows in _blocks(count):
        block = _distances(scorer, images[rows], images)  # (C, N)
        largest.append(block.amax(1))
        itself = torch.arange(rows.start, rows.stop, device=block.device)
        block[itself - rows.start, itself] = torch.inf
        near = block.topk(min(k + 1, count - 1), 1, largest=False)
        found.append(near.indices)
        distances.append(near.values)
    most = torch.cat(largest)
    return _Nearest(torch.cat(found), torch.cat(distances), most.where(most > 0, 1.0), scorer.tie)


def _distances(scorer: Scorer, some: Tensor, others: Tensor) -> Tensor:
    """Half the squared Euclidean distances of unit vectors (C, D) and (W, D): (C, W)."""
    return _not_below(1 - scorer.scores(some, others), scorer.tie)


def _pair_distances(images: Tensor, row: Tensor, column: Tensor, nearest: _Nearest) -> Tensor:
    """The same of pairs (P,) of images."""
    parts = zip(torch.split(row, _PAIRS), torch.split(column, _PAIRS), strict=True)
    return _not_below(1 - torch.cat([(images[p] * images[g]).sum(1) for p, g in parts]), nearest.tie)


def _not_below(distances: Tensor, tie: float) -> Tensor:
    """What ties with 0 is 0."""
    return distances.where(distances > tie, 0.0)


def _mutual(near: Tensor) -> Tensor:
    """Eq. (1): of neighbours (N, k) those that are so mutually, else -1; the image itself comes first: (N, 1 + k)."""
    itself = torch.arange(len(near), device=near.device)[:, None]
    mutual = torch.empty_like(near, dtype=torch.bool)
    for rows in _blocks(len(near)):
        mutual[rows] = (near[near[rows].clamp_min(0)] == itself[rows, :, None]).any(2)
    return torch.cat([itself, near.where(mutual & (near >= 0), -1)], 1)


def _with_neighbours(near: Tensor, nearer: Tensor) -> Tensor:
    """Eq. (2): R(p, k1) of some images (C, 1 + k1), R(q, k1/2) of all (N, 1 + h) -> R* (C, ...); -1 is nobody."""
    theirs = nearer[near.clamp_min(0)].masked_fill((near < 0)[..., None], -1)  # (C, 1 + k1, 1 + h)
    known = (theirs[..., None] == near[:, None, None]).any(3) & (theirs >= 0)
    enough = 3 * known.sum(2) >= 2 * (theirs >= 0).sum(2)
    found = torch.cat([near, theirs.masked_fill(~enough[..., None], -1).flatten(1)], 1).sort(1).values
    again = found[:, 1:] == found[:, :-1]
    return torch.cat([found[:, :1], found[:, 1:].masked_fill(again, -1)], 1)


def _members(lists: Tensor) -> tuple[Tensor, Tensor]:
    """(row, image) of everybody in lists of images; -1 is nobody."""
    row, place = (lists >= 0).nonzero(as_tuple=True)
    return row, lists[row, place]


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, min(start + _ROWS, count))


# --- what is not 0 of V ----------------------------------------------------------------------------------------------


def _rows_of_one(entries: _Entries, count: int) -> csr_array:
    """(count, count), every row divided by its sum."""
    row, column, value = entries
    value = value / np.bincount(row, value, count)[row]
    return csr_array((value, (row, column)), shape=(count, count))


def _shared(asking: csr_array, searched: csc_array) -> NDArray[np.float64]:
    """sum_j min(V_p(j), V_g(j)) of rows (C, N) and (G, N): (C, G)."""
    starts: NDArray[Any] = searched.indptr
    shared = np.empty((asking.shape[0], searched.shape[0]))
    for p, (begin, end) in enumerate(zip(asking.indptr, asking.indptr[1:], strict=False)):
        columns, own = asking.indices[begin:end], asking.data[begin:end]
        lengths = starts[columns + 1] - starts[columns]  # of the gallery's images that have something there
        shift = starts[columns] - (lengths.cumsum() - lengths)
        places = np.arange(lengths.sum()) + shift.repeat(lengths)
        least = np.minimum(searched.data[places], own.repeat(lengths))
        shared[p] = np.bincount(searched.indices[places], least, len(shared[p]))
    return shared
