"""One training step and the inference of LDA, and the plain baseline beside it.

Both are modules that map images (B, 3, H, W), normalised, to features (B, D), and give a training step as named scalar
losses. Equation numbers are those of the README's table "The method".
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.config import Config
from lda.errors import UsageError
from lda.losses import (
    Distance,
    Gaussian,
    Latent,
    alignment_loss,
    batch_hard_triplet_loss,
    batch_statistics,
    consistency_loss,
    identity_loss,
    latent_distribution,
)
from lda.networks import Head, add_buffer_banks, build_backbone, gem, use_instance_norm
from lda.normalisation import AntiNormalised, BufferBank, Expert, MeanExpert, Route, named_banks

Losses = dict[str, Tensor]
"""Named scalars of one step. `loss/total` is minimised; the other `loss/` terms are unweighted; the rest is watched."""


class TrainingBatch(Protocol):
    """What a step needs of a batch."""

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W), normalised."""

    @property
    def labels(self) -> Tensor:
        """(B,) identities within their domain."""

    @property
    def domains(self) -> Tensor:
        """(B,) domain indices."""


class Baseline(nn.Module):
    """Plain joint normalisation: one statistic set (or instance norm) for all sources, one head, mixed batches."""

    pure_batches = False

    def __init__(self, config: Config, num_ids: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.pretrained, config.activation_checkpointing)
        if config.baseline_norm == "instance":
            use_instance_norm(self.backbone)
        self.head = Head(self.backbone.channels, [sum(num_ids)])
        self.register_buffer("offsets", _offsets(num_ids), persistent=False)

    def training_losses(self, batch: TrainingBatch, step: int) -> Losses:
        """Identity and triplet loss of one mixed batch."""
        maps = self.backbone(batch.images)
        features = gem(maps, self.config.gem_p)
        offsets = cast(Tensor, self.offsets)
        labels = batch.labels + offsets[batch.domains.to(offsets.device)]
        identity = identity_loss(self.head(features, 0), labels, self.config.label_smoothing)
        triplet = batch_hard_triplet_loss(features, labels, self.config.triplet_margin)
        return {
            "loss/total": identity + self.config.triplet_weight * triplet,
            "loss/id": identity,
            "loss/triplet": triplet,
            **_scale(features, batch_statistics(maps.detach())),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) before the BNNeck, L2-normalised."""
        return F.normalize(gem(self.backbone(images), self.config.gem_p))

    def pooled(self, images: Tensor) -> Tensor:
        """Features (B, D) before the BNNeck at their own scale, to watch it."""
        return gem(self.backbone(images), self.config.gem_p)


class LDA(nn.Module):
    """Latent Distribution Alignment: Network-E and Network-A are two passes of one backbone with Buffer Banks.

    Eq. (11): L = [CE + Tri]_E + [CE + Tri]_A + lambda_c L_consis + lambda_a L_align on batches of one domain k.

    Args:
        config: `bank_momentum` is m, `consistency_weight` lambda_c, `alignment_weight` lambda_a.
        num_ids: identities of each source domain; their number is K.

    Raises UsageError for settings that contradict each other.
    """

    pure_batches = True

    def __init__(self, config: Config, num_ids: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.num_domains = len(num_ids)
        _check(config, self.num_domains)
        self.backbone = build_backbone(config.backbone, config.pretrained, config.activation_checkpointing)
        add_buffer_banks(
            self.backbone,
            self.num_domains,
            config.bank_momentum,
            an_affine=config.an_affine == "shared",
            keep_first=config.norm_sites == "no_stem",
        )
        joint = config.classifier == "joint"
        groups = [sum(num_ids)] if joint else list(num_ids)
        self.head_e = Head(self.backbone.channels, groups)
        separate = config.network_a != "none" and config.heads == "separate"
        self.head_a = Head(self.backbone.channels, groups) if separate else self.head_e
        self.output_bank = BufferBank(self.num_domains, self.backbone.channels, config.bank_momentum)
        self.register_buffer("offsets", _offsets(num_ids) if joint else torch.zeros(self.num_domains, dtype=torch.long))

    def training_losses(self, batch: TrainingBatch, step: int) -> Losses:
        """Eq. (11) for one batch of a single domain. Writes row k of every bank."""
        config = self.config
        domain = int(batch.domains[0])
        labels = batch.labels + cast(Tensor, self.offsets)[domain]

        maps_e = self._maps(batch.images, Expert(domain))  # Eqs. (1)-(3), (5)
        features_e = gem(maps_e, config.gem_p)
        output = batch_statistics(maps_e.detach())  # Eq. (6)
        self.output_bank.update(domain, *output)
        latent = self.latent()
        losses = self._identity(self.head_e, features_e, labels, domain, "e")
        losses["loss/consistency"] = consistency_loss(maps_e, latent, cast(Distance, config.distance))  # Eq. (9)
        total = losses["loss/id_e"] + config.triplet_weight * losses["loss/triplet_e"]
        ramp = self.latent_ramp(step)
        total = total + ramp * config.consistency_weight * losses["loss/consistency"]

        if self.aligned_ready():
            maps_a = self._maps(batch.images, AntiNormalised(self.draw_donor(domain, step)))  # Eqs. (4), (5)
            losses |= self._identity(self.head_a, gem(maps_a, config.gem_p), labels, domain, "a")
            losses["loss/alignment"] = alignment_loss(  # Eq. (10)
                maps_a, latent, cast(Distance, config.distance), per_image=config.alignment == "image"
            )
            total = total + losses["loss/id_a"] + config.triplet_weight * losses["loss/triplet_a"]
            total = total + ramp * config.alignment_weight * losses["loss/alignment"]
        return {"loss/total": total, **losses, **_scale(features_e, output)}

    def _maps(self, images: Tensor, route: Route) -> Tensor:
        with self.backbone.switch.on(route):
            maps: Tensor = self.backbone(images)
        return maps

    def _identity(self, head: Head, features: Tensor, labels: Tensor, domain: int, path: str) -> Losses:
        group = domain if self.config.classifier == "per_domain" else 0
        return {
            f"loss/id_{path}": identity_loss(head(features, group), labels, self.config.label_smoothing),
            f"loss/triplet_{path}": batch_hard_triplet_loss(features, labels, self.config.triplet_margin),
        }

    def latent(self) -> Gaussian:
        """Eq. (7) over the domains seen so far: (mu*, v*), (C,) each, no gradient."""
        seen = self.output_bank.seen()
        rows = Gaussian(self.output_bank.mean[seen], self.output_bank.var[seen])
        return latent_distribution(rows, cast(Latent, self.config.latent))

    def latent_ramp(self, step: int) -> float:
        """Share of the latent losses' weights at a step: 0 to 1 over the learning rate's warm-up."""
        warmup = self.config.warmup_epochs * self.config.steps_per_epoch
        return 1.0 if warmup == 0 else min(1.0, step / warmup)

    def aligned_ready(self) -> bool:
        """Network-A starts when every domain's bank row is settled: before, AN would inject noise."""
        if self.config.network_a == "none":
            return False
        return min(self.output_bank.counts) >= max(self.config.bank_warmup_updates, 1)

    def draw_donor(self, domain: int, step: int) -> int | None:
        """The donor j != k of Eq. (4) for a step: a pure function of (seed, step), so that a resumed run agrees."""
        if self.config.network_a == "in":
            return None
        others = [j for j in range(self.num_domains) if j != domain]
        if self.config.donor == "round_robin":
            return others[step % len(others)]
        return random.Random(f"donor {self.config.seed} {step}").choice(others)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) before the BNNeck in the configured inference mode; every image on its own.

        expert: E with mean bank statistics. aligned: mean over all K donors of A. fused: their sum. Every part is
        L2-normalised first.
        """
        parts: list[Tensor] = []
        if self.config.inference in ("fused", "expert"):
            parts.append(F.normalize(self.pooled(images)))
        if self.config.inference in ("fused", "aligned"):
            donors = [None] if self.config.network_a == "in" else list(range(self.num_domains))
            routes = [AntiNormalised(donor) for donor in donors]
            aligned = [F.normalize(gem(self._maps(images, route), self.config.gem_p)) for route in routes]
            parts.append(torch.stack(aligned).mean(0))
        return torch.stack(parts).sum(0)

    def pooled(self, images: Tensor) -> Tensor:
        """Network-E's features (B, D) with mean bank statistics at their own scale, to watch it."""
        return gem(self._maps(images, MeanExpert()), self.config.gem_p)

    def banks(self) -> Iterator[tuple[str, BufferBank]]:
        """(layer name, bank) of every layer, then the bank of output statistics."""
        yield from named_banks(self.backbone)
        yield "output", self.output_bank


Method = LDA | Baseline


def build_method(config: Config, num_ids: Sequence[int]) -> Method:
    """The configured method with fresh weights, drawn from `config.seed` without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LDA(config, num_ids) if config.method == "lda" else Baseline(config, num_ids)


def _check(config: Config, num_domains: int) -> None:
    if config.network_a == "an" and num_domains < 2:
        raise UsageError(
            f"network_a: Anti-Normalization borrows the statistics of another source domain, but {config.protocol} "
            f"trains on {num_domains}; set method=baseline, or network_a=in"
        )
    if config.network_a == "none" and config.inference != "expert":
        raise UsageError(
            f"inference: {config.inference!r} needs Network-A, but network_a is none; set inference=expert"
        )


def _offsets(num_ids: Sequence[int]) -> Tensor:
    """Where each domain's labels start in a joint classifier, (K,)."""
    return torch.tensor([0, *num_ids[:-1]]).cumsum(0)


@torch.no_grad()
def _scale(features: Tensor, output: Gaussian) -> Losses:
    """Feature norm and mean standard deviation of the last map: matching moments can also be won by shrinking them."""
    return {"feature/norm": features.detach().norm(dim=1).mean(), "feature/sigma": output.var.sqrt().mean()}
