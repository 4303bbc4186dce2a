"""The losses: latent distribution, L_consis and L_align; identity and batch-hard triplet.

Shapes: maps (N, C, H, W), the output of the last stage after its ReLU; features (N, D); labels (N,); statistics of a
distribution (..., C). Functions only: what has memory (the bank of output statistics) lives in `lda/method.py`.
Equation numbers are those of the README's table "The method".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Latent = Literal["mean", "barycentre", "mixture"]
Distance = Literal["w2", "w2_squared", "symmetric_kl"]

# Dead ReLU channels have v = 0, where the square root's slope is infinite; so is it at zero distance.
_VARIANCE_FLOOR = 1e-5
_DISTANCE_FLOOR = 1e-8


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean (..., C) and variance (..., C)."""

    mean: Tensor
    var: Tensor


def batch_statistics(maps: Tensor) -> Gaussian:
    """Eq. (6): mean and unbiased variance of (N, C, H, W) over (n, h, w), as (C,) each, in fp32."""
    var, mean = torch.var_mean(maps.float(), dim=(0, 2, 3), correction=1)
    return Gaussian(mean, var)


def image_statistics(maps: Tensor) -> Gaussian:
    """Per-image mean and variance of (N, C, H, W) over (h, w), as (N, C) each, in fp32."""
    var, mean = torch.var_mean(maps.float(), dim=(2, 3), correction=0)
    return Gaussian(mean, var)


@torch.no_grad()
def latent_distribution(domains: Gaussian, kind: Latent = "mean") -> Gaussian:
    """Eq. (7): the latent distribution (mu*, v*) of K domains' output statistics (K, C), without gradient.

    mean: averages of means and of variances. barycentre: standard deviations averaged, the 2-Wasserstein barycentre of
    diagonal Gaussians. mixture: the moments of the equal-weight mixture, which adds the variance between domains.
    """
    mean = domains.mean.mean(0)
    if kind == "mean":
        return Gaussian(mean, domains.var.mean(0))
    if kind == "barycentre":
        return Gaussian(mean, domains.var.sqrt().mean(0).square())
    return Gaussian(mean, (domains.var + domains.mean.square()).mean(0) - mean.square())


def distance(p: Gaussian, q: Gaussian, kind: Distance = "w2") -> Tensor:
    """Eq. (8): D(p, q) over the last axis, (..., C) -> (...).

    w2: sqrt((|mu_p - mu_q|^2 + |s_p - s_q|^2) / C), the 2-Wasserstein distance of diagonal Gaussians over sqrt(C),
    s the standard deviation. w2_squared: its square. symmetric_kl: mean over channels of (KL(p|q) + KL(q|p)) / 2.
    """
    mean_gap = (p.mean - q.mean).square()
    var_p, var_q = p.var + _VARIANCE_FLOOR, q.var + _VARIANCE_FLOOR
    if kind == "symmetric_kl":
        return 0.25 * ((var_p + mean_gap) / var_q + (var_q + mean_gap) / var_p - 2.0).mean(-1)
    squared = (mean_gap + (var_p.sqrt() - var_q.sqrt()).square()).mean(-1)
    return squared if kind == "w2_squared" else (squared + _DISTANCE_FLOOR).sqrt()


def consistency_loss(expert_maps: Tensor, latent: Gaussian, kind: Distance = "w2") -> Tensor:
    """Eq. (9): L_consis, the distance of the batch's output statistics on Network-E from the latent distribution."""
    return distance(batch_statistics(expert_maps), latent, kind)


def alignment_loss(aligned_maps: Tensor, latent: Gaussian, kind: Distance = "w2", per_image: bool = True) -> Tensor:
    """Eq. (10): L_align, the mean over images of the distance of an image's statistics on Network-A from the latent.

    per_image=False compares the batch average of the images' statistics instead.
    """
    images = image_statistics(aligned_maps)
    if not per_image:
        images = Gaussian(images.mean.mean(0), images.var.mean(0))
    return distance(images, latent, kind).mean()


def identity_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing: logits (N, ids), labels (N,)."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def batch_hard_triplet_loss(features: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Mean over anchors of [d(hardest positive) - d(hardest negative) + margin]_+ (Hermans et al., arXiv 1703.07737).

    Euclidean distances between features (N, D) as they are (before the BNNeck, not normalised). Every identity of the
    batch needs two images, and the batch two identities; raises ValueError otherwise.
    """
    features = features.float()
    same = labels[:, None] == labels[None, :]
    if labels.is_cpu and (bool((same.sum(1) < 2).any()) or bool(same.all())):
        raise ValueError("batch-hard triplets need two images of every identity and two identities in a batch")
    norms = features.square().sum(1)
    squared = norms[:, None] + norms[None, :] - 2.0 * features @ features.T
    distances = squared.clamp_min(1e-12).sqrt()
    hardest_positive = distances.masked_fill(~same, 0.0).amax(1)
    hardest_negative = distances.masked_fill(same, torch.inf).amin(1)
    return F.relu(hardest_positive - hardest_negative + margin).mean()
