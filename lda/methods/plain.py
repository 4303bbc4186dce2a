"""The step that methods share which differ from the plain baseline by their layers only.

    L = CE(h(n(e)), y) + w Tri(e, y),   e = GeM(F), n the BNNeck, h one classifier over the identities of all sources

Shapes: B images of a mixed batch, K sources, D feature size; F the last map (B, D, h, w), e (B, D).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lda.batch import Batch
from lda.groups import Setup
from lda.methods.base import Losses, Method
from lda.parts.backbones import backbone_of
from lda.parts.heads import Head, gem, label_offsets
from lda.parts.losses import IdentitySettings, batch_hard_triplet_loss, batch_statistics, identity_loss, scale_of


class PlainMethod(Method):
    """Identity and triplet loss of one network with a joint classifier, on mixed batches.

    A method derives from it, and changes layers of `backbone` after this constructor; weights are drawn here, so two
    methods of one seed begin with the same.
    """

    settings: IdentitySettings

    def __init__(self, settings: IdentitySettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.backbone = backbone_of(setup)
        self.head = Head(self.backbone.channels, [sum(setup.num_ids)])
        self.register_buffer("offsets", label_offsets(setup.num_ids), persistent=False)
        self.offsets: Tensor

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """Identity and triplet loss of one mixed batch."""
        return self.passed(batch)[1]

    def passed(self, batch: Batch) -> tuple[Tensor, Losses]:
        """e (B, D) of a mixed batch, and `training_losses`."""
        maps = self.backbone(batch.images)
        features = self.pooled(maps)
        identity, triplet = self.identity_terms(self.head, features, self.joint_labels(batch))
        return features, {
            "loss/total": identity + self.settings.triplet_weight * triplet,
            "loss/id": identity,
            "loss/triplet": triplet,
            **scale_of(features, batch_statistics(maps.detach())),
        }

    def pooled(self, maps: Tensor) -> Tensor:
        """e: maps (B, D, h, w) -> features (B, D) before the BNNeck."""
        return gem(maps, self.setup.network.gem_p)

    def joint_labels(self, batch: Batch) -> Tensor:
        """y: (B,) identities among those of all sources."""
        return batch.labels + self.offsets[batch.domains.to(self.offsets.device)]

    def identity_terms(self, head: Head, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """CE and Tri of features (B, D) and joint labels (B,), unweighted scalars."""
        identity = identity_loss(head(features, 0), labels, self.settings.label_smoothing)
        return identity, batch_hard_triplet_loss(features, labels, self.settings.triplet_margin)

    def encode(self, images: Tensor) -> Tensor:
        """Features (B, D) before the BNNeck, L2-normalised."""
        return F.normalize(self.pooled(self.backbone(images)))
