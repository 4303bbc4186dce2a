"""Maps compared position by position: the matcher of QAConv, its losses, and the scorer that ranks with it.

a and b are codes of two images: C channels of unit length at each of r positions. Every position of one looks for its
best match in the other, and a learnt weight says how much the match at a position counts.

    (1) E_st = <a_s, b_t>,   p_s = max_t E_st,   q_t = max_s E_st          cosines in [-1, 1]
    (2) m = BN1([p; q])      one channel: one mean, one variance of all pairs and positions
    (3) z = w_p . m_p + w_q . m_q + bias,   S(a, b) = BN2(z)               one channel again; S is a logit

Of a pair only three numbers are kept: w_p . p + w_q . q and the sums of [p; q] and of its squares. From these (2) and
(3) follow for all pairs together, so how they are cut into chunks changes nothing but rounding, and a chunk is computed
again in the backward pass instead of keeping its r x r cosines.

In evaluation (2) and (3) are affine: S = alpha (w_p . p + w_q . q) + beta, with the sign of alpha that of the product
of the two BN weights. So images are ranked by

    (4) score(a, b) = sign(alpha) (w_p . p + w_q . q) / (sum |w_p| + sum |w_q|)          in [-1, 1]

Shapes: codes (A, C, r) and (M, C, r), scores (A, M). Everything is computed in the type of the codes: fp32 or wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lda.errors import UsageError


def elements_on(device: torch.device) -> int:
    """Cosines held at a time: what a processor's cache holds, 4 MiB of fp32; 256 MiB on a GPU."""
    return 2**20 if device.type == "cpu" else 2**26


class PairSums(NamedTuple):
    """What is kept of every pair, (A, M) each: w_p . p + w_q . q, the sum of [p; q], and of its squares."""

    weighted: Tensor
    total: Tensor
    squares: Tensor


def best_matches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(1): codes (A, C, r), (M, C, r) -> p (A, r, M) and q (A, M, r), by one matrix product."""
    (images, channels, r), others = a.shape, len(b)
    product = a.transpose(1, 2).reshape(images * r, channels) @ b.transpose(0, 1).reshape(channels, others * r)
    cosines = product.view(images, r, others, r)
    return cosines.amax(3), cosines.amax(1)


def weighted_matches(p: Tensor, q: Tensor, w_p: Tensor, w_q: Tensor) -> Tensor:
    """w_p . p + w_q . q of `best_matches`, (A, M); weights (r,)."""
    return torch.einsum("asm,s->am", p, w_p) + q @ w_q


class Matcher(nn.Module):
    """S(a, b), (1) to (3).

    Args:
        positions: r.
        shared: w_p = w_q, so that S(a, b) = S(b, a), and the bias counts twice. They begin at 1 / r, as in the release
            2.1; separate weights begin at random, as in 1.0.

    Attributes:
        weight: (1, r), or (2, r) for w_p and w_q.
        norm_matches, norm_scores: BN1 and BN2.
    """

    def __init__(self, positions: int, shared: bool) -> None:
        super().__init__()
        self.positions, self.shared = positions, shared
        self.weight = nn.Parameter(torch.empty(1 if shared else 2, positions))
        self.bias = nn.Parameter(torch.empty(1))
        self.norm_matches = nn.BatchNorm1d(1)
        self.norm_scores = nn.BatchNorm1d(1)
        bound = 1 / math.sqrt(self.weight.numel())  # torch's own for a linear layer
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        if shared:
            nn.init.constant_(self.weight, 1 / positions)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """w_p and w_q, (r,) each."""
        return self.weight[0], self.weight[-1]

    def forward(self, a: Tensor, b: Tensor, rows: Tensor | None = None, elements: int | None = None) -> Tensor:
        """Logits S (A, M) of codes (A, C, r) and (M, C, r); in training with the statistics of these pairs.

        Args:
            rows: (M',) which of b; None: all. b is read again in the backward pass, and must not change before it.
            elements: cosines held at a time; None: as `elements_on` says.
        """
        size = max(1, (elements or elements_on(b.device)) // (len(a) * self.positions**2))
        if rows is None and len(b) <= size:
            return self._logits(self._sums(a, b))
        rows = torch.arange(len(b), device=b.device) if rows is None else rows
        parts = [
            PairSums(*checkpoint(self._sums, a, b, part, use_reentrant=False, preserve_rng_state=False))
            for part in torch.split(rows, size)
        ]
        return self._logits(PairSums(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True))))

    def _sums(self, a: Tensor, b: Tensor, rows: Tensor | None = None) -> PairSums:
        p, q = best_matches(a, b if rows is None else b[rows])
        total = p.sum(1) + q.sum(2)
        squares = p.square().sum(1) + q.square().sum(2)
        return PairSums(weighted_matches(p, q, *self.weights), total, squares)

    def _logits(self, pairs: PairSums) -> Tensor:
        """(2) and (3) from the sums of all pairs."""
        norm, dtype = self.norm_matches, pairs.weighted.dtype
        assert norm.running_mean is not None, "BN1 keeps statistics"
        assert norm.running_var is not None, "BN1 keeps statistics"
        if self.training:
            count = pairs.total.numel() * 2 * self.positions
            mean = pairs.total.sum(dtype=torch.float64) / count
            var = (pairs.squares.sum(dtype=torch.float64) / count - mean.square()).clamp_min(0.0)
            self._record(mean.detach(), var.detach() * count / (count - 1))
        else:
            mean, var = norm.running_mean[0].double(), norm.running_var[0].double()
        mean, scale = mean.to(dtype), (var + norm.eps).rsqrt().to(dtype) * norm.weight
        weight_sum = self.weights[0].sum() + self.weights[1].sum()
        z = scale * (pairs.weighted - mean * weight_sum) + norm.bias * weight_sum
        z = z + (2 * self.bias if self.shared else self.bias)
        logits: Tensor = self.norm_scores(z.reshape(-1, 1)).view_as(z)
        return logits

    @torch.no_grad()
    def _record(self, mean: Tensor, var: Tensor) -> None:
        """As nn.BatchNorm1d does; `lda.parts.routes.statistics_held` holds it the same way."""
        norm = self.norm_matches
        assert norm.running_mean is not None, "BN1 keeps statistics"
        assert norm.running_var is not None, "BN1 keeps statistics"
        assert norm.num_batches_tracked is not None, "BN1 keeps statistics"
        assert norm.momentum is not None, "BN1 keeps a moving average"
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(var.to(norm.running_var.dtype), norm.momentum)

    @torch.no_grad()
    def scorer(self, shape: tuple[int, int, int], pairs_per_block: int) -> MapScorer:
        """(4) with the weights as they are now, for maps of `shape` (C, h, w)."""
        sign = (self.norm_matches.weight * self.norm_scores.weight).sign()
        w_p, w_q = self.weights
        scale = sign / (w_p.abs().sum() + w_q.abs().sum()).clamp_min(torch.finfo(w_p.dtype).tiny)
        return MapScorer(w_p * scale, w_q * scale, shape, pairs_per_block)


# --- losses ----------------------------------------------------------------------------------------------------------


def focal_losses(logits: Tensor, same: Tensor) -> Tensor:
    """BCE(S, same) (1 - P)^2 of every pair, with P the probability given to the truth; P is not detached."""
    truth = torch.where(same, logits, -logits)
    return F.softplus(-truth) * torch.sigmoid(-truth).square()


def pairwise_loss(logits: Tensor, same: Tensor) -> Tensor:
    """BCE(S, same) summed over the second image of a pair, averaged over the first: (A, M), (A, M) -> scalar."""
    return F.softplus(torch.where(same, -logits, logits)).sum(1).mean()


def hard_score_loss(logits: Tensor, same: Tensor, margin: float) -> Tensor:
    """Mean over anchors of [largest S of another identity - smallest S of another image of its own + margin]_+.

    logits, same: (B, B) of the images of a batch with themselves. NaN unless every identity has two images, and the
    batch two identities.
    """
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    hardest_positive = logits.masked_fill(~same | itself, torch.inf).amin(1)
    hardest_negative = logits.masked_fill(same, -torch.inf).amax(1)
    difference = hardest_negative - hardest_positive + margin
    # An anchor without a positive or a negative would be a silent 0.
    return F.relu(difference.masked_fill(difference.isinf(), torch.nan)).mean()


# --- ranking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapScorer:
    """(4): the `lda.ranking.Scorer` of maps (N, C, h, w) whose positions are of unit length.

    Measured on one thread of a CPU: 2 microseconds a pair at C = 64 and 8 x 4 positions, 65 at C = 128 and 16 x 8. The
    9.6e8 pairs of MSMT17 would take 17 hours: that is for a GPU.

    Attributes:
        query_weights, gallery_weights: w_p and w_q of (4), signed and scaled, (r,).
        shape: (C, h, w) of the maps; r = h w.
        pairs_per_block: pairs compared at a time, 4 r^2 bytes each.
        tie: the absolute values of the terms of a score sum to 1 at most, as those of a cosine do.
    """

    query_weights: Tensor
    gallery_weights: Tensor
    shape: tuple[int, int, int]
    pairs_per_block: int
    tie: float = 4 * torch.finfo(torch.float32).eps
    adds_flip: bool = False

    @property
    def pair_cost(self) -> int:
        """r^2 C + 2 r multiply-adds."""
        channels, height, width = self.shape
        r = height * width
        return r * r * channels + 2 * r

    def prepare(self, encodings: Tensor) -> Tensor:
        """Maps (N, C, h, w) -> codes (N, C, r). Raises UsageError for encodings of another shape."""
        if encodings.shape[1:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise UsageError(f"matching maps: expected (N, {wanted}), got shape {tuple(encodings.shape)}")
        return encodings.flatten(2).to(torch.promote_types(encodings.dtype, torch.float32))

    def scores(self, query: Tensor, gallery: Tensor) -> Tensor:
        """(C, W) scores in [-1, 1] of codes (C, channels, r) and (W, channels, r)."""
        p, q = best_matches(query, gallery)
        w_p, w_q = (w.to(query) for w in (self.query_weights, self.gallery_weights))
        return weighted_matches(p, q, w_p, w_q)
