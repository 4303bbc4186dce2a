"""Backbones with named stages, and the one function that converts their BatchNorm layers into others.

Shapes: images (B, 3, H, W) -> map (B, C, h, w) after the last ReLU.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lda.errors import UsageError
from lda.groups import Setup
from lda.parts.routes import statistics_held
from lda.parts.weights import LoadedWeights, flat_names, load_weights

if TYPE_CHECKING:
    from torchvision.models import MobileNetV2, ResNet, WeightsEnum

# torchvision takes as long to import as torch does: only what builds a network waits for it, no command line.

_SMALL_WIDTHS = (24, 48, 96, 192)
_MOBILENET_STAGES = (1, 4, 7, 14, 19)  # of `features`: where the stages begin, and the end
_MOBILENET_LAST_STRIDE = 14  # of `features`: the last block with stride 2

RESIDUAL = ("resnet50", "resnet18", "small")
"""The backbones that are made of torchvision's basic blocks or bottlenecks."""


class Backbone(nn.Module):
    """A residual network up to its last map, with torchvision's names for its parts.

    Attributes:
        channels: C of the map.
        replay: called in the forward pass, gives what a recomputation in the backward pass has to happen in. Layers
            that know several ways need theirs again (`Switch.remembered`); plain layers need nothing.
        weights: the file that it began with; None for random weights.
    """

    weights: LoadedWeights | None = None

    def __init__(self, parts: Sequence[tuple[str, nn.Module]], channels: int, recompute: bool = False) -> None:
        super().__init__()
        self._order = [name for name, _ in parts]
        for name, part in parts:
            self.add_module(name, part)
        self.channels = channels
        self.recompute = recompute
        self.replay: Callable[[], Callable[[], AbstractContextManager[None]]] = lambda: nullcontext

    @property
    def stages(self) -> list[str]:
        """Names of the residual stages, first to last: each is an `nn.Sequential` of blocks."""
        return [name for name in self._order if name.startswith("layer")]

    def stage_channels(self, stage: str) -> int:
        """Channels of a stage's output."""
        norms = [m for m in self.get_submodule(stage)[-1].modules() if isinstance(m, nn.BatchNorm2d)]  # type: ignore[index]
        return norms[-1].num_features

    @property
    def stage_widths(self) -> list[int]:
        """Channels of every stage's output."""
        return [self.stage_channels(stage) for stage in self.stages]

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """The maps after every stage, and what comes behind it up to the next one; the last is that of `forward`."""
        maps: list[Tensor] = []
        x = images
        for name, steps in itertools.groupby(self.steps(), lambda step: step[0].split(".")[0]):
            x = self.walk(x, steps)
            if name.startswith("layer"):
                maps.append(x)
            elif maps:
                maps[-1] = x
        return maps

    def insert_after(self, stage: str, name: str, module: nn.Module) -> None:
        """Let a stage's output pass through `module`, registered under `name`; it is never recomputed."""
        self.add_module(name, module)
        self._order.insert(self._order.index(stage) + 1, name)

    def cut_after(self, stage: str) -> None:
        """Drop everything behind a stage: its output is the map from here on."""
        self.channels = self.stage_channels(stage)
        kept = self._order.index(stage) + 1
        for name in self._order[kept:]:
            delattr(self, name)
        del self._order[kept:]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        return self.walk(images, self.steps())

    def steps(self) -> list[tuple[str, nn.Module]]:
        """What a pass goes through, first to last: (name of a block, such as layer3.0, or of any other part, it)."""
        steps: list[tuple[str, nn.Module]] = []
        for name in self._order:
            part = self.get_submodule(name)
            if name.startswith("layer"):
                steps += [(f"{name}.{number}", block) for number, block in part.named_children()]
            else:
                steps.append((name, part))
        return steps

    def walk(self, x: Tensor, steps: Iterable[tuple[str, nn.Module]]) -> Tensor:
        """Pass x through some of `steps`, or copies of them under these names; blocks are recomputed as in any pass."""
        for name, step in steps:
            again = self.recompute and self.training and name.startswith("layer")
            x = self._recomputed(step, x) if again else step(x)
        return x

    def _recomputed(self, block: nn.Module, x: Tensor) -> Tensor:
        # The second computation happens in the backward pass, when a switch may already stand elsewhere, and must not
        # enter the batch into statistics again.
        way = self.replay()

        @contextmanager
        def second_time() -> Iterator[None]:
            with way(), statistics_held(block):
                yield

        result: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), second_time()))
        return result


def forward_shares(backbone: Backbone) -> dict[str, float]:
    """Name of every stage and of the stem's convolution -> its share of the multiply-adds of all convolutions.

    They sum to 1; of images twice as high as wide, the field's format. What was inserted between stages is left out.
    """
    counted = {name: n for name, n in forward_counts(backbone).items() if name in ("conv1", *backbone.stages)}
    total = sum(counted.values())
    return {part: number / total for part, number in counted.items()}


def forward_counts(backbone: Backbone) -> dict[str, int]:
    """Name of every part with convolutions, in order -> their multiply-adds in the forward pass of a 256 x 128 image.

    What was inserted counts too; it has to take shapes without numbers, in evaluation mode.
    """
    counted: dict[str, int] = {}

    def count(part: str) -> Callable[[nn.Conv2d, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            counted[part] = counted.get(part, 0) + output[0].numel() * module.weight[0].numel()

        return hook

    copied = copy.deepcopy(backbone).to("meta").eval()  # shapes without numbers
    for name, module in copied.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count(name.split(".")[0]))
    copied(torch.empty(1, 3, 256, 128, device="meta"))
    return counted


def map_size(backbone: Backbone, image_size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the map of an image of (height, width) pixels."""
    copied = copy.deepcopy(backbone).to("meta").eval()  # shapes without numbers
    height, width = copied(torch.empty(1, 3, *image_size, device="meta")).shape[2:]
    return height, width


def backbone_of(setup: Setup) -> Backbone:
    """The network that a run's settings name; see `build_backbone`."""
    return build_backbone(setup.network.backbone, setup.network.pretrained, setup.recompute)


def build_backbone(name: str, pretrained: str = "none", recompute: bool = False) -> Backbone:
    """`resnet50`, `resnet18`, `mobilenet_v2` (torchvision's, last stride 1) or `small` (four basic blocks for CPUs,
    stride 8).

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
    from torchvision import models

    make, weights = {
        "resnet50": (models.resnet50, models.ResNet50_Weights.IMAGENET1K_V1),
        "resnet18": (models.resnet18, models.ResNet18_Weights.IMAGENET1K_V1),
        "mobilenet_v2": (models.mobilenet_v2, models.MobileNet_V2_Weights.IMAGENET1K_V1),
    }[name]
    network, mobile = make(), name == "mobilenet_v2"
    loaded = None
    if pretrained != "none":
        path = _of_imagenet(weights) if pretrained == "imagenet" else Path(pretrained).expanduser()
        head, older = ("classifier.", flat_names(network)) if mobile else ("fc.", None)
        loaded = load_weights(network, path, head, older)
    channels = network.last_channel if mobile else network.fc.in_features
    backbone = Backbone(_mobilenet_parts(network) if mobile else _resnet_parts(network), channels, recompute)
    backbone.weights = loaded
    return backbone


def _of_imagenet(weights: WeightsEnum) -> Path:
    """torchvision's weights in its cache, downloaded where they are not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not path.is_file():
        try:
            weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network; bytes of another hash, as of a portal's page
            raise UsageError(
                f"pretrained: {weights} could not be downloaded ({error}); download it elsewhere and set "
                "pretrained=FILE, or set pretrained=none"
            ) from error
    return path


def _resnet_parts(network: ResNet) -> list[tuple[str, nn.Module]]:
    from torchvision.models.resnet import BasicBlock

    first = network.layer4[0]  # last stride 1: the field's habit, twice the map's height and width
    (first.conv1 if isinstance(first, BasicBlock) else first.conv2).stride = (1, 1)
    first.downsample[0].stride = (1, 1)
    return [(part, child) for part, child in network.named_children() if part not in ("avgpool", "fc")]


def _mobilenet_parts(network: MobileNetV2) -> list[tuple[str, nn.Module]]:
    """torchvision's `features` under a ResNet's names: stages end at the strides at which a ResNet's do, 4, 8, 16 and,
    last stride 1, 16.

    The convolution to 1280 channels is the last block of layer4, not a part behind it: whoever cuts, copies or goes on
    behind the last stage means the map. Stages 1 to 3 end in sums without a ReLU, so their maps have negative values.
    """
    features = network.features
    features[_MOBILENET_LAST_STRIDE].conv[1][0].stride = (1, 1)  # depthwise
    blocks = [features[start:end] for start, end in itertools.pairwise(_MOBILENET_STAGES)]
    stages = [(f"layer{number}", nn.Sequential(*stage)) for number, stage in enumerate(blocks, start=1)]
    return [*zip(("conv1", "bn1", "relu"), features[0], strict=True), *stages]


def _small_parts() -> list[tuple[str, nn.Module]]:
    """A stem and four basic blocks: strides 2 | 1 2 2 1, so a 64 x 32 image becomes an 8 x 4 map."""
    from torchvision.models.resnet import BasicBlock

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


def convert_norm(network: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module], keep_first: bool = False) -> None:
    """Replace every `nn.BatchNorm2d` of `network`, in place, by `make(old layer)`, with the old one's gamma and beta
    where the new one has them.

    `keep_first` leaves the stem's layer as it is (ReNorm's choice).
    """
    sites = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name in sites[1:] if keep_first else sites:
        parent_name, _, child = name.rpartition(".")
        old = network.get_submodule(name)
        assert isinstance(old, nn.BatchNorm2d)
        new = make(old)
        with torch.no_grad():
            for parameter in ("weight", "bias"):
                if isinstance(own := getattr(new, parameter, None), nn.Parameter):
                    own.copy_(getattr(old, parameter))
        setattr(network.get_submodule(parent_name), child, new)
