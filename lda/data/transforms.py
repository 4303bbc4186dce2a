"""From packed uint8 images to the network's input, a whole batch at a time, on whatever device the images are.

Training order as in fast-reid: AutoAugment, pad and crop, flip, colour jitter, normalise. Every random number comes
from the generator that is passed in, drawn on the CPU, so a batch looks the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lda.data.options import BatchSettings

# Of ImageNet, for RGB in 0..1, as the backbone's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

CHUNK = 16  # images augmented at a time on a CPU: what is between the steps then stays in its cache

BRIGHTNESS = 0.15  # factor within 1 -+ this; ReNorm, META
CONTRAST = 0.1

_LUMA = (0.2989, 0.587, 0.114)  # grey value of RGB (ITU-R 601), as torchvision takes it


def normalise(images: Tensor) -> Tensor:
    """uint8 RGB (B, 3, H, W) -> float32 with ImageNet's mean and standard deviation taken out."""
    return _standardised(images.float())


@dataclass(frozen=True)
class Augment:
    """Random flip, shift, colour and AutoAugment of training images, drawn for each image on its own.

    Of `settings`: `flip_probability` of a horizontal flip; `pad` black pixels on every side before an H x W window is
    cut out at random; `jitter_probability` of a change of brightness and contrast, in random order;
    `auto_augment_probability` of torchvision's AutoAugment with the ImageNet policy.
    """

    settings: BatchSettings

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, H, W), augmented and normalised; `images` stays as it is.

        `generator` is a CPU generator; equal states give equal batches.
        """
        count = len(images)
        draws = self._draw(count, generator)
        images = auto_augmented(images, draws.auto_augment, draws.auto_augment_seed)
        output = torch.empty(images.shape, device=images.device)
        size = CHUNK if images.device.type == "cpu" else max(count, 1)
        for part in (slice(start, start + size) for start in range(0, count, size)):
            window = shifted(images[part], self.settings.pad, draws.rows[part], draws.columns[part], draws.flip[part])
            colours = output[part].copy_(window)
            if self.settings.jitter_probability > 0:
                jittered(colours, draws.brightness[part], draws.contrast[part], draws.brightness_first[part])
            _standardised(colours)
        return output

    def _draw(self, count: int, generator: Generator) -> _Draws:
        def happens(probability: float) -> Tensor:
            return torch.rand(count, generator=generator) < probability

        def factor(strength: float) -> Tensor:
            return 1 + strength * (2 * torch.rand(count, generator=generator) - 1)

        jitter = happens(self.settings.jitter_probability)
        return _Draws(
            auto_augment=happens(self.settings.auto_augment_probability),
            auto_augment_seed=torch.randint(2**62, (count,), generator=generator),
            rows=torch.randint(2 * self.settings.pad + 1, (count,), generator=generator),
            columns=torch.randint(2 * self.settings.pad + 1, (count,), generator=generator),
            flip=happens(self.settings.flip_probability),
            brightness=torch.where(jitter, factor(BRIGHTNESS), 1.0),
            contrast=torch.where(jitter, factor(CONTRAST), 1.0),
            brightness_first=happens(0.5),
        )


@dataclass(frozen=True)
class StrongAugment:
    """The strong view of BAU (Cho et al., NeurIPS 2024; yoonkicho/BAU 70e1a50, examples/train_bau.py).

    RandAugment (2 operations of strength 10 of 30), flip, pad and crop, colour jitter (brightness, contrast and
    saturation times 0.5 to 2, hue shifted by up to 0.1), normalise, and random erasing (2 to 40 % of the image,
    replaced by ImageNet's mean colour). RandAugment, jitter and erasing happen to an image with `probability` each;
    flip and crop as in `Augment`. RandAugment is torchvision's: 14 operations, where the release has its own list of
    16 (it adds inversion and colour noise of its own making).
    """

    settings: BatchSettings
    probability: float

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, H, W), augmented and normalised; `images` stays as it is."""
        count, pad = len(images), self.settings.pad

        def seeds() -> list[int | None]:
            """A seed for each image that something happens to."""
            happens = torch.rand(count, generator=generator) < self.probability
            drawn = torch.randint(2**62, (count,), generator=generator)
            return [seed if chosen else None for chosen, seed in zip(happens.tolist(), drawn.tolist(), strict=True)]

        rows, columns = (torch.randint(2 * pad + 1, (count,), generator=generator) for _ in range(2))
        flip = torch.rand(count, generator=generator) < self.settings.flip_probability
        images = _changed(images, seeds(), _strong_augment())
        images = _changed(shifted(images, pad, rows, columns, flip), seeds(), _strong_jitter())
        return _changed(_standardised(images.float()), seeds(), _erasing())


class _Draws(NamedTuple):
    """What happens to each image of a batch; every entry (B,)."""

    auto_augment: Tensor
    auto_augment_seed: Tensor
    rows: Tensor
    columns: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    brightness_first: Tensor


def shifted(images: Tensor, pad: int, rows: Tensor, columns: Tensor, flip: Tensor) -> Tensor:
    """Windows of zero-padded images.

    Args:
        images: (B, C, H, W).
        pad: pixels on every side.
        rows, columns: (B,) upper left corner of each H x W window in its padded image, 0 to 2 pad.
        flip: (B,) mirror the image before.
    """
    count, channels, height, width = images.shape
    padded = images.new_zeros(2, count, channels, height + 2 * pad, width + 2 * pad)  # as they are, and mirrored
    inner = padded[..., pad : pad + height, pad : pad + width]
    inner[0], inner[1] = images, images.flip(3)
    _, stride, plane, line, _ = padded.stride()
    starts = (flip * count + torch.arange(count)) * stride + rows * line + columns
    # Every window is an element of one view of this memory, so that index_select copies whole rows; indexing by
    # element takes several times as long.
    size = (channels - 1) * plane + (height - 1) * line + width
    windows = padded.as_strided((padded.numel() - size + 1, channels, height, width), (1, plane, line, 1))
    return windows.index_select(0, starts.to(images.device))


def jittered(images: Tensor, brightness: Tensor, contrast: Tensor, brightness_first: Tensor) -> Tensor:
    """Brightness and contrast of float images in 0..255 (B, 3, H, W) multiplied by factors (B,), in place.

    Brightness scales towards black, contrast towards the image's mean grey; values are cut at 0 and 255 after each.
    `brightness_first`: (B,) which of the two comes first.
    """
    brightness, contrast, first = (
        value.to(images.device)[:, None, None, None] for value in (brightness, contrast, brightness_first)
    )
    one = torch.ones_like(brightness)
    images.mul_(torch.where(first, brightness, one)).clamp_(0, 255)
    grey = (images.mean((2, 3), keepdim=True) * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    images.mul_(contrast).add_((1 - contrast) * grey).clamp_(0, 255)
    return images.mul_(torch.where(first, one, brightness)).clamp_(0, 255)


def auto_augmented(images: Tensor, chosen: Tensor, seeds: Tensor) -> Tensor:
    """AutoAugment on the `chosen` (B,) images, each under its own seed; the global random state stays as it is."""
    if not chosen.any():
        return images
    own = [seed if happens else None for happens, seed in zip(chosen.tolist(), seeds.tolist(), strict=True)]
    return _changed(images, own, _auto_augment())


def _changed(images: Tensor, seeds: list[int | None], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy with every image changed that has a seed, under that seed."""
    images = images.clone()
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        for index, seed in enumerate(seeds):
            if seed is not None:
                torch.manual_seed(seed)
                images[index] = change(images[index])
    return images


@cache
def _strong_augment() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    change: Callable[[Tensor], Tensor] = v2.RandAugment(num_ops=2, magnitude=10, num_magnitude_bins=31, fill=128)
    return change


@cache
def _strong_jitter() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    change: Callable[[Tensor], Tensor] = v2.ColorJitter((0.5, 2.0), (0.5, 2.0), (0.5, 2.0), 0.1)
    return change


@cache
def _erasing() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    change: Callable[[Tensor], Tensor] = v2.RandomErasing(p=1.0, scale=(0.02, 0.4), ratio=(0.3, 3.33), value=0)
    return change


@cache
def _auto_augment() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2  # here because it takes seconds to import and few runs need it

    policy: Callable[[Tensor], Tensor] = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=128)  # grey: fast-reid
    return policy


def _standardised(colours: Tensor) -> Tensor:
    """Float 0..255 -> (colour / 255 - mean) / std, in place: a new batch of memory costs more than the arithmetic."""
    scale = 1 / (255 * colours.new_tensor(STD)[:, None, None])
    shift = -colours.new_tensor(MEAN)[:, None, None] / colours.new_tensor(STD)[:, None, None]
    return colours.mul_(scale).add_(shift)
