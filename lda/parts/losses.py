"""Losses and statistics that many methods share: identity and batch-hard triplet, moments of a map.

Shapes: maps (N, C, H, W), the output of the last stage after its ReLU; features (N, D); labels (N,); statistics of a
distribution (..., C). Functions only: what has memory lives in a bank or in the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lda.settings import Range, Settings, setting


@dataclass(frozen=True, kw_only=True)
class IdentitySettings(Settings):
    """Settings of the identity losses; a method that uses them derives its own settings from these."""

    label_smoothing: float = setting(
        0.1, "of the cross-entropy", "ReNorm, META", low=0.0, high=0.99, search=Range(0.0, 0.3)
    )
    triplet_margin: float = setting(
        0.3, "batch-hard margin", "META; ReNorm 0.5 / 1.0", low=0.0, high=10, search=Range(0.1, 1.0)
    )
    triplet_weight: float = setting(
        1.0, "weight of the triplet loss", "ReNorm, META", low=0.0, high=100.0, search=Range(0.1, 10.0, log=True)
    )


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean (..., C) and variance (..., C)."""

    mean: Tensor
    var: Tensor


def batch_statistics(maps: Tensor) -> Gaussian:
    """Mean and unbiased variance of (N, C, H, W) over (n, h, w), as (C,) each, in fp32."""
    var, mean = torch.var_mean(maps.float(), dim=(0, 2, 3), correction=1)
    return Gaussian(mean, var)


@torch.no_grad()
def scale_of(features: Tensor, output: Gaussian) -> dict[str, Tensor]:
    """Feature norm and mean standard deviation of the last map: matching moments can also be won by shrinking them."""
    return {"feature/norm": features.detach().norm(dim=1).mean(), "feature/sigma": output.var.sqrt().mean()}


def identity_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing: logits (N, ids), labels (N,)."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of (N, D) and (M, D), as (N, M) >= 0, in fp32 inside autocast too: a product in bf16 would lose
    all digits of the distance of two features that are close."""
    with torch.autocast(a.device.type, enabled=False):
        one = a.float()
        other = one if b is a else b.float()
        norms = one.square().sum(1)
        others = norms if b is a else other.square().sum(1)  # one node of the graph: the gradient's rounding is pinned
        squared = norms[:, None] + others[None, :] - 2.0 * one @ other.T
    return squared.clamp_min(0.0)


def distances_among(features: Tensor) -> Tensor:
    """Euclidean distances of features (N, D) to each other, (N, N) in fp32, with a floor under the root."""
    return squared_distances(features, features).clamp_min(1e-12).sqrt()


def batch_hard_triplet_loss(features: Tensor, labels: Tensor, margin: float, part: bool = False) -> Tensor:
    """Mean over anchors of [d(hardest positive) - d(hardest negative) + margin]_+ (Hermans et al., arXiv 1703.07737).

    Euclidean distances between features (N, D) as they are (before the BNNeck, not normalised). Every identity of the
    batch needs two images, and the batch two identities; raises ValueError otherwise.

    part: the images are one domain's share of a batch, which may be a single identity: an anchor without a negative
    adds 0.
    """
    hardest = hardest_distances(features, labels, part)
    return F.relu(hardest.positive - hardest.negative + margin).mean()


class Hardest(NamedTuple):
    """Of every anchor the distance to the farthest image of its identity, and to the nearest of another: (N,) each."""

    positive: Tensor
    negative: Tensor


def hardest_distances(features: Tensor, labels: Tensor, part: bool = False) -> Hardest:
    """Hardest Euclidean distances among features (N, D), in fp32; arguments and errors of `batch_hard_triplet_loss`.

    The distance to a negative is infinite where there is none.
    """
    features = features.float()
    same = labels[:, None] == labels[None, :]
    if labels.is_cpu and (bool((same.sum(1) < 2).any()) or (bool(same.all()) and not part)):
        raise ValueError("batch-hard triplets need two images of every identity and two identities in a batch")
    return hardest_of(distances_among(features), same)


def hardest_of(distances: Tensor, same: Tensor) -> Hardest:
    """Of distances (N, N), `same` (N, N) saying which pairs are of one identity."""
    return Hardest(distances.masked_fill(~same, 0.0).amax(1), distances.masked_fill(same, torch.inf).amin(1))


def relation_loss(features: Tensor, teacher: Tensor, labels: Tensor, part: bool = False) -> Tensor:
    """Be no harder than the teacher: mean [d+ - t+]_+ + mean [t- - d-]_+ (META's consistency, with margin 0).

    d+, d-: `hardest_distances` of features (N, D); t+, t- of `teacher` (N, D), which gets no gradient. An anchor
    without a negative (`part`) adds 0 to the second mean.
    """
    own, aim = hardest_distances(features, labels, part), hardest_distances(teacher.detach(), labels, part)
    farther = F.relu(own.positive - aim.positive)
    nearer = F.relu(aim.negative - own.negative).masked_fill(aim.negative.isinf(), 0.0)
    return farther.mean() + nearer.mean()
