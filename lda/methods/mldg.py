"""MLDG: Learning to Generalize, Meta-Learning for Domain Generalization (Li, Yang, Song, Hospedales), AAAI 2018.

One source h of a mixed batch is held out, the other K - 1 are trained on. A virtual step on these should lower the loss
of the one that is held out. theta (all weights), alpha the rate of the inner step, beta `mldg_beta`; images (B, 3, H,
W), features e (B, D), one joint classifier over the identities of all sources; L = CE(h(n(e)), y) + w Tri(e, y).

    (1) g_tr   = grad L(images of the other sources; theta), constant from here on
    (2) theta' = theta - alpha u(g_tr)     sgd: u(g) = g;  adam_first: u(g) = g / (|g| + 1e-8), a fresh Adam's step
    (3) g_te   = grad L(images of source h; theta') with respect to theta'
    (4) theta <- optimiser(g_tr + beta g_te)
    (5) alpha  = mldg_inner_rate x the schedule's rate of this step

First order: (2) is a shift by a constant, no second derivatives. (4) is the gradient of <g_tr, theta> + beta L_te, so
every image passes the network once and only once. Batch normalisation takes the statistics of each part by itself, and
each part enters the running statistics once. h is drawn from (seed, step). A part of a single identity has no triplets.

Confidence 90 %: (1) to (4) are the paper's and DomainBed's (algorithms.py, class MLDG), but for the held-out source,
one a step here. Both releases that were read step by a fresh Adam in (2) (`adam_first`); the paper's text by `sgd`.
dgreid's port divides both gradients by K, which Adam does not see. Ours: the losses of re-identification, (5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lda.batch import Batch
from lda.groups import Setup
from lda.methods.base import Losses, Method
from lda.parts.backbones import backbone_of
from lda.parts.episodes import (
    draw_held_out,
    inner_gradient,
    inner_step,
    refuse_recomputation,
    split_by_domain,
    virtual_call,
)
from lda.parts.heads import Head, gem, label_offsets
from lda.parts.losses import IdentitySettings, batch_hard_triplet_loss, batch_statistics, identity_loss, scale_of
from lda.settings import Range, setting


@dataclass(frozen=True, kw_only=True)
class MLDGSettings(IdentitySettings):
    """Settings of MLDG."""

    mldg_beta: float = setting(
        0.5, "beta of Eq. (4), weight of the held-out source", "dgreid", low=0.0, high=10.0, search=Range(0.1, 2.0)
    )
    mldg_inner: Literal["sgd", "adam_first"] = setting(
        "sgd", "u of Eq. (2): sgd, or the first step of a fresh Adam", "MLDG; DomainBed, dgreid adam_first"
    )
    mldg_inner_rate: float = setting(
        1.0, "rate of Eq. (2) over the schedule's at that step", "DomainBed, dgreid", low=0.0, high=1000.0,
        search=Range(0.1, 10.0, log=True),
    )  # fmt: skip


class MLDG(Method):
    """One network; a virtual step on all sources but one, judged by that one, first order."""

    title = "MLDG"
    reference = "Li, Yang, Song, Hospedales: Learning to Generalize, Meta-Learning for Domain Generalization, AAAI 2018"
    searched = ("mldg_beta", "mldg_inner", "mldg_inner_rate")
    min_domains = 2
    Settings = MLDGSettings
    settings: MLDGSettings

    def __init__(self, settings: MLDGSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        refuse_recomputation(setup, self.title)
        self.backbone = backbone_of(setup)
        self.head = Head(self.backbone.channels, [sum(setup.num_ids)])
        self.register_buffer("offsets", label_offsets(setup.num_ids), persistent=False)
        self.offsets: Tensor

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """Eqs. (1) to (4): `loss/total` has the value L_tr + beta L_te and the gradient g_tr + beta g_te."""
        settings = self.settings
        theta = {name: p for name, p in self.named_parameters() if p.requires_grad}
        others, held_out = split_by_domain(batch, draw_held_out(batch.domains, self.setup.seed, step))

        losses = self._losses(others, {}, "")
        value = losses["loss/id"] + settings.triplet_weight * losses["loss/triplet"]
        gradient = inner_gradient(value, theta)  # Eq. (1)
        rate = settings.mldg_inner_rate * self.setup.schedule.rate(step)  # Eq. (5)
        virtual = inner_step(theta, gradient, rate, settings.mldg_inner)  # Eq. (2)

        losses |= self._losses(held_out, virtual, "_held_out")
        judged = losses["loss/id_held_out"] + settings.triplet_weight * losses["loss/triplet_held_out"]
        # <g_tr, theta> less its own value: the gradient g_tr, and nothing else.
        slope = torch.stack([(g * theta[name]).sum() for name, g in gradient.items()]).sum()
        total = value.detach() + (slope - slope.detach()) + settings.mldg_beta * judged
        return {"loss/total": total, **losses}

    def _losses(self, batch: Batch, weights: Mapping[str, Tensor], path: str) -> Losses:
        maps: Tensor = virtual_call(self, "backbone", weights, batch.images)
        features = gem(maps, self.setup.network.gem_p)
        labels = batch.labels + self.offsets[batch.domains.to(self.offsets.device)]
        logits: Tensor = virtual_call(self, "head", weights, features, 0)
        losses = {
            f"loss/id{path}": identity_loss(logits, labels, self.settings.label_smoothing),
            f"loss/triplet{path}": batch_hard_triplet_loss(features, labels, self.settings.triplet_margin, part=True),
        }
        return losses if path else losses | scale_of(features, batch_statistics(maps.detach()))

    def encode(self, images: Tensor) -> Tensor:
        """Features (B, D) before the BNNeck, L2-normalised."""
        return F.normalize(gem(self.backbone(images), self.setup.network.gem_p))
