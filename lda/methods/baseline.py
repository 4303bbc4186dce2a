"""The plain baseline: one network and one normalisation for all sources, joint classifier, mixed batches.

    L = CE(h(n(e)), y) + w Tri(e, y),   e = GeM(F), n the BNNeck, h one classifier over the identities of all sources

with batch normalisation ("plain BN": one set of statistics for all sources) or instance normalisation ("plain IN") at
every layer. Recipe: Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPRW 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lda.batch import Batch
from lda.groups import Setup
from lda.methods.base import Losses, Method
from lda.parts.backbones import Backbone, backbone_of, convert_norm
from lda.parts.heads import Head, gem, label_offsets
from lda.parts.losses import IdentitySettings, batch_hard_triplet_loss, batch_statistics, identity_loss, scale_of
from lda.settings import setting


@dataclass(frozen=True, kw_only=True)
class BaselineSettings(IdentitySettings):
    """Settings of the plain baseline."""

    baseline_norm: Literal["batch", "instance"] = setting("batch", "normalisation of the baseline")


class Baseline(Method):
    """Identity and triplet loss of one plain network."""

    title = "plain BN"
    reference = "Luo et al., Bag of Tricks and a Strong Baseline for Deep Person Re-identification, CVPRW 2019"
    Settings = BaselineSettings
    settings: BaselineSettings

    def __init__(self, settings: BaselineSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.backbone = backbone_of(setup)
        if settings.baseline_norm == "instance":
            use_instance_norm(self.backbone)
        self.head = Head(self.backbone.channels, [sum(setup.num_ids)])
        self.register_buffer("offsets", label_offsets(setup.num_ids), persistent=False)
        self.offsets: Tensor

    @property
    def label(self) -> str:
        return "plain IN" if self.settings.baseline_norm == "instance" else self.title

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """Identity and triplet loss of one mixed batch."""
        maps = self.backbone(batch.images)
        features = gem(maps, self.setup.network.gem_p)
        labels = batch.labels + self.offsets[batch.domains.to(self.offsets.device)]
        identity = identity_loss(self.head(features, 0), labels, self.settings.label_smoothing)
        triplet = batch_hard_triplet_loss(features, labels, self.settings.triplet_margin)
        return {
            "loss/total": identity + self.settings.triplet_weight * triplet,
            "loss/id": identity,
            "loss/triplet": triplet,
            **scale_of(features, batch_statistics(maps.detach())),
        }

    def encode(self, images: Tensor) -> Tensor:
        """Features (B, D) before the BNNeck, L2-normalised."""
        return F.normalize(gem(self.backbone(images), self.setup.network.gem_p))


def use_instance_norm(backbone: Backbone) -> None:
    """Turn a plain backbone into one with instance normalisation (affine, no running statistics) at every layer."""
    convert_norm(backbone, lambda old: nn.InstanceNorm2d(old.num_features, affine=True))
