"""LDA: Latent Distribution Alignment (Nie, Ding, He, Zhou), re-implemented from its poster.

X is a layer's input (N images, C channels), k the batch's source domain, j != k the donor, K the number of sources, m
the bank momentum, lambda_c and lambda_a the weights of the latent losses; mu_b, v_b are moments of the batch over
(n, h, w), mu_i, v_i of image i over (h, w); row k of a bank holds mu_k, v_k; sigma = sqrt(v + eps).

    Network-E, the expert: batch normalisation on batches of one domain, and the Buffer Bank that remembers it
        (1)  E_k(X) = gamma (X - mu_b) / sigma_b + beta
        (2)  mu_b, v_b = mean and variance of X over (n, h, w)
        (3)  mu_k <- m mu_k + (1 - m) mu_b,   v_k <- m v_k + (1 - m) v_b
    Network-A, Anti-Normalization: an image as if it came from an unseen domain, given another domain's statistics
        (4)  AN(X_i) = sigma_j (X_i - mu_i) / sigma_i + mu_j
    The latent distribution, without gradient
        (5)  F_E, F_A = the last maps of both paths, after the ReLU
        (6)  M_k, V_k = bank of the mean and variance of F_E, kept as in (3)
        (7)  mu* = mean_k M_k,   v* = mean_k V_k
        (8)  D(p, q)^2 = (|mu_p - mu_q|^2 + |sigma_p - sigma_q|^2) / C
    The losses
        (9)  L_consis = D(batch statistics of F_E, latent)
        (10) L_align = mean_i D(statistics of F_A,i, latent)
        (11) L = [CE + Tri]_E + [CE + Tri]_A + lambda_c L_consis + lambda_a L_align

Not on the poster, so our reading: the form of (7) to (10), the weights, the inference rule, the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.batch import Batch, Layout
from lda.errors import UsageError
from lda.groups import Setup
from lda.kept import Kept
from lda.methods.base import Cost, Losses, Method
from lda.parts.backbones import Backbone, backbone_of, convert_norm
from lda.parts.bank import BufferBank, draw_donor
from lda.parts.bank_pictures import kept_banks
from lda.parts.heads import Head, gem, label_offsets
from lda.parts.losses import (
    Gaussian,
    IdentitySettings,
    batch_hard_triplet_loss,
    batch_statistics,
    identity_loss,
    scale_of,
)
from lda.parts.routes import RecordingLayer, Switch
from lda.settings import Range, setting

Latent = Literal["mean", "barycentre", "mixture"]
Distance = Literal["w2", "w2_squared", "symmetric_kl"]


@dataclass(frozen=True, kw_only=True)
class LDASettings(IdentitySettings):
    """Settings of LDA."""

    bank_momentum: float = setting(
        0.9, "m of Eq. (3): bank <- m * bank + (1 - m) * batch", "ReNorm, META", low=0.0, high=0.9999,
        search=Range(0.5, 0.99),
    )  # fmt: skip
    consistency_weight: float = setting(
        0.1, "lambda_c of Eq. (11), weight of L_consis", low=0.0, high=100.0, search=Range(0.01, 5.0, log=True)
    )
    alignment_weight: float = setting(
        0.1, "lambda_a of Eq. (11), weight of L_align", low=0.0, high=100.0, search=Range(0.01, 5.0, log=True)
    )
    bank_warmup_updates: int = setting(
        50, "bank updates every domain must have before Network-A starts (0: at once)", low=0, high=10**6, standin=5,
        search=Range(0, 100),
    )  # fmt: skip
    network_a: Literal["an", "in", "none"] = setting(
        "an", "second path: an = Anti-Normalization, in = instance norm without the bank, none", "poster"
    )
    an_affine: Literal["none", "shared"] = setting(
        "none", "after AN: none, or the shared gamma and beta of Network-E", "poster"
    )
    donor: Literal["uniform", "round_robin"] = setting(
        "uniform", "choice of the donor j != k of Eq. (4), one per step", "poster (another domain)"
    )
    norm_sites: Literal["all", "no_stem"] = setting(
        "all", "layers that hold a Buffer Bank; no_stem leaves the first one plain", "poster (every layer)"
    )
    latent: Latent = setting("mean", "latent distribution of Eq. (7)")
    distance: Distance = setting("w2", "D of Eq. (8)", "META's 2-Wasserstein helper")
    alignment: Literal["image", "batch"] = setting("image", "L_align of Eq. (10) per image, or on the batch average")
    heads: Literal["separate", "shared"] = setting("separate", "BNNeck and classifier of the two paths", "ReNorm")
    classifier: Literal["per_domain", "joint"] = setting(
        "per_domain", "one BNNeck and classifier per source, or one over all sources", "ReNorm, ACL"
    )
    inference: Literal["fused", "aligned", "expert"] = setting(
        "fused", "fused = expert + aligned; aligned = mean of Network-A over donors; expert = Network-E, mean bank",
        "ReNorm", test=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network_a == "none" and self.inference != "expert":
            raise UsageError(
                f"inference: {self.inference!r} needs Network-A, but network_a is none; set inference=expert"
            )


# --- Eqs. (1) to (4): the layer with its two paths -------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    """Network-E on a batch of one domain. Training: the batch's own statistics, which enter bank row `domain`;
    evaluation: bank row `domain` itself."""

    domain: int


@dataclass(frozen=True)
class AntiNormalised:
    """Network-A: per-image statistics are replaced by bank row `donor`."""

    donor: int


@dataclass(frozen=True)
class InstanceNormalised:
    """The second path without a bank: gamma (X_i - mu_i) / sigma_i + beta."""


@dataclass(frozen=True)
class MeanExpert:
    """Network-E on an unseen domain: every layer normalises with the average of its bank's rows."""


Route = Expert | AntiNormalised | InstanceNormalised | MeanExpert


class BufferBankNorm2d(RecordingLayer):
    """A normalisation layer whose statistics are kept per source domain, with two paths chosen by `switch`.

    Network-E, Eqs. (1)-(3):  E_k(X) = gamma (X - mu_b) / sqrt(v_b + eps) + beta
    with mu_b and v_b the batch's mean and variance over (n, h, w), which enter row k of the bank.

    Network-A, Eq. (4):  AN(X_i) = sqrt(v_j + eps) (X_i - mu_i) / sqrt(v_i + eps) + mu_j
    with mu_i and v_i the mean and variance of image i over (h, w), and mu_j, v_j row j of the bank, read only.

    gamma and beta are shared by all domains, so the layer has exactly the parameters of `nn.BatchNorm2d`, and with one
    domain it is that layer.

    AN *replaces* the normalisation of a layer: followed by normalisation with the same row j it would cancel to plain
    instance normalisation.

    Args:
        bank: the K x C Buffer Bank of this layer.
        switch: shared by the network.
        an_affine: False: sigma_j and mu_j take the place of gamma and beta; True: gamma AN + beta.
    """

    def __init__(self, bank: BufferBank, switch: Switch[Route], an_affine: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        num_features = bank.mean.shape[1]
        self.bank, self.switch, self.an_affine, self.eps = bank, switch, an_affine, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). Raises RuntimeError outside `with switch.on(route)`."""
        match self.switch.route:
            case Expert(domain):
                return self._expert(x, domain)
            case AntiNormalised(donor):
                return self._anti_normalised(x, donor)
            case InstanceNormalised():
                return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
            case MeanExpert():
                mean, var = self.bank.mean.mean(0), self.bank.var.mean(0)
                return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    def _expert(self, x: Tensor, domain: int) -> Tensor:
        mean, var = self.bank.mean[domain], self.bank.var[domain]  # views: the kernel writes Eq. (3) into them
        if not self.training:
            return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)
        # A share of 0 leaves the row as it is, and saves the same tensors for the backward pass as recording does.
        share = self.bank.count_update(domain) if self.recording else 0.0
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=share, eps=self.eps)

    def _anti_normalised(self, x: Tensor, donor: int) -> Tensor:
        mean, deviation = self.bank.mean[donor], (self.bank.var[donor] + self.eps).sqrt()  # Eq. (4): mu_j, sigma_j
        if self.an_affine:
            mean, deviation = self.weight * mean + self.bias, self.weight * deviation
        return F.instance_norm(x, weight=deviation, bias=mean, eps=self.eps)


def add_buffer_banks(
    backbone: Backbone, num_domains: int, momentum: float, an_affine: bool = False, keep_first: bool = False
) -> Switch[Route]:
    """Turn a plain backbone into the two-path network: a Buffer Bank of K domains at every normalisation layer.

    Returns the switch that chooses the path.
    """
    switch: Switch[Route] = Switch()

    def make(old: nn.BatchNorm2d) -> BufferBankNorm2d:
        return BufferBankNorm2d(BufferBank(num_domains, old.num_features, momentum), switch, an_affine)

    convert_norm(backbone, make, keep_first)
    backbone.replay = switch.remembered
    return switch


def named_banks(network: nn.Module) -> Iterator[tuple[str, BufferBank]]:
    """(layer name, bank) of every Buffer Bank layer, in network order."""
    for name, module in network.named_modules():
        if isinstance(module, BufferBankNorm2d):
            yield name, module.bank


# --- Eqs. (6) to (10): the latent distribution and its losses --------------------------------------------------------

# Dead ReLU channels have v = 0, where the square root's slope is infinite; so is it at zero distance.
_VARIANCE_FLOOR = 1e-5
_DISTANCE_FLOOR = 1e-8


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


# --- Eq. (11) and inference ------------------------------------------------------------------------------------------


class LDA(Method):
    """Network-E and Network-A are two passes of one backbone with Buffer Banks, on batches of one domain k."""

    title = "LDA"
    reference = "Nie, Ding, He, Zhou: Latent Distribution Alignment (poster)"
    searched = ("consistency_weight", "alignment_weight", "bank_momentum")
    Settings = LDASettings
    settings: LDASettings

    def __init__(self, settings: LDASettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        if settings.network_a == "an" and self.num_domains < 2:
            raise UsageError(
                "network_a: Anti-Normalization borrows the statistics of another source domain, but this protocol "
                f"trains on {self.num_domains}; set network_a=in, or choose another method"
            )
        self.backbone = backbone_of(setup)
        self.switch = add_buffer_banks(
            self.backbone,
            self.num_domains,
            settings.bank_momentum,
            an_affine=settings.an_affine == "shared",
            keep_first=settings.norm_sites == "no_stem",
        )
        joint = settings.classifier == "joint"
        groups = [sum(setup.num_ids)] if joint else list(setup.num_ids)
        self.head_e = Head(self.backbone.channels, groups)
        separate = settings.network_a != "none" and settings.heads == "separate"
        self.head_a = Head(self.backbone.channels, groups) if separate else self.head_e
        self.output_bank = BufferBank(self.num_domains, self.backbone.channels, settings.bank_momentum)
        self.offsets = label_offsets(setup.num_ids).tolist() if joint else [0] * self.num_domains

    @property
    def layout(self) -> Layout:
        return Layout(domains="one")

    @property
    def inference(self) -> str:
        return self.settings.inference

    @property
    def cost(self) -> Cost:
        donors = 1 if self.settings.network_a == "in" else self.num_domains
        forwards = {"expert": 1, "aligned": donors, "fused": 1 + donors}[self.settings.inference]
        return Cost(train_passes=1 if self.settings.network_a == "none" else 2, test_forwards=forwards)

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """Eq. (11) for one batch of a single domain. Writes row k of every bank."""
        settings = self.settings
        domain = int(batch.domains[0])
        labels = batch.labels + self.offsets[domain]

        maps_e = self._maps(batch.images, Expert(domain))  # Eqs. (1)-(3), (5)
        features_e = gem(maps_e, self.setup.network.gem_p)
        output = batch_statistics(maps_e.detach())  # Eq. (6)
        self.output_bank.update(domain, *output)
        latent = self.latent()
        losses = self._identity(self.head_e, features_e, labels, domain, "e")
        losses["loss/consistency"] = consistency_loss(maps_e, latent, settings.distance)  # Eq. (9)
        total = losses["loss/id_e"] + settings.triplet_weight * losses["loss/triplet_e"]
        ramp = self.latent_ramp(step)
        total = total + ramp * settings.consistency_weight * losses["loss/consistency"]

        if self.aligned_ready():
            maps_a = self._maps(batch.images, self.draw_route(domain, step))  # Eqs. (4), (5)
            features_a = gem(maps_a, self.setup.network.gem_p)
            losses |= self._identity(self.head_a, features_a, labels, domain, "a")
            losses["loss/alignment"] = alignment_loss(  # Eq. (10)
                maps_a, latent, settings.distance, per_image=settings.alignment == "image"
            )
            total = total + losses["loss/id_a"] + settings.triplet_weight * losses["loss/triplet_a"]
            total = total + ramp * settings.alignment_weight * losses["loss/alignment"]
        return {"loss/total": total, **losses, **scale_of(features_e, output)}

    def _maps(self, images: Tensor, route: Route) -> Tensor:
        with self.switch.on(route):
            maps: Tensor = self.backbone(images)
        return maps

    def _identity(self, head: Head, features: Tensor, labels: Tensor, domain: int, path: str) -> Losses:
        group = domain if self.settings.classifier == "per_domain" else 0
        return {
            f"loss/id_{path}": identity_loss(head(features, group), labels, self.settings.label_smoothing),
            f"loss/triplet_{path}": batch_hard_triplet_loss(features, labels, self.settings.triplet_margin),
        }

    def latent(self) -> Gaussian:
        """Eq. (7) over the domains seen so far: (mu*, v*), (C,) each, no gradient."""
        seen = self.output_bank.seen()
        rows = Gaussian(self.output_bank.mean[seen], self.output_bank.var[seen])
        return latent_distribution(rows, self.settings.latent)

    def latent_ramp(self, step: int) -> float:
        """Share of the latent losses' weights at a step: 0 to 1 over the learning rate's warm-up."""
        warmup = self.setup.schedule.warmup_steps
        return 1.0 if warmup == 0 else min(1.0, step / warmup)

    def aligned_ready(self) -> bool:
        """Network-A starts when every domain's bank row is settled: before, AN would inject noise."""
        if self.settings.network_a == "none":
            return False
        return min(self.output_bank.counts) >= max(self.settings.bank_warmup_updates, 1)

    def draw_route(self, domain: int, step: int) -> Route:
        """The second path of a step; its donor j != k is a function of (seed, step), so that a resumed run agrees."""
        if self.settings.network_a == "in":
            return InstanceNormalised()
        return AntiNormalised(draw_donor(self.settings.donor, domain, self.num_domains, self.setup.seed, step))

    def encode(self, images: Tensor) -> Tensor:
        """Features (B, D) before the BNNeck in the configured inference mode; every image on its own.

        expert: E with mean bank statistics. aligned: mean over all K donors of A. fused: their sum. Every part is
        L2-normalised first.
        """
        parts: list[Tensor] = []
        if self.settings.inference in ("fused", "expert"):
            parts.append(self._feature(images, MeanExpert()))
        if self.settings.inference in ("fused", "aligned"):
            routes: list[Route] = [AntiNormalised(donor) for donor in range(self.num_domains)]
            if self.settings.network_a == "in":
                routes = [InstanceNormalised()]
            parts.append(torch.stack([self._feature(images, route) for route in routes]).mean(0))
        return torch.stack(parts).sum(0)

    def _feature(self, images: Tensor, route: Route) -> Tensor:
        return F.normalize(gem(self._maps(images, route), self.setup.network.gem_p))

    def banks(self) -> Iterator[tuple[str, BufferBank]]:
        """(layer name, bank) of every layer, then the bank of output statistics."""
        yield from named_banks(self.backbone)
        yield "output", self.output_bank

    def kept(self, domains: list[str]) -> dict[str, Kept]:
        return kept_banks(domains, dict(self.banks()))
