"""Every loss against a slow loop over its definition, then its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lda.parts import latent as losses
from lda.parts.losses import Gaussian, batch_statistics


@pytest.fixture
def maps() -> Tensor:
    """ReLU maps (N, C, H, W) with one dead channel."""
    made = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0)).relu()
    made[:, 2] = 0.0
    return made


def gaussian(seed: int, *shape: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(torch.randn(*shape, generator=generator), torch.rand(*shape, generator=generator) + 0.1)


def slow_w2(p: Gaussian, q: Gaussian) -> float:
    total = 0.0
    for c in range(len(p.mean)):
        sd_p, sd_q = math.sqrt(float(p.var[c]) + 1e-5), math.sqrt(float(q.var[c]) + 1e-5)
        total += float(p.mean[c] - q.mean[c]) ** 2 + (sd_p - sd_q) ** 2
    return math.sqrt(total / len(p.mean) + 1e-8)


def slow_symmetric_kl(p: Gaussian, q: Gaussian) -> float:
    def kl(a: Gaussian, b: Gaussian, c: int) -> float:
        var_a, var_b = float(a.var[c]) + 1e-5, float(b.var[c]) + 1e-5
        return 0.5 * (math.log(var_b / var_a) + (var_a + float(a.mean[c] - b.mean[c]) ** 2) / var_b - 1)

    channels = range(len(p.mean))
    return sum((kl(p, q, c) + kl(q, p, c)) / 2 for c in channels) / len(p.mean)


def test_distance_equals_loop() -> None:
    p, q = gaussian(1, 7), gaussian(2, 7)
    assert float(losses.distance(p, q)) == pytest.approx(slow_w2(p, q), rel=1e-5)
    assert float(losses.distance(p, q, "w2_squared")) == pytest.approx(slow_w2(p, q) ** 2, rel=1e-5)
    assert float(losses.distance(p, q, "symmetric_kl")) == pytest.approx(slow_symmetric_kl(p, q), rel=1e-5)


@pytest.mark.parametrize("kind", ["w2", "w2_squared", "symmetric_kl"])
def test_distance_is_symmetric_and_least_at_equality(kind: str) -> None:
    p, q = gaussian(1, 7), gaussian(2, 7)
    torch.testing.assert_close(losses.distance(p, q, kind), losses.distance(q, p, kind))
    assert float(losses.distance(p, p, kind)) == pytest.approx(0.0, abs=1.01e-4)
    assert losses.distance(p, q, kind) > losses.distance(p, p, kind)


def test_the_ratio_of_gradients_is_that_of_formulas_and_leaves_the_graphs() -> None:
    maps = torch.rand(4, 6, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    aim = gaussian(1, 6)
    identity, latent = (
        0.5 * maps.square().sum(),
        losses.distance(losses.image_statistics(maps), aim, "w2_squared").sum(),
    )
    mean, var = maps.mean((2, 3)).detach(), maps.var((2, 3), correction=0).detach()
    sd, aimed = (var + 1e-5).sqrt(), (aim.var + 1e-5).sqrt()
    by_hand = (2 * (mean - aim.mean))[..., None, None] + (2 * (1 - aimed / sd))[..., None, None] * (
        maps.detach() - mean[..., None, None]
    )
    expected = float((by_hand / (6 * 15)).norm() / maps.detach().norm())
    assert float(losses.gradient_ratio(latent, identity, maps)) == pytest.approx(expected, rel=1e-4)
    assert float(losses.gradient_ratio(3 * latent, identity, maps)) == pytest.approx(3 * expected, rel=1e-4)
    assert float(losses.gradient_ratio(latent, 0 * identity, maps)) > 1e30  # large, and a number
    assert maps.grad is None
    (latent + identity).backward()  # both graphs are still there


def test_statistics_equal_loops(maps: Tensor) -> None:
    batch, images = batch_statistics(maps), losses.image_statistics(maps)
    for c in range(maps.shape[1]):
        values = maps[:, c].flatten().tolist()
        mean = sum(values) / len(values)
        assert float(batch.mean[c]) == pytest.approx(mean, abs=1e-6)
        unbiased = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        assert float(batch.var[c]) == pytest.approx(unbiased, abs=1e-6)
        for n in range(maps.shape[0]):
            pixels = maps[n, c].flatten().tolist()
            own = sum(pixels) / len(pixels)
            assert float(images.mean[n, c]) == pytest.approx(own, abs=1e-6)
            biased = sum((v - own) ** 2 for v in pixels) / len(pixels)
            assert float(images.var[n, c]) == pytest.approx(biased, abs=1e-6)


def test_population_variance_splits(maps: Tensor) -> None:
    """var = mean within-image variance + variance of image means: why L_align has a floor under pooling."""
    images = losses.image_statistics(maps)
    whole = maps.var((0, 2, 3), correction=0)
    torch.testing.assert_close(whole, images.var.mean(0) + images.mean.var(0, correction=0))


def test_latent_kinds_equal_loops() -> None:
    domains = gaussian(3, 3, 5)
    for c in range(5):
        means, variances = domains.mean[:, c].tolist(), domains.var[:, c].tolist()
        mean = sum(means) / 3
        expected = {
            "mean": sum(variances) / 3,
            "barycentre": (sum(math.sqrt(v) for v in variances) / 3) ** 2,
            "mixture": sum(v + m * m for v, m in zip(variances, means, strict=True)) / 3 - mean**2,
        }
        for kind, value in expected.items():
            latent = losses.latent_distribution(domains, kind)
            assert float(latent.mean[c]) == pytest.approx(mean, rel=1e-5)
            assert float(latent.var[c]) == pytest.approx(value, rel=1e-5)


def test_mixture_latent_matches_samples() -> None:
    """The mixture's moments are those of a sample drawn from the domains in equal parts."""
    domains = gaussian(4, 3, 2)
    noise = torch.randn(200_000, 3, 2, generator=torch.Generator().manual_seed(5))
    samples = (domains.mean + domains.var.sqrt() * noise).flatten(0, 1)
    latent = losses.latent_distribution(domains, "mixture")
    torch.testing.assert_close(latent.mean, samples.mean(0), rtol=0.02, atol=0.01)
    torch.testing.assert_close(latent.var, samples.var(0), rtol=0.02, atol=0.01)


def test_consistency_equals_loop(maps: Tensor) -> None:
    latent = gaussian(6, 6)
    expected = slow_w2(batch_statistics(maps), latent)
    assert float(losses.consistency_loss(maps, latent)) == pytest.approx(expected, rel=1e-5)


def test_alignment_equals_loop(maps: Tensor) -> None:
    latent = gaussian(6, 6)
    images = losses.image_statistics(maps)
    each = [slow_w2(Gaussian(images.mean[n], images.var[n]), latent) for n in range(len(maps))]
    assert float(losses.alignment_loss(maps, latent)) == pytest.approx(sum(each) / len(each), rel=1e-5)
    batch = slow_w2(Gaussian(images.mean.mean(0), images.var.mean(0)), latent)
    assert float(losses.alignment_loss(maps, latent, per_image=False)) == pytest.approx(batch, rel=1e-5)


@pytest.mark.parametrize("kind", ["w2", "w2_squared", "symmetric_kl"])
def test_latent_losses_have_finite_gradients(maps: Tensor, kind: str) -> None:
    """At a dead channel, at zero distance and in a map that is all zero."""
    own = losses.latent_distribution(Gaussian(*(part[None] for part in batch_statistics(maps))))
    for values in (maps, torch.zeros_like(maps)):
        leaf = values.clone().requires_grad_()
        (losses.consistency_loss(leaf, own, kind) + losses.alignment_loss(leaf, own, kind)).backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
