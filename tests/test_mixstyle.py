"""MixStyle: the mixture, its gradient and its draws, against slow oracles."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mixed_batches import build, gradients, mixed_batch
from torch import Tensor

from lda.config import preset
from lda.errors import UsageError
from lda.methods.mixstyle import MixedStep, MixStyle, MixStyleSettings, StyleMixing, draw, mix_styles
from lda.parts.routes import Switch

DOMAINS = torch.tensor([0, 1, 2]).repeat_interleave(4)


def mixstyle(**changes: object) -> MixStyle:
    method = build("mixstyle", **changes)
    assert isinstance(method, MixStyle)
    return method


def maps(seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(12, 5, 1, 1, generator=random)
    return torch.randn(12, 5, 6, 3, generator=random) * scale + torch.randn(12, 5, 1, 1, generator=random)


def slow_mixture(x: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """(X1) and (X3), one image and channel at a time, in float64."""
    y = torch.empty_like(x, dtype=torch.float64)
    for i in range(x.shape[0]):
        for c in range(x.shape[1]):
            own, other = x[i, c].double(), x[int(partner[i]), c].double()
            deviations = [
                ((v - v.mean()).square().sum() / (v.numel() - 1) + 1e-6).sqrt() for v in (own, other)
            ]  # fmt: skip
            mixed = share[i] * deviations[0] + (1 - share[i]) * deviations[1]
            shift = share[i] * own.mean() + (1 - share[i]) * other.mean()
            y[i, c] = mixed * (own - own.mean()) / deviations[0] + shift
    return y


@pytest.mark.parametrize("contrast", [1.0, 1e-3])  # where it is faint, 1e-6 counts, and which variance is meant
def test_mixture_equals_the_slow_oracle(contrast: float) -> None:
    x, share, partner = contrast * maps(), torch.linspace(0, 1, 12, dtype=torch.float64), torch.arange(12).roll(5)
    x[::2] *= 3
    y = mix_styles(x, share, partner)
    torch.testing.assert_close(y.double(), slow_mixture(x, share, partner), rtol=1e-4, atol=1e-5 * contrast)


def test_moments_are_mixed() -> None:
    x, share = maps(), torch.linspace(0, 1, 12, dtype=torch.float64)
    partner = torch.arange(12).roll(5)
    y = mix_styles(x, share, partner)
    own = share[:, None].float()
    mean, deviation = x.mean((2, 3)), x.std((2, 3))
    torch.testing.assert_close(y.mean((2, 3)), own * mean + (1 - own) * mean[partner], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.std((2, 3)), own * deviation + (1 - own) * deviation[partner], rtol=1e-3, atol=1e-4)


def test_share_one_and_the_own_image_as_partner_change_nothing() -> None:
    x = maps()
    torch.testing.assert_close(mix_styles(x, torch.ones(12), torch.arange(12).roll(3)), x)
    torch.testing.assert_close(mix_styles(x, torch.rand(12), torch.arange(12)), x)


def test_gradient_is_the_ratio_of_deviations() -> None:
    """Statistics are constants, the partner's too: dL/dx_i = mixed sigma_i / sigma_i dL/dy_i, and nothing else."""
    x, share, partner = maps().requires_grad_(), torch.linspace(0, 1, 12), torch.arange(12).roll(5)
    upstream = torch.randn(12, 5, 6, 3, generator=torch.Generator().manual_seed(2))
    (mix_styles(x, share, partner) * upstream).sum().backward()
    deviation = (x.detach().var((2, 3)) + 1e-6).sqrt()
    mixed = share[:, None] * deviation + (1 - share[:, None]) * deviation[partner]
    torch.testing.assert_close(x.grad, (mixed / deviation)[:, :, None, None] * upstream)


def test_a_dead_channel_stays_finite() -> None:
    x = maps()
    x[:3] = 0
    x.requires_grad_()
    y = mix_styles(x, torch.full((12,), 0.3), torch.arange(12).roll(1))
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_low_precision_maps_have_moments_in_full() -> None:
    x, share, partner = maps() + 100, torch.rand(12), torch.arange(12).roll(5)
    low = mix_styles(x.bfloat16(), share, partner)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, mix_styles(x.bfloat16().float(), share, partner).bfloat16())


def drawn(steps: range, seed: int = 3, stage: int = 1, **changes: object) -> list[object]:
    settings = MixStyleSettings(**{"mixstyle_p": 1.0, **changes})
    return [draw(settings, seed, stage, MixedStep(step, DOMAINS)) for step in steps]


def test_cross_domain_partners_are_all_images_of_other_domains_and_no_others() -> None:
    partners = np.stack([draws.partner for draws in drawn(range(400))])
    for i, domain in enumerate(DOMAINS.tolist()):
        others = np.flatnonzero(DOMAINS.numpy() != domain)
        found, counts = np.unique(partners[:, i], return_counts=True)
        assert found.tolist() == others.tolist()
        assert counts.min() > 25  # 50 expected of each of the eight
        assert counts.max() < 80


def test_random_partners_are_a_permutation() -> None:
    for draws in drawn(range(50), mixstyle_partner="random"):
        assert sorted(draws.partner.tolist()) == list(range(12))
    partners = np.stack([draws.partner for draws in drawn(range(200), mixstyle_partner="random")])
    own = DOMAINS.numpy()[partners] == DOMAINS.numpy()
    assert 0.25 < own.mean() < 0.42  # a third of the batch is of the own domain


@pytest.mark.parametrize(("alpha", "variance"), [(0.1, 1 / 4.8), (1.0, 1 / 12), (1e-3, 0.25 / 1.002), (10.0, 1 / 84)])
def test_shares_are_of_the_beta_distribution(alpha: float, variance: float) -> None:
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), down to the smallest alpha, where it is a coin."""
    shares = np.concatenate([draws.share for draws in drawn(range(300), mixstyle_alpha=alpha)])
    assert np.isfinite(shares).all()
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    assert shares.var() == pytest.approx(variance, rel=0.1)


def test_the_coin_is_thrown_once_a_site_and_step() -> None:
    mixed = [[draws is not None for draws in drawn(range(400), stage=s, mixstyle_p=0.3)] for s in (1, 2)]
    assert [80 < sum(site) < 160 for site in mixed] == [True, True]
    both = sum(a and b for a, b in zip(*mixed, strict=True))
    assert 15 < both < 65  # sites are independent: 36 expected
    assert drawn(range(50), mixstyle_p=0.0) == [None] * 50


def test_draws_are_a_function_of_seed_step_and_site() -> None:
    """In any order, whatever the global generators did; another seed, step or site gives others."""
    first = drawn(range(5))
    torch.manual_seed(99)
    np.random.seed(99)
    again = [drawn(range(step, step + 1))[0] for step in reversed(range(5))]
    for one, other in zip(first, reversed(again), strict=True):
        assert np.array_equal(one.share, other.share)
        assert np.array_equal(one.partner, other.partner)
    for others in (drawn(range(5), seed=4), drawn(range(5), stage=2), drawn(range(1, 6))):
        assert not np.array_equal(first[0].share, others[0].share)


def test_a_batch_of_one_domain_has_no_partner_elsewhere() -> None:
    one = MixedStep(0, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="two source domains"):
        draw(MixStyleSettings(mixstyle_p=1.0), 0, 1, one)
    assert draw(MixStyleSettings(mixstyle_p=1.0, mixstyle_partner="random"), 0, 1, one) is not None


def test_a_site_mixes_in_training_only() -> None:
    switch: Switch[MixedStep] = Switch()
    site = StyleMixing(1, MixStyleSettings(mixstyle_p=1.0), 3, switch)
    x = maps()
    draws = drawn(range(7, 8))[0]
    with switch.on(MixedStep(7, DOMAINS)):
        expected = slow_mixture(x, torch.from_numpy(draws.share), torch.from_numpy(draws.partner))
        torch.testing.assert_close(site(x).double(), expected, rtol=1e-4, atol=1e-5)
        assert site.eval()(x) is x
    assert site.eval()(x) is x, "evaluation knows of no step"
    with pytest.raises(RuntimeError, match="needs a route"):
        site.train()(x)


def test_probability_zero_is_the_baseline_to_the_bit_and_one_is_not() -> None:
    ours, baseline, always = mixstyle(mixstyle_p=0.0), build("baseline"), mixstyle(mixstyle_p=1.0)
    data = mixed_batch()
    losses, expected = ours.training_losses(data, 0), baseline.training_losses(data, 0)
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    assert not torch.isclose(always.training_losses(data, 0)["loss/total"], expected["loss/total"], rtol=1e-4)
    losses["loss/total"].backward()
    expected["loss/total"].backward()
    assert all(torch.equal(value, gradients(baseline)[key]) for key, value in gradients(ours).items())
    assert ours.state_dict().keys() == baseline.state_dict().keys()
    ours.eval()
    assert torch.equal(ours(data.images), baseline.eval()(data.images))


def test_the_network_mixes_behind_the_chosen_stages() -> None:
    """The plain network's parts in order, with the oracle's mixture where a site is."""
    method = mixstyle(mixstyle_p=1.0, mixstyle_stages=(1, 3))
    plain = copy.deepcopy(method.backbone)
    data = mixed_batch()
    with torch.no_grad():
        x = plain.relu(plain.bn1(plain.conv1(data.images)))
        for stage in (1, 2, 3, 4):
            x = plain.get_submodule(f"layer{stage}")(x)
            if stage in (1, 3):
                draws = drawn(range(11, 12), seed=0, stage=stage)[0]
                partner = torch.from_numpy(draws.partner)
                x = slow_mixture(x, torch.from_numpy(draws.share), partner).float()
        with method.switch.on(MixedStep(11, data.domains)):
            torch.testing.assert_close(method.backbone(data.images), x, rtol=1e-3, atol=1e-3)


def test_a_step_tells_its_number_and_domains_to_the_sites() -> None:
    method = mixstyle(mixstyle_p=1.0)
    twin = copy.deepcopy(method)
    data = mixed_batch()
    losses = method.training_losses(data, 5)
    with twin.switch.on(MixedStep(5, data.domains)):
        features = twin.pooled(twin.backbone(data.images))
    identity, triplet = twin.identity_terms(twin.head, features, twin.joint_labels(data))
    torch.testing.assert_close(losses["loss/total"], identity + triplet)
    with pytest.raises(RuntimeError, match="needs a route"):
        method.backbone(data.images)


def test_contradictions_are_told() -> None:
    with pytest.raises(UsageError, match=r"mixstyle_partner: cross_domain .* set mixstyle_partner=random"):
        build("mixstyle", (5,))
    build("mixstyle", (5,), mixstyle_partner="random")
    for stages in ((), (2, 1), (1, 1), (0, 1), (5,)):
        with pytest.raises(UsageError, match="mixstyle_stages: expected rising stages from 1 to 4"):
            preset("standin", method="mixstyle", mixstyle_stages=stages)
    assert preset("standin", method="mixstyle").replace(mixstyle_stages="1,2,3").value("mixstyle_stages") == (1, 2, 3)
    method = mixstyle(mixstyle_p=1.0, mixstyle_stages=(4,))
    data = mixed_batch()
    with pytest.raises(UsageError, match="image_height, image_width"):
        method.training_losses(data._replace(images=data.images[:, :, :8, :8]), 0)
