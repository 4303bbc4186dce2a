"""The latent distribution of LDA, and its distance from what a path gives out: equations (6) to (10) of its file.

Shapes: maps (N, C, h, w) after a ReLU; statistics (..., C); K source domains.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lda.parts.losses import Gaussian, batch_statistics

Latent = Literal["mean", "barycentre", "mixture", "weighted"]
Distance = Literal["w2", "w2_squared", "l2", "kl", "symmetric_kl"]

# Dead ReLU channels have v = 0, where the square root's slope is infinite; so is it at zero distance.
_VARIANCE_FLOOR = 1e-5
_DISTANCE_FLOOR = 1e-8


def image_statistics(maps: Tensor) -> Gaussian:
    """Per-image mean and variance of (N, C, H, W) over (h, w), as (N, C) each, in fp32."""
    var, mean = torch.var_mean(maps.float(), dim=(2, 3), correction=0)
    return Gaussian(mean, var)


def latent_distribution(domains: Gaussian, kind: Latent = "mean", live: Gaussian | None = None) -> Gaussian:
    """Eq. (7): the latent distribution (mu*, v*), (C,) each, of K domains' output statistics (K, C).

    mean: averages of means and of variances. barycentre: standard deviations averaged, the 2-Wasserstein barycentre of
    diagonal Gaussians. mixture: the moments of the equal-weight mixture, which adds the variance between domains.
    weighted: as mean, with the weights of `relevance` to `live`, the batch's own statistics (C,).
    """
    mean = domains.mean.mean(0)
    if kind == "mean":
        return Gaussian(mean, domains.var.mean(0))
    if kind == "barycentre":
        return Gaussian(mean, domains.var.sqrt().mean(0).square())
    if kind == "mixture":
        return Gaussian(mean, (domains.var + domains.mean.square()).mean(0) - mean.square())
    if live is None:
        raise ValueError("a weighted latent distribution needs the batch's own statistics")
    weights = relevance(live, domains)
    return Gaussian(weights @ domains.mean, weights @ domains.var)


@torch.no_grad()
def relevance(live: Gaussian, rows: Gaussian) -> Tensor:
    """softmax_k(-D(live, row k) / mean_k D): live (..., C), rows (K, C) -> (..., K). The scale of D cancels; META has
    the same weights with a learnt scale."""
    gaps = distance(Gaussian(live.mean[..., None, :], live.var[..., None, :]), rows)
    return torch.softmax(-gaps / gaps.mean(-1, keepdim=True), -1)


def distance(p: Gaussian, q: Gaussian, kind: Distance = "w2") -> Tensor:
    """Eq. (8): D(p, q) over the last axis, (..., C) -> (...).

    w2: sqrt((|mu_p - mu_q|^2 + |s_p - s_q|^2) / C), the 2-Wasserstein distance of diagonal Gaussians over sqrt(C),
    s the standard deviation. w2_squared: its square. l2: with variances in the place of standard deviations. kl: the
    mean over channels of KL(p|q). symmetric_kl: of (KL(p|q) + KL(q|p)) / 2.
    """
    gap = (p.mean - q.mean).square()
    var_p, var_q = p.var + _VARIANCE_FLOOR, q.var + _VARIANCE_FLOOR
    if kind == "symmetric_kl":
        return 0.25 * ((var_p + gap) / var_q + (var_q + gap) / var_p - 2.0).mean(-1)
    if kind == "kl":
        return 0.5 * ((var_q / var_p).log() + (var_p + gap) / var_q - 1.0).mean(-1)
    spread = var_p - var_q if kind == "l2" else var_p.sqrt() - var_q.sqrt()
    squared = (gap + spread.square()).mean(-1)
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


def gradient_ratio(latent_loss: Tensor, identity_loss: Tensor, last_map: Tensor) -> Tensor:
    """Norm of a latent loss's gradient at the map (N, C, h, w) it is a function of, over that of the identity losses.

    Times the loss's weight it says how hard the loss pulls at the network; both graphs stay as they are. 0 where no
    gradient is recorded.
    """
    if not torch.is_grad_enabled():
        return torch.zeros_like(latent_loss)

    def norm(loss: Tensor) -> Tensor:
        gradient: Tensor = torch.autograd.grad(loss, last_map, retain_graph=True)[0]
        length: Tensor = torch.linalg.vector_norm(gradient.float())
        return length

    return norm(latent_loss) / norm(identity_loss).clamp_min(torch.finfo(torch.float32).tiny)
