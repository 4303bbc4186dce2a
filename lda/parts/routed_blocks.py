"""A stage's end in two ways, fused by a gate: a block that normalises every image by itself, and a bank of thin blocks
that a router mixes per image.

x (N, C, h, w) enters, E thin blocks ("experts") of width t, p inner channels of the network's own block, t = p // E.

    (A1) u   = relu(F(x) + x), F the network's block with IN, with gain and shift, at all of its norms
    (A2) v_e = relu(F_e(x) + x), F_e the network's block with t inner channels and BN; its first norm may be IN
    (A3) w   = softmax(g^T Theta),  g = mean_hw x  (C),  Theta = fc2(relu(l2(fc1 g))), as (C, E)
    (A4) v   = sum_e w_e v_e
    (A5) y   = s a,  a = sigmoid(t) BN(u) + (1 - sigmoid(t)) BN(v),  s = sigmoid(fc4(relu(fc3 mean_hw a)))

fc1: C -> H, fc2: H -> E C, fc3: C -> H, fc4: H -> C, all without bias, H = max(C // 16, 4); l2: to length one; t (C)
is learnt, 0.1 N(0, 1) at the start. y is not rectified.

The block is a bottleneck (1x1, 3x3, 1x1; p = C / 4) or a basic block (3x3, 3x3; p = C), as in the network. It begins
with the weights of the stage's last block: F as it is; F_e with the e-th t of its first filters, and in later layers
with means over E neighbouring input channels. What does not fit (of a block that also changes the width) is drawn. The
experts are one convolution to E t channels, and from there grouped ones. `split` normalises the first half of these
E t channels by IN, so the first half of the experts; the rest, or all of them (`bn`), by BN.

Read in the release of ACL (peterzpy/ACL-DGReID d84c75d, modeling/backbones/meta_dynamic_router_resnet.py): confidence
95 %. There the first convolution is a grouped one of E copies of x, the same sums; H has no lower bound, which small
networks need (of one unit, l2 leaves the sign). The router and both gates run in fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.errors import UsageError
from lda.parts.backbones import RESIDUAL, Backbone
from lda.parts.instance_sites import SplitNorm2d, as_instance_site
from lda.parts.routes import Switch

if TYPE_CHECKING:
    from torchvision.models.resnet import BasicBlock, Bottleneck

ExpertNorm = Literal["split", "bn"]

_REDUCTION, _LEAST_HIDDEN = 16, 4


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    # Shapes without numbers, by which costs are counted, know no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _hidden(channels: int) -> int:
    return max(channels // _REDUCTION, _LEAST_HIDDEN)


class Router(nn.Module):
    """(A3): x (N, C, h, w) -> w (N, E), rows that sum to 1, in fp32."""

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.squeeze = nn.Linear(channels, _hidden(channels), bias=False)
        self.expand = nn.Linear(_hidden(channels), channels * experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, E)."""
        with _full_precision(x):
            pooled = x.float().mean((2, 3))
            theta = self.expand(F.relu(F.normalize(self.squeeze(pooled))))
            weights: Tensor = (pooled[:, :, None] * theta.view(*pooled.shape, self.experts)).sum(1).softmax(1)
            return weights


class ChannelGate(nn.Module):
    """Squeeze and excite, the factor s of (A5): x (N, C, h, w) -> x s."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, _hidden(channels), bias=False)
        self.excite = nn.Linear(_hidden(channels), channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w)."""
        with _full_precision(x):
            scale = self.excite(F.relu(self.squeeze(x.float().mean((2, 3))))).sigmoid()
        scaled: Tensor = x * scale[:, :, None, None].to(x.dtype)
        return scaled


class ThinExperts(nn.Module):
    """(A2): x (N, C, h, w) -> v (N, E, C, h, w).

    Args:
        block: torchvision's, whose output has C channels.
        experts: E.
        norm: of the first norm.
    """

    def __init__(self, block: BasicBlock | Bottleneck, experts: int, norm: ExpertNorm) -> None:
        super().__init__()
        self.experts = experts
        old = _convolutions(block)
        channels = old[-1].out_channels
        width = experts * (old[0].out_channels // experts)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for number, conv in enumerate(old):
            first, last = number == 0, number == len(old) - 1
            new = nn.Conv2d(
                channels if first else width,
                experts * channels if last else width,
                conv.kernel_size[0],
                padding=conv.kernel_size[0] // 2,
                groups=1 if first else experts,
                bias=False,
            )
            _begin(new, _thinned(conv.weight, new, experts if last else 1))
            self.convs.append(new)
            old_norm = block.get_submodule(f"bn{number + 1}")
            assert isinstance(old_norm, nn.BatchNorm2d), "a plain backbone"
            new_norm = _norm_of(old_norm, new.out_channels)
            self.norms.append(SplitNorm2d(new_norm, width // 2) if first and norm == "split" else new_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, E, C, h, w)."""
        y = x
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), start=1):
            y = norm(conv(y))
            if number < len(self.convs):
                y = F.relu(y)
        return F.relu(y.view(-1, self.experts, *x.shape[1:]) + x[:, None])


class RoutedBlock(nn.Module):
    """(A1) to (A5) behind a stage with C channels.

    Args:
        block: the stage's last one, torchvision's, whose weights it begins with; not kept.
        experts: E.
        norm: the experts' first norm.
        switch: shared by the blocks of a network; the list that each of them, in training, adds its w (N, E) to.
    """

    def __init__(
        self, block: BasicBlock | Bottleneck, experts: int, norm: ExpertNorm, switch: Switch[list[Tensor]]
    ) -> None:
        super().__init__()
        channels = _convolutions(block)[-1].out_channels
        self.switch = switch
        self.invariant = invariant_block(block)
        self.experts = ThinExperts(block, experts, norm)
        self.router = Router(channels, experts)
        self.invariant_norm, self.specific_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.gate = nn.Parameter(0.1 * torch.randn(channels))
        self.channel_gate = ChannelGate(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w). Raises RuntimeError in training outside `with switch.on([])`, and UsageError on
        maps of 1 x 1."""
        weights = self.router(x)
        if self.training:
            self.switch.route.append(weights)
        specific = torch.einsum("nechw,ne->nchw", self.experts(x), weights.to(x.dtype))
        gate = self.gate.float().sigmoid()[:, None, None]
        u, v = self.invariant_norm(self.invariant(x)), self.specific_norm(specific)
        mixed: Tensor = self.channel_gate((gate * u + (1.0 - gate) * v).to(x.dtype))
        return mixed


def use_routed_blocks(backbone: Backbone, experts: int, norm: ExpertNorm) -> Switch[list[Tensor]]:
    """Let every stage of a plain backbone end in a `RoutedBlock`, registered as `routed1` and so on; gives its switch.

    It takes the place of the stage's last block where that is a bottleneck, and not the stage's only one; it follows
    the stage otherwise.

    Raises UsageError for a network of other blocks: (A2) says nothing of a depthwise convolution's thin copies.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck  # late, as in backbones.py

    switch: Switch[list[Tensor]] = Switch()
    for number, stage in enumerate(backbone.stages, start=1):
        blocks = backbone.get_submodule(stage)
        assert isinstance(blocks, nn.Sequential), "a stage is a sequence of blocks"
        last = blocks[-1]
        if not isinstance(last, BasicBlock | Bottleneck):
            raise UsageError(
                "backbone: routed blocks are made of a network's basic blocks or bottlenecks, and this one has others; "
                f"set backbone to one of: {', '.join(RESIDUAL)}, or set method to another"
            )
        backbone.insert_after(stage, f"routed{number}", RoutedBlock(last, experts, norm, switch))
        if isinstance(last, Bottleneck) and len(blocks) > 1:
            del blocks[-1]
    return switch


def invariant_block(block: BasicBlock | Bottleneck) -> BasicBlock | Bottleneck:
    """(A1): a block of the same kind from C to C channels, with IN at all its norms and the weights that fit."""
    channels, inner = _convolutions(block)[-1].out_channels, _convolutions(block)[0].out_channels
    new = type(block)(channels, inner)
    for number, (conv, old) in enumerate(zip(_convolutions(new), _convolutions(block), strict=True), start=1):
        _begin(conv, old.weight)
        norm = block.get_submodule(f"bn{number}")
        assert isinstance(norm, nn.BatchNorm2d), "a plain backbone"
        setattr(new, f"bn{number}", as_instance_site(norm))
    return new


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    return [child for child in block.children() if isinstance(child, nn.Conv2d)]


def _thinned(weight: Tensor, new: nn.Conv2d, repeats: int) -> Tensor:
    """Filters (out, in, k, k) of a block for those of its experts: the first of them, or all of them for every expert,
    each with the mean over neighbouring input channels where it has fewer."""
    out, inputs = new.out_channels // repeats, new.in_channels // new.groups
    share = weight.shape[1] // inputs if new.groups > 1 else 1
    averaged = weight[:out, : inputs * share].reshape(out, -1, share, *weight.shape[2:]).mean(2)
    return averaged.repeat(repeats, 1, 1, 1)


@torch.no_grad()
def _begin(conv: nn.Conv2d, weight: Tensor) -> None:
    """Give a convolution these weights if they fit, else draw them."""
    if conv.weight.shape == weight.shape:
        conv.weight.copy_(weight)
    else:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


@torch.no_grad()
def _norm_of(old: nn.BatchNorm2d, channels: int) -> nn.BatchNorm2d:
    """A BN of `channels` that begins as the old one: its first channels, or all of them again and again."""
    new = nn.BatchNorm2d(channels, eps=old.eps, momentum=old.momentum)
    for name, value in old.state_dict().items():
        repeated = value if value.ndim == 0 else value.repeat(-(-channels // len(value)))[:channels]
        new.state_dict(keep_vars=True)[name].copy_(repeated)
    return new
