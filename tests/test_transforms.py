"""Batched augmentation: the same images, with the same frequencies, as the per-image pipeline of torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Generator, Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from lda.data.options import BatchSettings
from lda.data.transforms import (
    BRIGHTNESS,
    CONTRAST,
    MEAN,
    STD,
    Augment,
    StrongAugment,
    auto_augmented,
    jittered,
    normalise,
    shifted,
)

NOTHING = Augment(BatchSettings(flip_probability=0, pad=0, jitter_probability=0, auto_augment_probability=0))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _images(count: int, height: int = 12, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, 3, height, width), generator=Generator().manual_seed(seed), dtype=torch.uint8)


def _generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def _colours(normalised: Tensor) -> Tensor:
    """Back to 0..255."""
    return (normalised * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


def test_normalise_is_torchvisions() -> None:
    images = _images(4)
    expected = tv.normalize(tv.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))
    torch.testing.assert_close(normalise(images), expected)
    torch.testing.assert_close(NOTHING(images, _generator()), expected)


def test_equal_generators_give_equal_batches_and_leave_the_rest_alone() -> None:
    images = _images(16)
    before, state = images.clone(), torch.get_rng_state()
    augment = Augment(BatchSettings(pad=2, auto_augment_probability=0.5))
    first, second, other = (augment(images, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.float32
    assert first.shape == images.shape


def test_window_of_the_padded_image() -> None:
    images, pad = _images(5), 3
    rows, columns = torch.tensor([0, 3, 6, 1, 5]), torch.tensor([6, 3, 0, 2, 5])
    flip = torch.tensor([False, True, True, False, True])
    for index, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        image = tv.horizontal_flip(images[index]) if flip[index] else images[index]
        expected = tv.crop(tv.pad(image, [pad]), row, column, 12, 6)
        assert torch.equal(shifted(images, pad, rows, columns, flip)[index], expected)
    nowhere = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(shifted(images, 0, nowhere, nowhere, flip & False), images)


def test_every_flip_and_shift_is_equally_likely() -> None:
    """Each output is one of the windows, flipped or not; their frequencies pass a chi-squared test."""
    pad, count = 1, 9000
    image = torch.arange(1, 37, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(1, 3, 6, 6)
    augment = Augment(BatchSettings(flip_probability=0.3, pad=pad, jitter_probability=0, auto_augment_probability=0))
    output = _colours(augment(image.expand(count, -1, -1, -1), _generator())).round().byte()
    places = [(row, column) for row in range(3) for column in range(3)]
    windows = [tv.crop(tv.pad(image[0], [pad]), row, column, 6, 6) for row, column in places]
    frequencies = []
    for flip in (False, True):
        for window in windows:
            wanted = window.flip(2) if flip else window
            frequencies.append(int((output == wanted).flatten(1).all(1).sum()))
    assert sum(frequencies) == count
    expected = [count / 9 * share for share in (0.7, 0.3) for _ in places]
    assert chisquare(frequencies, expected).pvalue > 1e-3


def test_colour_jitter_is_torchvisions_in_both_orders() -> None:
    images = _images(40).float() / 255
    generator = _generator()
    brightness = torch.rand(40, generator=generator) * 1.5  # far beyond the real range, so that cutting matters
    contrast = torch.rand(40, generator=generator) * 3
    first = torch.rand(40, generator=generator) < 0.5
    output = jittered(images * 255, brightness, contrast, first) / 255
    for index in range(40):
        wanted = images[index]
        by = [(tv.adjust_brightness, brightness), (tv.adjust_contrast, contrast)]
        for adjust, factors in by if first[index] else by[::-1]:
            wanted = adjust(wanted, float(factors[index]))
        torch.testing.assert_close(output[index], wanted, atol=2e-6, rtol=1e-5)


def test_jitter_factors_are_uniform_and_as_often_as_asked() -> None:
    count = 8000
    augment = Augment(BatchSettings(flip_probability=0, pad=0, jitter_probability=0.4, auto_augment_probability=0))
    grey = torch.full((count, 3, 2, 2), 100, dtype=torch.uint8)  # contrast cannot change it
    factors = (_colours(augment(grey, _generator()))[:, 0, 0, 0] / 100).numpy()
    changed = factors[np.abs(factors - 1) > 1e-5]
    assert abs(len(changed) / count - 0.4) < 4 * np.sqrt(0.4 * 0.6 / count)
    assert kstest(changed, "uniform", args=(1 - BRIGHTNESS, 2 * BRIGHTNESS)).pvalue > 1e-3
    two = grey.clone()
    two[:, :, 0] = 60  # difference / mean changes with contrast alone
    output = _colours(augment(two, _generator(1)))[:, 0]
    ratio = ((output[:, 1, 0] - output[:, 0, 0]) / output.mean((1, 2)) / (40 / 80)).numpy()
    changed = ratio[np.abs(ratio - 1) > 1e-5]
    assert kstest(changed, "uniform", args=(1 - CONTRAST, 2 * CONTRAST)).pvalue > 1e-3


def test_same_distribution_as_the_per_image_pipeline() -> None:
    """Mean and variance of every pixel, and of the mean brightness, over many draws of one image."""
    count, pad = 4000, 2
    image = _images(1, 8, 4, seed=3)
    pipeline = v2.Compose(
        [
            v2.Pad(pad),
            v2.RandomCrop((8, 4)),
            v2.RandomHorizontalFlip(0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.ColorJitter(brightness=BRIGHTNESS, contrast=CONTRAST)], p=0.5),
            v2.Normalize(MEAN, STD),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = torch.stack([pipeline(image[0]) for _ in range(count)]).flatten(1)
    augment = Augment(BatchSettings(pad=pad, auto_augment_probability=0))
    batched = augment(image.expand(count, -1, -1, -1), _generator()).flatten(1)
    for one, two in ((reference, batched), (reference.mean(1, keepdim=True), batched.mean(1, keepdim=True))):
        error = ((one.var(0) + two.var(0)) / count).sqrt()
        assert ((one.mean(0) - two.mean(0)).abs() / error).max() < 4.5
        spread = one.var(0) * (2 / count) ** 0.5 * 2
        assert ((one.var(0) - two.var(0)).abs() / spread).max() < 4.5


def test_auto_augment_is_torchvisions_on_the_chosen_images_alone() -> None:
    images = _images(30, 32, 16)
    chosen, seeds = torch.arange(30) % 3 == 0, torch.arange(30) + 100
    output = auto_augmented(images, chosen, seeds)
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=128)
    changed = 0
    for index in range(30):
        wanted = images[index]
        if chosen[index]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(seeds[index]))
                wanted = policy(wanted)
        assert torch.equal(output[index], wanted)
        changed += not torch.equal(wanted, images[index])
    assert changed >= 5  # some policies leave an image as it is


def test_auto_augment_as_often_as_asked() -> None:
    images = torch.randint(256, (1, 3, 16, 8), dtype=torch.uint8, generator=_generator()).expand(1500, -1, -1, -1)
    augment = Augment(BatchSettings(flip_probability=0, pad=0, jitter_probability=0, auto_augment_probability=0.1))
    output = augment(images, _generator())
    changed = (output != normalise(images[:1])).flatten(1).any(1).float().mean()
    assert 0.05 < changed < 0.125  # 10 % are chosen, some of them come out unchanged


def test_the_strong_view_changes_images_as_often_as_it_says() -> None:
    """Of probability 0: flip and crop alone, as the usual view without colours. Of 1: every part, on every image."""
    images = _images(64, 24, 12)
    settings = BatchSettings(pad=2, jitter_probability=0, auto_augment_probability=0)
    none = StrongAugment(settings, 0.0)(images, _generator(5))
    corners = [(row, column, flip) for row in range(5) for column in range(5) for flip in (False, True)]
    windows = {
        tuple(shifted(images[:1], 2, *(torch.tensor([value]) for value in corner)).flatten().tolist())
        for corner in corners
    }
    assert tuple(_colours(none)[0].round().to(torch.uint8).flatten().tolist()) in windows
    always = StrongAugment(settings, 1.0)(images, _generator(5))
    erased = (always == 0).all(1)  # ImageNet's mean colour
    assert bool(erased.flatten(1).any(1).all())
    share = erased.float().mean((1, 2))
    assert 0.01 < share.min() < share.max() < 0.6
    half = StrongAugment(settings, 0.5)(images, _generator(5))
    assert 0.25 < (half == 0).all(1).flatten(1).any(1).float().mean() < 0.75
    state = torch.get_rng_state()
    assert torch.equal(always, StrongAugment(settings, 1.0)(images, _generator(5)))
    assert torch.equal(state, torch.get_rng_state())
