"""IBN-Net: instance normalisation (IN) beside batch normalisation (BN) in the early stages.

    (I)  y = gamma (x - mu_i) / sqrt(v_i + 1e-5) + beta,   mu_i, v_i mean and biased variance of image i over (h, w)

    IBN-a  the first norm of every block of stages 1 to 3: the first C/2 of its C channels have (I), the rest BN;
           13 layers of ResNet-50, no parameter more
    IBN-b  the stem's BN becomes (I), and the residual sum of the last block of stages 1 and 2 passes (I) before its
           ReLU; 1,536 parameters more

Step, losses and test feature are the plain baseline's (`PlainMethod`), at its cost.

Paper: Pan, Luo, Shi and Tang, "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", ECCV 2018;
sites read in its release (XingangPan/IBN-Net, d167338; ibnnet/modules.py, resnet_ibn.py): confidence 98 %.

Where we depart, on purpose: `pretrained=imagenet` converts plain weights, so the IN half begins with gamma and beta of
its BN and no longer sees the statistics they were learnt with: expect a slow start. The release's own ImageNet weights
are another pretraining (22.5 against 24.3 % top-1 error) and are not read here; results from the two do not compare.
An odd number of channels keeps them all: the release's split by a fixed size drops one.
On MobileNetV2, by our reading, IBN-a is at the first norm of every block too, and no ReLU follows IBN-b's sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lda.groups import Setup
from lda.methods.plain import PlainMethod
from lda.parts.instance_sites import use_ibn_a, use_ibn_b
from lda.parts.losses import IdentitySettings
from lda.settings import Range, setting


@dataclass(frozen=True, kw_only=True)
class IBNSettings(IdentitySettings):
    """Settings of IBN-Net."""

    ibn_kind: Literal["a", "b"] = setting("a", "IBN-a: half of the channels; IBN-b: stem and residual sums", "IBN-Net")
    ibn_ratio: float = setting(
        0.5, "share of a layer's channels that have IN, of IBN-a", "IBN-Net", low=0.0, high=1.0,
        search=Range(0.25, 0.75),
    )  # fmt: skip


class IBN(PlainMethod):
    """The plain baseline's step on a network with instance normalisation in its early stages."""

    title = "IBN-Net"
    reference = (
        "Pan, Luo, Shi and Tang, Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, ECCV 2018"
    )
    searched = ("ibn_kind",)
    Settings = IBNSettings
    settings: IBNSettings

    def __init__(self, settings: IBNSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        if settings.ibn_kind == "a":
            use_ibn_a(self.backbone, settings.ibn_ratio)
        else:
            use_ibn_b(self.backbone)

    @property
    def label(self) -> str:
        return f"IBN-{self.settings.ibn_kind}"
