"""Backbones, pooling and heads. One function converts a network's BatchNorm layers into Buffer Bank layers.

Shapes: images (B, 3, H, W) -> map (B, C, h, w) after the last ReLU -> feature (B, C) -> logits (B, identities).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import ResNet18_Weights, ResNet50_Weights, resnet18, resnet50
from torchvision.models.resnet import BasicBlock, ResNet

from lda.errors import UsageError
from lda.normalisation import BufferBank, BufferBankNorm2d, Expert, Switch

_SMALL_WIDTHS = (24, 48, 96, 192)


class Backbone(nn.Module):
    """A residual network up to its last map, with torchvision's names for its parts.

    Attributes:
        channels: C of the map.
        switch: the route switch of its Buffer Bank layers; unused by a network with plain layers.
    """

    def __init__(self, parts: Sequence[tuple[str, nn.Module]], channels: int, recompute: bool = False) -> None:
        super().__init__()
        for name, part in parts:
            self.add_module(name, part)
        self.channels = channels
        self.recompute = recompute
        self.switch = Switch()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        x = images
        for part in self.children():
            if self.recompute and self.training and isinstance(part, nn.Sequential):
                for block in part:
                    x = self._recomputed(block, x)
            else:
                x = part(x)
        return x

    def _recomputed(self, block: nn.Module, x: Tensor) -> Tensor:
        # The second computation happens in the backward pass, when the switch may already stand elsewhere, and must
        # not enter the batch into the bank again.
        route = self.switch.route
        replay = Expert(route.domain, record=False) if isinstance(route, Expert) else route

        @contextmanager
        def second_time() -> Iterator[None]:
            plain = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
            momenta = [module.momentum for module in plain]
            for module in plain:
                module.momentum = 0.0
            with self.switch.on(replay):
                yield
            for module, momentum in zip(plain, momenta, strict=True):
                module.momentum = momentum

        result: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), second_time()))
        return result


def build_backbone(name: str, pretrained: str = "none", recompute: bool = False) -> Backbone:
    """`resnet50`, `resnet18` (torchvision's, last stride 1) or `small` (four basic blocks for CPUs, stride 8).

    Args:
        pretrained: "none", "imagenet" (torchvision's IMAGENET1K_V1, downloaded or from its cache), or a file with a
            torchvision state dict.
        recompute: trade time for memory by recomputing every block in the backward pass.

    Raises UsageError when the weights file is missing or does not fit.
    """
    if name == "small":
        if pretrained != "none":
            raise UsageError(f"pretrained: the small backbone has no pretrained weights, got {pretrained!r}; use none")
        return Backbone(_small_parts(), _SMALL_WIDTHS[-1], recompute)
    make, weights = {
        "resnet50": (resnet50, ResNet50_Weights.IMAGENET1K_V1),
        "resnet18": (resnet18, ResNet18_Weights.IMAGENET1K_V1),
    }[name]
    try:
        network = make(weights=weights if pretrained == "imagenet" else None)
    except OSError as error:  # no network, and not in torchvision's cache
        raise UsageError(
            f"pretrained: {weights} could not be downloaded ({error}); download it elsewhere and set "
            "pretrained=FILE, or set pretrained=none"
        ) from error
    if pretrained not in ("none", "imagenet"):
        _load_weights(network, Path(pretrained))
    channels = network.fc.in_features
    first = network.layer4[0]  # last stride 1: the field's habit, twice the map's height and width
    (first.conv1 if isinstance(first, BasicBlock) else first.conv2).stride = (1, 1)
    first.downsample[0].stride = (1, 1)
    parts = [(part, child) for part, child in network.named_children() if part not in ("avgpool", "fc")]
    return Backbone(parts, channels, recompute)


def _load_weights(network: ResNet, path: Path) -> None:
    if not path.is_file():
        raise UsageError(
            f"pretrained: {str(path)!r} is not a file; expected none, imagenet or a torchvision state dict"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file that is no checkpoint
        raise UsageError(f"pretrained: cannot read {str(path)!r} as a torch state dict: {error}") from error
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UsageError(f"pretrained: {str(path)!r} does not fit: {str(error).splitlines()[-1].strip()}") from error
    wrong = [key for key in missing if not key.startswith("fc.")] + list(unexpected)
    if wrong:
        raise UsageError(f"pretrained: {str(path)!r} does not fit, missing or unexpected: {', '.join(wrong[:3])}")


def _small_parts() -> list[tuple[str, nn.Module]]:
    """A stem and four basic blocks: strides 2 | 1 2 2 1, so a 64 x 32 image becomes an 8 x 4 map."""
    stem = nn.Conv2d(3, _SMALL_WIDTHS[0], 3, stride=2, padding=1, bias=False)
    parts: list[tuple[str, nn.Module]] = [
        ("conv1", stem),
        ("bn1", nn.BatchNorm2d(_SMALL_WIDTHS[0])),
        ("relu", nn.ReLU(inplace=True)),
    ]
    inputs = _SMALL_WIDTHS[0]
    for i, (width, stride) in enumerate(zip(_SMALL_WIDTHS, (1, 2, 2, 1), strict=True), start=1):
        shortcut = None
        if stride != 1 or inputs != width:
            shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
        parts.append((f"layer{i}", nn.Sequential(BasicBlock(inputs, width, stride, shortcut))))
        inputs = width
    for _, part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return parts


def convert_norm(network: nn.Module, make: Callable[[int], nn.Module], keep_first: bool = False) -> None:
    """Replace every `nn.BatchNorm2d` of `network`, in place, by `make(num_features)` with the same weight and bias.

    `keep_first` leaves the stem's layer as it is (ReNorm's choice).
    """
    sites = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name in sites[1:] if keep_first else sites:
        parent_name, _, child = name.rpartition(".")
        parent = network.get_submodule(parent_name)
        old = network.get_submodule(name)
        assert isinstance(old, nn.BatchNorm2d)
        new = make(old.num_features)
        with torch.no_grad():
            for parameter in ("weight", "bias"):
                getattr(new, parameter).copy_(getattr(old, parameter))
        setattr(parent, child, new)


def add_buffer_banks(
    backbone: Backbone, num_domains: int, momentum: float, an_affine: bool = False, keep_first: bool = False
) -> None:
    """Turn a plain backbone into the two-path network: a Buffer Bank of K domains at every normalisation layer."""

    def make(num_features: int) -> BufferBankNorm2d:
        return BufferBankNorm2d(BufferBank(num_domains, num_features, momentum), backbone.switch, an_affine)

    convert_norm(backbone, make, keep_first)


def use_instance_norm(backbone: Backbone) -> None:
    """Turn a plain backbone into one with instance normalisation (affine, no running statistics) at every layer."""
    convert_norm(backbone, lambda num_features: nn.InstanceNorm2d(num_features, affine=True))


def gem(maps: Tensor, p: float) -> Tensor:
    """Generalised-mean pooling, (N, C, H, W) -> (N, C): (mean_hw x^p)^(1/p), in fp32. p = 1 is average pooling."""
    pooled = F.adaptive_avg_pool2d(maps.float().clamp_min(1e-6).pow(p), 1).flatten(1)
    return pooled.pow(1.0 / p)


class Head(nn.Module):
    """BNNeck and bias-free linear classifier, one pair per group of identities.

    A group is a source domain (`classifier=per_domain`) or all sources together (`joint`).

    Args:
        in_features: D of the feature.
        num_ids: identities per group.
    """

    def __init__(self, in_features: int, num_ids: Sequence[int]) -> None:
        super().__init__()
        self.necks = nn.ModuleList(nn.BatchNorm1d(in_features) for _ in num_ids)
        self.classifiers = nn.ModuleList(nn.Linear(in_features, n, bias=False) for n in num_ids)
        for name, parameter in self.named_parameters():
            if name.startswith("classifiers."):
                nn.init.normal_(parameter, std=0.001)
            elif name.endswith(".bias"):
                parameter.requires_grad_(False)  # a BNNeck has no shift (Luo et al., arXiv 1903.07071)

    def forward(self, features: Tensor, group: int) -> Tensor:
        """(N, D) features of one group -> (N, identities of the group) logits."""
        logits: Tensor = self.classifiers[group](self.necks[group](features))
        return logits
