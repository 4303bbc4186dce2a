"""DSBN: Domain-Specific Batch Normalization for Unsupervised Domain Adaptation (Chang, You, Seo, Kwak, Han), CVPR 2019.

One network with K sets of batch normalisation; everything else in it is shared by the K source domains. X_k (N_k, C,
H, W): the images of domain k among the N of a mixed batch, at one layer; set k: m_k, V_k, gamma_k, beta_k, (C,) each.

    (1) DSBN(X_k) = gamma_k (X_k - mu_k) / sqrt(v_k + eps) + beta_k    mu_k, v_k: moments of X_k over (n, h, w)
    (2) m_k, V_k <- running averages of mu_k and of v_k (torch's momentum 0.1)
    (3) L = mean_n CE(h_k(n_k(e_n)), y_n) + w Tri(e, y)                e = GeM(F) (N, D)
    `dsbn_affine=shared`: gamma_k = gamma and beta_k = beta for all k

A mixed batch is split by domain at each layer and put together again: one pass, in which every domain is normalised as
if it had passed alone, and sets of domains that are not in the batch are neither moved nor decayed. The BNNeck n_k is a
batch normalisation too, so each domain has its own, with its own classifier h_k; triplets are mined in the whole batch.

The paper has no rule for a domain that it has not seen. Choices, l2 the normalisation of a vector to length one:
    ensemble    f = mean_k l2(e under set k)                                        K forward passes
    mean_stats  f = l2(e under the average of m_k, of V_k, of gamma_k, of beta_k)   1
    nearest     f = l2(e under set k*), k* = argmin_k sum_l W_l,k                   K
W_l,k is META's distance of the image's statistics from set k at layer l (`lda.parts.domain_norm.site_distances`).

Confidence 90 % in training (1), (2); in the inference rule none, it is our choice. LDA without its second path and its
latent losses is DSBN with a shared affine; META without its global branch and its mixture is DSBN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lda.batch import Batch
from lda.groups import Setup
from lda.methods.base import Cost, Losses, Method
from lda.parts.backbones import backbone_of
from lda.parts.domain_norm import DomainRoute, MeanSet, OneSet, RowWise, site_distances, use_domain_norm
from lda.parts.heads import Head, gem, label_offsets
from lda.parts.losses import IdentitySettings, batch_hard_triplet_loss, batch_statistics, identity_loss, scale_of
from lda.settings import setting


@dataclass(frozen=True, kw_only=True)
class DSBNSettings(IdentitySettings):
    """Settings of DSBN."""

    dsbn_affine: Literal["per_domain", "shared"] = setting(
        "per_domain", "gamma and beta of Eq. (1): a set for each domain, or one for all", "DSBN"
    )
    dsbn_inference: Literal["ensemble", "mean_stats", "nearest"] = setting(
        "ensemble", "set for an unseen domain: mean feature of all, average of all, or the nearest per image", test=True
    )


class DSBN(Method):
    """One network with a set of batch normalisation per source domain."""

    title = "DSBN"
    reference = (
        "Chang, You, Seo, Kwak, Han: Domain-Specific Batch Normalization for Unsupervised Domain Adaptation, CVPR 2019"
    )
    searched = ("dsbn_affine",)
    Settings = DSBNSettings
    settings: DSBNSettings

    def __init__(self, settings: DSBNSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.backbone = backbone_of(setup)
        self.switch = use_domain_norm(self.backbone, self.num_domains, settings.dsbn_affine == "shared")
        self.head = Head(self.backbone.channels, setup.num_ids)
        self.register_buffer("offsets", label_offsets(setup.num_ids), persistent=False)
        self.offsets: Tensor

    @property
    def inference(self) -> str:
        return self.settings.dsbn_inference

    @property
    def cost(self) -> Cost:
        return Cost(test_forwards=1 if self.settings.dsbn_inference == "mean_stats" else self.num_domains)

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """Eqs. (1) to (3) on a batch of any domains. Writes the running statistics of these domains' sets."""
        settings = self.settings
        route = RowWise(batch.domains)
        maps = self._maps(batch.images, route)
        features = gem(maps, self.setup.network.gem_p)
        identity = torch.zeros((), device=features.device)
        for domain, where in route.rows(features.device).of:
            logits = self.head(features[where], domain)
            share = len(where) / len(features)
            identity = identity + share * identity_loss(logits, batch.labels[where], settings.label_smoothing)
        everyone = batch.labels + self.offsets[batch.domains.to(self.offsets.device)]
        triplet = batch_hard_triplet_loss(features, everyone, settings.triplet_margin)
        return {
            "loss/total": identity + settings.triplet_weight * triplet,
            "loss/id": identity,
            "loss/triplet": triplet,
            **scale_of(features, batch_statistics(maps.detach())),
        }

    def _maps(self, images: Tensor, route: DomainRoute) -> Tensor:
        with self.switch.on(route):
            maps: Tensor = self.backbone(images)
        return maps

    def encode(self, images: Tensor) -> Tensor:
        """Features (B, D) before the BNNeck by the configured choice of the set; every image on its own."""
        if self.settings.dsbn_inference == "mean_stats":
            return self._feature(images, MeanSet())
        features, distances = [], []
        for domain in range(self.num_domains):
            with site_distances(self.backbone) as found:
                features.append(self._feature(images, OneSet(domain)))
            distances.append(torch.stack(found).sum(0))
        of_all = torch.stack(features)  # (K, B, D)
        if self.settings.dsbn_inference == "ensemble":
            return of_all.mean(0)
        nearest = torch.stack(distances).argmin(0)  # (B,)
        return of_all[nearest, torch.arange(len(images), device=images.device)]

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """None: which sets an image passes through is chosen for each one."""
        return {}

    def _feature(self, images: Tensor, route: DomainRoute) -> Tensor:
        return F.normalize(gem(self._maps(images, route), self.setup.network.gem_p))
