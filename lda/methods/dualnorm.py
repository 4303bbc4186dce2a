"""DualNorm: instance normalisation (IN) of styles in the early stages, normalised features at the end.

    (I)  y = relu(gamma (s - mu_i) / sqrt(v_i + 1e-5) + beta),   s the residual sum of the last block of stages 1, 2, 3,
         mu_i, v_i mean and biased variance of image i over (h, w); every other norm, the stem's too, stays BN
    (F)  f = n(e),   e = GeM(F), n the BNNeck, which has no shift; images are compared by the cosine of f

Training is the plain baseline's step (`PlainMethod`); 3,584 parameters more in ResNet-50, at the baseline's cost.

Paper: Jia, Ruan and Hospedales, "Frustratingly Easy Person Re-Identification: Generalizing Person Re-ID in Practice",
BMVC 2019; sites and neck read in its release (BJTUJia/person_reID_DualNorm, 0581013; models/ResNet_IFN.py):
confidence 98 %.

Where we depart, for a fair comparison: losses (theirs is CE alone), pooling, sampling and schedule are those of all
methods here; the release trains by SGD 0.01 for 150 epochs, unsampled batches of 64, and adds the mirrored image's
feature at test. ImageNet's weights are kept, (I) begins as gamma = 1, beta = 0. On MobileNetV2, by
our reading, (I) is of the same sums, without the ReLU, which that network has not.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lda.groups import Setup
from lda.methods.plain import PlainMethod
from lda.parts.instance_sites import use_dualnorm
from lda.parts.losses import IdentitySettings


class DualNorm(PlainMethod):
    """The plain baseline's step on a network with normalised residual sums; tested behind the BNNeck."""

    title = "DualNorm"
    reference = (
        "Jia, Ruan and Hospedales, Frustratingly Easy Person Re-Identification: Generalizing Person Re-ID in Practice, "
        "BMVC 2019"
    )
    Settings = IdentitySettings

    def __init__(self, settings: IdentitySettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        use_dualnorm(self.backbone)

    def encode(self, images: Tensor) -> Tensor:
        """(F): features (B, D) behind the BNNeck, L2-normalised."""
        return F.normalize(self.head.necks[0](self.pooled(self.backbone(images))))
