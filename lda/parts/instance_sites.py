"""Instance normalisation (IN) at some places of a residual network whose other layers stay batch normalisation (BN).

    (I)  y = gamma (x - mu_i) / sqrt(v_i + 1e-5) + beta,   mu_i, v_i mean and biased variance of image i over (h, w)

    ibn_a        the first norm of every block of stages 1 to 3: the first channels IN, the rest BN    (`use_ibn_a`)
    ibn_b        the stem's norm; the residual sum, before its ReLU, of the last block of stages 1, 2  (`use_ibn_b`)
    dualnorm     the residual sum, before its ReLU, of the last block of stages 1, 2, 3                (`use_dualnorm`)
    after_stage  after stages 1, 2, 3, behind the ReLU, without gamma and beta: BAU's backbone   (`use_after_stages`)

Placements: IBN-Net's release (XingangPan/IBN-Net, d167338) for a and b, BJTUJia/person_reID_DualNorm 0581013,
yoonkicho/BAU 70e1a50; confidence 98 %. Papers: `lda/methods/ibn.py`, `lda/methods/dualnorm.py`; BAU: Cho et al.,
"Generalizable Person Re-identification via Balancing Alignment and Uniformity", NeurIPS 2024.

Every function changes a plain backbone in place and begins with its weights: gamma and beta of a BN that becomes IN go
over (its statistics have no use); a new site begins as gamma = 1, beta = 0. In a network whose stages have one block,
that block is the last. MobileNetV2's blocks have no ReLU behind their sums: (I) is of the sum as it is, our reading.

Shapes: x (N, C, H, W) of N images, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.errors import UsageError
from lda.parts.backbones import Backbone

if TYPE_CHECKING:
    from torchvision.models.mobilenetv2 import InvertedResidual
    from torchvision.models.resnet import BasicBlock, Bottleneck


def need_a_map(x: Tensor) -> None:
    """Raises UsageError when x (N, C, H, W) has one place: statistics of an image over (h, w) say nothing then, and
    what is normalised by them is zero for every image."""
    if x.shape[2] * x.shape[3] < 2:
        raise UsageError(
            "image_height, image_width: the images are so small that a layer with statistics per image gets a map of "
            f"{x.shape[2]} x {x.shape[3]}, which it would make the same for all; set both larger"
        )


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Equation (I) with gamma and beta (C,) of somebody else. Raises UsageError on maps of 1 x 1."""
    need_a_map(x)
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


class InstanceSite(nn.InstanceNorm2d):
    """Equation (I): the same in training and evaluation, every image on its own.

    Forward raises UsageError on maps of 1 x 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        need_a_map(input)
        return super().forward(input)


def as_instance_site(norm: nn.BatchNorm2d) -> InstanceSite:
    """Equation (I) with gamma and beta of a batch normalisation."""
    site = InstanceSite(norm.num_features, eps=norm.eps, affine=True)
    _copy_channels(norm, site, slice(None))
    return site


class SplitNorm2d(nn.Module):
    """IBN-a: IN on the first channels, BN on the rest; begins as the slices of one BN.

    Args:
        norm: the BN that this takes the place of, C channels.
        instance_channels: how many have IN, 1 to C - 1.
    """

    def __init__(self, norm: nn.BatchNorm2d, instance_channels: int) -> None:
        super().__init__()
        self.instance_channels, rest = instance_channels, norm.num_features - instance_channels
        self.instance = InstanceSite(instance_channels, eps=norm.eps, affine=True)
        self.batch = nn.BatchNorm2d(rest, eps=norm.eps, momentum=norm.momentum)
        _copy_channels(norm, self.instance, slice(0, instance_channels))
        _copy_channels(norm, self.batch, slice(instance_channels, None))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        # Not torch.split by a size: it would cut an odd C into three.
        first, rest = x[:, : self.instance_channels], x[:, self.instance_channels :]
        return torch.cat([self.instance(first), self.batch(rest)], dim=1)


@torch.no_grad()
def _copy_channels(old: nn.BatchNorm2d, new: nn.Module, channels: slice) -> None:
    before = old.state_dict()
    for name, value in new.state_dict(keep_vars=True).items():
        value.copy_(before[name] if before[name].ndim == 0 else before[name][channels])


class NormalisedSumBlock(nn.Module):
    """A residual block whose sum is instance-normalised before the last ReLU: relu(IN(F(x) + shortcut(x))).

    The residual path is normalised too. Takes over the layers of torchvision's block, under their names.
    """

    def __init__(self, block: BasicBlock | Bottleneck, channels: int) -> None:
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.downsample: nn.Module | None = block.downsample
        self.convolutions = 3 if hasattr(block, "conv3") else 2
        self.sum_norm = InstanceSite(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, h, w)."""
        relu = self.get_submodule("relu")
        y = x
        for number in range(1, self.convolutions + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self.convolutions:
                y = relu(y)
        y = y + (x if self.downsample is None else self.downsample(x))
        normalised: Tensor = relu(self.sum_norm(y))
        return normalised


class NormalisedInvertedBlock(nn.Module):
    """An inverted residual block whose sum is instance-normalised: IN(F(x) + x), or IN(F(x)) where it has no shortcut.

    Takes over the layers of torchvision's block, under their names.
    """

    def __init__(self, block: InvertedResidual, channels: int) -> None:
        super().__init__()
        self.conv: nn.Module = block.conv
        self.shortcut: bool = block.use_res_connect
        self.sum_norm = InstanceSite(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, h, w)."""
        y = self.conv(x)
        normalised: Tensor = self.sum_norm(x + y if self.shortcut else y)
        return normalised


def use_ibn_a(backbone: Backbone, ratio: float = 0.5) -> None:
    """IBN-a; `ratio` of a layer's channels, rounded down, have IN (0: the plain network). No parameter is added."""
    blocks = [block for stage in backbone.stages[:3] for block in backbone.get_submodule(stage).children()]
    for block in blocks:
        name, norm = next((name, m) for name, m in block.named_modules() if isinstance(m, nn.BatchNorm2d))
        parent, _, child = name.rpartition(".")
        instance_channels = int(norm.num_features * ratio)
        if instance_channels == norm.num_features:
            setattr(block.get_submodule(parent), child, as_instance_site(norm))
        elif instance_channels > 0:
            setattr(block.get_submodule(parent), child, SplitNorm2d(norm, instance_channels))


def use_ibn_b(backbone: Backbone) -> None:
    """IBN-b; ResNet-50 gains 1,536 parameters."""
    stem = backbone.get_submodule("bn1")
    assert isinstance(stem, nn.BatchNorm2d), "a plain backbone"
    backbone.bn1 = as_instance_site(stem)
    _normalise_sums(backbone, 2)


def use_dualnorm(backbone: Backbone) -> None:
    """DualNorm's sites; ResNet-50 gains 3,584 parameters."""
    _normalise_sums(backbone, 3)


def use_after_stages(backbone: Backbone) -> None:
    """IN without gamma and beta behind stages 1 to 3; nothing is added to the state dict, nothing recomputed."""
    for stage in backbone.stages[:3]:
        backbone.insert_after(stage, f"instance_norm_{stage}", InstanceSite(backbone.stage_channels(stage)))


def _normalise_sums(backbone: Backbone, num_stages: int) -> None:
    from torchvision.models.mobilenetv2 import InvertedResidual  # late, as in backbones.py
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for stage in backbone.stages[:num_stages]:
        blocks = backbone.get_submodule(stage)
        assert isinstance(blocks, nn.Sequential), "a stage is a sequence of blocks"
        last, channels = blocks[-1], backbone.stage_channels(stage)
        if isinstance(last, InvertedResidual):
            blocks[-1] = NormalisedInvertedBlock(last, channels)
        else:
            assert isinstance(last, BasicBlock | Bottleneck), "a plain backbone"
            blocks[-1] = NormalisedSumBlock(last, channels)
