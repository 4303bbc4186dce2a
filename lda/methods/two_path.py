"""Two paths through one network, batch normalisation (BN) and instance normalisation (IN): the control of LDA.

It is LDA without its Buffer Bank, without donors and without latent losses. What LDA gains beyond this comes from its
mechanism; what this gains over the plain baseline, also at twice its steps, comes from a second path and a second head.

    (1)  BN(X) = gamma (X - mu_b) / sqrt(v_b + eps) + beta,   mu_b, v_b of the batch over (n, h, w)
    (2)  IN(X_i) = gamma (X_i - mu_i) / sqrt(v_i + eps) + beta,   mu_i, v_i of image i over (h, w)
    (3)  L = [CE + w Tri]_BN + [CE + w Tri]_IN
    (4)  f = n(e_BN) + n(e_IN),   n the L2 norm, e the features before the BNNecks

Both paths share convolutions, gamma and beta; each has its own BNNeck and joint classifier. Batches are mixed. BN keeps
one plain set of running statistics, updated once a step; the IN pass writes nothing.

No paper: the two paths, their separate heads and the fused feature are those of LDA (Nie, Ding, He and Zhou, poster)
and of ReNorm (ECCV 2024), each with its own mechanism taken out. Nothing published to be compared with.

Shapes: X (B, C, H, W) a layer's input, e and f (B, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.batch import Batch
from lda.groups import Setup
from lda.methods.base import Cost, Losses
from lda.methods.plain import PlainMethod
from lda.parts.backbones import Backbone, convert_norm
from lda.parts.heads import Head
from lda.parts.instance_sites import instance_norm
from lda.parts.losses import IdentitySettings, batch_statistics, scale_of
from lda.parts.routes import Switch
from lda.settings import setting

Path = Literal["bn", "in"]


@dataclass(frozen=True, kw_only=True)
class TwoPathSettings(IdentitySettings):
    """Settings of the two paths."""

    inference: Literal["fused", "bn", "in"] = setting(
        "fused", "fused = bn + in; bn, in = the feature of one path", "LDA's default", test=True
    )


class TwoPathNorm2d(nn.BatchNorm2d):
    """Equations (1) and (2) with one gamma and beta, chosen by `switch`; the rest is the plain layer, its state too.

    Args:
        old: layer whose gamma, beta and running statistics it begins with.
        switch: shared by the network.
    """

    def __init__(self, old: nn.BatchNorm2d, switch: Switch[Path]) -> None:
        super().__init__(old.num_features, old.eps, old.momentum)
        self.load_state_dict(old.state_dict())
        self.switch = switch

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). Raises RuntimeError outside `with switch.on(path)`."""
        if self.switch.route == "bn":
            return super().forward(input)
        return instance_norm(input, self.weight, self.bias, self.eps)


def use_two_paths(backbone: Backbone) -> Switch[Path]:
    """Let every normalisation layer of a plain backbone know both paths. Returns the switch that chooses."""
    switch: Switch[Path] = Switch()
    convert_norm(backbone, lambda old: TwoPathNorm2d(old, switch))
    backbone.replay = switch.remembered
    return switch


class TwoPath(PlainMethod):
    """A BN pass and an IN pass of one backbone, with a head each; `head` is that of the BN path."""

    title = "two paths, BN and IN"
    reference = "no paper: LDA (Nie, Ding, He and Zhou, poster) without bank and latent losses, the control of LDA"
    Settings = TwoPathSettings
    settings: TwoPathSettings

    def __init__(self, settings: TwoPathSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.switch = use_two_paths(self.backbone)
        self.head_in = Head(self.backbone.channels, [sum(setup.num_ids)])

    @property
    def inference(self) -> str:
        return self.settings.inference

    @property
    def cost(self) -> Cost:
        return Cost(train_passes=2, test_forwards=2 if self.settings.inference == "fused" else 1)

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """Equation (3) for one mixed batch. Updates BN's running statistics once."""
        labels = self.joint_labels(batch)
        maps_bn, maps_in = self.maps(batch.images, "bn"), self.maps(batch.images, "in")
        features_bn, features_in = self.pooled(maps_bn), self.pooled(maps_in)
        identity_bn, triplet_bn = self.identity_terms(self.head, features_bn, labels)
        identity_in, triplet_in = self.identity_terms(self.head_in, features_in, labels)
        weight = self.settings.triplet_weight
        return {
            "loss/total": (identity_bn + weight * triplet_bn) + (identity_in + weight * triplet_in),
            "loss/id_bn": identity_bn,
            "loss/triplet_bn": triplet_bn,
            "loss/id_in": identity_in,
            "loss/triplet_in": triplet_in,
            **scale_of(features_bn, batch_statistics(maps_bn.detach())),
        }

    def maps(self, images: Tensor, path: Path) -> Tensor:
        """(B, 3, H, W) -> the last maps (B, D, h, w) of one path."""
        with self.switch.on(path):
            maps: Tensor = self.backbone(images)
        return maps

    def encode(self, images: Tensor) -> Tensor:
        """Equation (4): features (B, D) before the BNNecks; the sum of both paths, or one of them, each L2-normalised
        first."""
        return torch.stack([F.normalize(self.pooled(self.maps(images, path))) for path in self._test_paths()]).sum(0)

    def _test_paths(self) -> tuple[Path, ...]:
        return ("bn", "in") if self.settings.inference == "fused" else (self.settings.inference,)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Of the paths that the inference takes."""
        return {path.upper(): self.maps(images, path).square().sum(1) for path in self._test_paths()}
