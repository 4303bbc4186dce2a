"""The plain baseline: one network and one normalisation for all sources, joint classifier, mixed batches.

    L = CE(h(n(e)), y) + w Tri(e, y),   e = GeM(F), n the BNNeck, h one classifier over the identities of all sources

with batch normalisation ("plain BN": one set of statistics for all sources) or instance normalisation ("plain IN") at
every layer. The step is `PlainMethod`'s. Recipe: Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person
Re-identification", CVPRW 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lda.groups import Setup
from lda.methods.plain import PlainMethod
from lda.parts.backbones import Backbone, convert_norm
from lda.parts.instance_sites import InstanceSite
from lda.parts.losses import IdentitySettings
from lda.settings import setting


@dataclass(frozen=True, kw_only=True)
class BaselineSettings(IdentitySettings):
    """Settings of the plain baseline."""

    baseline_norm: Literal["batch", "instance"] = setting("batch", "normalisation of the baseline")


class Baseline(PlainMethod):
    """Identity and triplet loss of one plain network."""

    title = "plain BN"
    reference = "Luo et al., Bag of Tricks and a Strong Baseline for Deep Person Re-identification, CVPRW 2019"
    Settings = BaselineSettings
    settings: BaselineSettings

    def __init__(self, settings: BaselineSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        if settings.baseline_norm == "instance":
            use_instance_norm(self.backbone)

    @property
    def label(self) -> str:
        return "plain IN" if self.settings.baseline_norm == "instance" else self.title


def use_instance_norm(backbone: Backbone) -> None:
    """Turn a plain backbone into one with instance normalisation (affine, no running statistics) at every layer."""
    convert_norm(backbone, lambda old: InstanceSite(old.num_features, affine=True))
