"""The plain baseline: one network and one normalisation for all sources, joint classifier, mixed batches.

    L = CE(h(n(e)), y) + w Tri(e, y),   e = GeM(F), n the BNNeck, h one classifier over the identities of all sources

with batch normalisation ("plain BN": one set of statistics for all sources) or instance normalisation ("plain IN") at
every layer. The step is `PlainMethod`'s. Recipe: Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person
Re-identification", CVPRW 2019.

`camera_statistics` is the control of methods that look at the target: BN by statistics of the test images' camera.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lda.errors import UsageError
from lda.groups import Setup
from lda.methods.base import TargetImages
from lda.methods.plain import PlainMethod
from lda.parts.backbones import Backbone, convert_norm
from lda.parts.camera_statistics import CameraSettings, images_of_camera, take_camera_statistics
from lda.parts.instance_sites import InstanceSite
from lda.parts.losses import IdentitySettings
from lda.settings import setting


@dataclass(frozen=True, kw_only=True)
class BaselineSettings(IdentitySettings, CameraSettings):
    """Settings of the plain baseline."""

    baseline_norm: Literal["batch", "instance"] = setting("batch", "normalisation of the baseline")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline_norm == "instance" and self.camera_statistics == "on":
            raise UsageError(
                "camera_statistics: plain IN has no statistics that a camera's could replace; set camera_statistics=off"
            )


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

    @property
    def inference(self) -> str:
        return "camera statistics" if self.looks_at_target else ""

    @property
    def looks_at_target(self) -> bool:
        return self.settings.camera_statistics == "on"

    def adapt(self, target: Iterable[TargetImages]) -> None:
        """Normalise by statistics of one camera's images."""
        images = images_of_camera(target, self.settings.camera_images)
        take_camera_statistics(self.backbone, images, [self.backbone])


def use_instance_norm(backbone: Backbone) -> None:
    """Turn a plain backbone into one with instance normalisation (affine, no running statistics) at every layer."""
    convert_norm(backbone, lambda old: InstanceSite(old.num_features, affine=True))
