"""From packed uint8 images to the network's input, a whole batch at a time, on whatever device the images are.

Training order as in fast-reid: AutoAugment, pad and crop, flip, colour jitter, normalise. Every random number comes
from the generator that is passed in, drawn on the CPU, so a batch looks the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# Of ImageNet, for RGB in 0..1, as the backbone's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

BRIGHTNESS = 0.15  # factor within 1 -+ this; ReNorm, META
CONTRAST = 0.1

_LUMA = (0.2989, 0.587, 0.114)  # grey value of RGB (ITU-R 601), as torchvision takes it


def normalise(images: Tensor) -> Tensor:
    """uint8 RGB (B, 3, H, W) -> float32 with ImageNet's mean and standard deviation taken out."""
    return _standardised(images.float())


@dataclass(frozen=True)
class Augment:
    """Random flip, shift, colour and AutoAugment of training images, drawn for each image on its own.

    Attributes:
        flip_probability: of a horizontal flip.
        pad: black pixels added on every side before an H x W window is cut out at random.
        jitter_probability: of a change of brightness and contrast, in random order.
        auto_augment_probability: of torchvision's AutoAugment with the ImageNet policy.
    """

    flip_probability: float = 0.5
    pad: int = 10
    jitter_probability: float = 0.5
    auto_augment_probability: float = 0.1

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, H, W), augmented and normalised; `images` stays as it is.

        `generator` is a CPU generator; equal states give equal batches.
        """
        count = len(images)
        if self.auto_augment_probability > 0:
            chosen = torch.rand(count, generator=generator) < self.auto_augment_probability
            seeds = torch.randint(2**62, (count,), generator=generator)
            images = auto_augmented(images, chosen, seeds)
        if self.pad > 0:
            rows, columns = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
            images = shifted(images, self.pad, rows, columns)
        if self.flip_probability > 0:
            flip = torch.rand(count, generator=generator) < self.flip_probability
            images = torch.where(flip.to(images.device)[:, None, None, None], images.flip(3), images)
        colours = images.float()
        if self.jitter_probability > 0:
            chosen = torch.rand(count, generator=generator) < self.jitter_probability
            factors = torch.rand(2, count, generator=generator) * 2 - 1
            brightness_first = torch.rand(count, generator=generator) < 0.5
            which = chosen.nonzero()[:, 0]
            colours[which.to(colours.device)] = jittered(
                colours[which.to(colours.device)],
                brightness=1 + BRIGHTNESS * factors[0, which],
                contrast=1 + CONTRAST * factors[1, which],
                brightness_first=brightness_first[which],
            )
        return _standardised(colours)


def shifted(images: Tensor, pad: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The H x W window of each zero-padded image whose upper left corner is (rows, columns), each (B,) in 0..2 pad."""
    _, _, height, width = images.shape
    windows = F.pad(images, [pad] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view (B, 3, 2p+1, 2p+1, H, W)
    device = images.device
    return windows[torch.arange(len(images), device=device), :, rows.to(device), columns.to(device)]


def jittered(images: Tensor, brightness: Tensor, contrast: Tensor, brightness_first: Tensor) -> Tensor:
    """Brightness and contrast of float images in 0..255 (B, 3, H, W) multiplied by factors (B,), in either order.

    Brightness scales towards black, contrast towards the image's mean grey; values are cut at 0 and 255 after each.
    """
    device = images.device
    brightness, contrast = brightness.to(device)[:, None, None, None], contrast.to(device)[:, None, None, None]
    first = brightness_first.to(device)[:, None, None, None]
    one = torch.ones_like(brightness)
    images = (images * torch.where(first, brightness, one)).clamp_(0, 255)
    luma = images.new_tensor(_LUMA)[:, None, None]
    grey = (images * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = (grey + contrast * (images - grey)).clamp_(0, 255)
    return (images * torch.where(first, one, brightness)).clamp_(0, 255)


def auto_augmented(images: Tensor, chosen: Tensor, seeds: Tensor) -> Tensor:
    """AutoAugment on the `chosen` (B,) images, each under its own seed; the global random state stays as it is."""
    if not chosen.any():
        return images
    policy = _auto_augment()
    images = images.clone()
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        for index in chosen.nonzero()[:, 0].tolist():
            torch.manual_seed(int(seeds[index]))
            images[index] = policy(images[index])
    return images


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
