"""What the poster leaves open: every reading against a slow loop, and any combination of them trains or is refused."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from test_lda import NUM_IDS, batch, build_method, small, warmed
from test_lda_latent import gaussian, slow_w2
from test_lda_layer import EPS, K, layer, run, slow_normalise, x
from torch import Tensor

from lda.config import known_settings
from lda.errors import UsageError
from lda.methods.lda import LDA, LDASettings
from lda.parts import given
from lda.parts.anti_norm import AntiNormalised, BufferBankNorm2d, Expert, UnseenExpert, bank_sites, named_banks
from lda.parts.backbones import build_backbone
from lda.parts.donors import by_distance, draw_donors
from lda.parts.heads import gem
from lda.parts.latent import alignment_loss, consistency_loss, distance, image_statistics, latent_distribution
from lda.parts.losses import Gaussian, batch_statistics

__all__ = ["layer", "x"]


def slow_an(layer: BufferBankNorm2d, x: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Eq. (4) and what comes after it, image by image and channel by channel; means, variances (N, C)."""
    out = torch.empty_like(x)
    for n, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        own = x[n, c]
        made = (own - own.mean()) / (own.var(correction=0) + EPS) ** 0.5
        made = made * (variances[n, c] + EPS) ** 0.5 + means[n, c]
        if layer.affine == "renormalised":
            center = sum(layer.bank.mean[k, c] for k in range(K)) / K
            spread = sum(layer.bank.var[k, c] for k in range(K)) / K
            made = (made - center) / (spread + EPS) ** 0.5
        out[n, c] = made if layer.affine == "none" else layer.weight[c] * made + layer.bias[c]
    return out


def slow_relevance(own: Gaussian, rows: Gaussian) -> list[float]:
    gaps = [slow_w2(own, Gaussian(rows.mean[k], rows.var[k])) for k in range(len(rows.mean))]
    shares = [math.exp(-gap / (sum(gaps) / len(gaps))) for gap in gaps]
    return [share / sum(shares) for share in shares]


def image(x: Tensor, n: int) -> Gaussian:
    return Gaussian(x[n].mean((1, 2)), x[n].var((1, 2), correction=0))


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", ["none", "shared", "renormalised"])
@pytest.mark.parametrize("rows", [(1, 1, 1, 1), (2, 0, 1, 0)], ids=["one donor", "a donor for each image"])
def test_anti_normalization_equals_the_loop(
    affine: Any, rows: tuple[int, ...], layer: BufferBankNorm2d, x: Tensor
) -> None:
    layer.affine = affine
    route = AntiNormalised(given.Row(1) if len(set(rows)) == 1 else given.Rows(rows))
    expected = slow_an(layer, x, layer.bank.mean[list(rows)], layer.bank.var[list(rows)])
    torch.testing.assert_close(run(layer, route, x), expected, rtol=1e-4, atol=1e-4)


def test_renormalised_by_its_own_row_it_would_cancel(layer: BufferBankNorm2d, x: Tensor) -> None:
    """C1 of the equations: with one domain the mean of the rows is the donor's, and the donor disappears."""
    layer.affine = "renormalised"
    layer.bank.mean[:], layer.bank.var[:] = layer.bank.mean[0].clone(), layer.bank.var[0].clone()
    expected = torch.nn.functional.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=EPS)
    torch.testing.assert_close(run(layer, AntiNormalised(given.Row(0)), x), expected, rtol=1e-4, atol=1e-4)


def test_the_nearest_row_is_each_images_own_choice(layer: BufferBankNorm2d, x: Tensor) -> None:
    bank = layer.bank
    gaps = [[slow_w2(image(x, n), Gaussian(bank.mean[k], bank.var[k])) for k in range(K)] for n in range(len(x))]
    nearest = [row.index(min(row)) for row in gaps]
    torch.testing.assert_close(
        run(layer, AntiNormalised(given.NearestRow()), x), run(layer, AntiNormalised(given.Rows(tuple(nearest))), x)
    )
    expected = slow_normalise(x, bank.mean[nearest], bank.var[nearest], layer.weight, layer.bias)
    torch.testing.assert_close(run(layer, UnseenExpert(given.NearestRow()), x), expected, rtol=1e-4, atol=1e-4)


def test_weighted_rows_and_rows_mixed_with_the_images_own(layer: BufferBankNorm2d, x: Tensor) -> None:
    bank = layer.bank
    rows = Gaussian(bank.mean, bank.var)
    weights = torch.tensor([slow_relevance(image(x, n), rows) for n in range(len(x))])
    assert (
        weights.argmax(1).tolist()
        == given.distance(Gaussian(*(of[:, None] for of in image_statistics(x))), rows).argmin(1).tolist()
    )
    expected = slow_normalise(x, weights @ bank.mean, weights @ bank.var, layer.weight, layer.bias)
    torch.testing.assert_close(run(layer, UnseenExpert(given.WeightedRows()), x), expected, rtol=1e-4, atol=1e-4)
    own = [image(x, n) for n in range(len(x))]
    means = torch.stack([(one.mean + bank.mean.mean(0)) / 2 for one in own])
    variances = torch.stack([(one.var + bank.var.mean(0)) / 2 for one in own])
    expected = slow_normalise(x, means, variances, layer.weight, layer.bias)
    torch.testing.assert_close(run(layer, UnseenExpert(given.MeanRowAndOwn()), x), expected, rtol=1e-4, atol=1e-4)


def test_every_layer_may_draw_its_own_donor() -> None:
    method = warmed(small())
    route = given.RowOfLayer(domain=1, seed=0, step=3)
    images = batch(1).images
    drawn = []
    for site, (_, bank) in enumerate(named_banks(method.backbone)):
        found = route.statistics(bank, site, images)
        (row,) = [k for k in range(3) if torch.equal(bank.mean[k], found.mean)]
        drawn.append(row)
    assert set(drawn) == {0, 2}
    sites = [m.site for m in method.backbone.modules() if isinstance(m, BufferBankNorm2d)]
    assert sites == list(range(len(drawn)))


def test_donors_of_images_and_by_distance(layer: BufferBankNorm2d) -> None:
    drawn = draw_donors(200, domain=1, num_domains=3, seed=5, step=2)
    assert 70 < drawn.count(0) < 130
    assert drawn.count(1) == 0
    assert drawn == draw_donors(200, domain=1, num_domains=3, seed=5, step=2)
    assert drawn != draw_donors(200, domain=1, num_domains=3, seed=5, step=3)
    rows = [Gaussian(layer.bank.mean[k], layer.bank.var[k]) for k in range(K)]
    gaps = {k: slow_w2(rows[1], rows[k]) for k in (0, 2)}
    assert int(by_distance("nearest", 1, layer.bank)) == min(gaps, key=gaps.__getitem__)
    assert int(by_distance("farthest", 1, layer.bank)) == max(gaps, key=gaps.__getitem__)


def test_control_statistics_hold_no_domain(layer: BufferBankNorm2d, x: Tensor) -> None:
    """Drawn ones have the spread of the mean row over channels; those of other images stay within the batch."""
    bank = layer.bank
    first = given.GaussianStatistics(0, 1).statistics(bank, 0, x)
    again, later = (given.GaussianStatistics(0, step).statistics(bank, 0, x) for step in (1, 2))
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, later.mean)
    many = [given.GaussianStatistics(0, step).statistics(bank, 0, x) for step in range(2000)]
    means = torch.stack([one.mean for one in many])
    row = bank.mean.mean(0)
    assert float(means.mean()) == pytest.approx(float(row.mean()), abs=0.05)
    assert float(means.std()) == pytest.approx(float(row.std(correction=0)), rel=0.05)
    assert all(bool((one.var > 0).all()) for one in many)
    mixed = given.OtherImages(0, 1).statistics(bank, 0, x)
    own = image_statistics(x)
    assert bool((mixed.mean <= own.mean.max(0).values + 1e-6).all())
    assert bool((mixed.mean >= own.mean.min(0).values - 1e-6).all())
    alone = given.OtherImages(0, 1).statistics(bank, 0, x[:1])
    torch.testing.assert_close(alone.mean, image_statistics(x[:1]).mean)


@pytest.mark.parametrize(
    ("sites", "stages"),
    [("stages_1_2", "12"), ("stages_1_2_3", "123"), ("stages_3_4", "34"), ("all", "s1234"), ("no_stem", "1234")],
)
def test_sites(sites: Any, stages: str) -> None:
    names = bank_sites(build_backbone("small"), sites)
    assert {name[5] if name.startswith("layer") else "s" for name in names} == set(stages)
    method = build_method(small(norm_sites=sites), NUM_IDS)
    assert [name for name, _ in named_banks(method.backbone)] == names


# --- the bank and the latent -----------------------------------------------------------------------------------------


def test_rows_may_begin_with_zeros_or_with_what_was_pretrained(tmp_path: Any) -> None:
    from torchvision.models import resnet18

    zeros = build_method(small(bank_start="zeros"), NUM_IDS)
    (_, first), *_ = named_banks(zeros.backbone)
    assert float(first.var.sum() + first.mean.abs().sum()) == 0.0
    zeros.training_losses(batch(0), 0)
    with torch.no_grad():
        whole = batch_statistics(zeros.backbone.conv1(batch(0).images))
    torch.testing.assert_close(first.var[0], 0.1 * whole.var, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="bank_start: pretrained begins with the statistics of pretrained weights"):
        build_method(small(bank_start="pretrained"), NUM_IDS)
    network = resnet18(weights=None)
    network.bn1.running_mean += 3.0
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    method = build_method(
        small(bank_start="pretrained", backbone="resnet18", pretrained=str(tmp_path / "weights.pt")), NUM_IDS
    )
    (_, first), *_ = named_banks(method.backbone)
    assert torch.equal(first.mean, torch.full((3, 64), 3.0))
    method.training_losses(batch(1), 0)
    assert torch.equal(first.mean[[0, 2]], torch.full((2, 64), 3.0))
    share = batch_statistics(method.backbone.conv1(batch(1).images)).mean
    torch.testing.assert_close(first.mean[1], 2.7 + 0.1 * share, rtol=1e-4, atol=1e-5)


def slow_distance(p: Gaussian, q: Gaussian, kind: str) -> float:
    total = 0.0
    for c in range(len(p.mean)):
        gap = float(p.mean[c] - q.mean[c]) ** 2
        var_p, var_q = float(p.var[c]) + 1e-5, float(q.var[c]) + 1e-5
        if kind == "kl":
            total += 0.5 * (math.log(var_q / var_p) + (var_p + gap) / var_q - 1)
        else:
            total += gap + (var_p - var_q) ** 2
    return total / len(p.mean) if kind == "kl" else math.sqrt(total / len(p.mean) + 1e-8)


@pytest.mark.parametrize("kind", ["kl", "l2"])
def test_distances_equal_the_loop(kind: Any) -> None:
    p, q = gaussian(1, 7), gaussian(2, 7)
    assert float(distance(p, q, kind)) == pytest.approx(slow_distance(p, q, kind), rel=1e-5)
    assert float(distance(p, p, kind)) == pytest.approx(0.0, abs=1.01e-4)
    torchs = [torch.distributions.Normal(of.mean, (of.var + 1e-5).sqrt()) for of in (p, q)]
    if kind == "kl":
        expected = torch.distributions.kl_divergence(*torchs).mean()
        torch.testing.assert_close(distance(p, q, "kl"), expected)


def test_a_weighted_latent_leans_to_the_batch() -> None:
    rows, live = gaussian(3, 4, 6), gaussian(4, 6)
    weights = slow_relevance(live, rows)
    found = latent_distribution(rows, "weighted", live)
    torch.testing.assert_close(found.mean, sum(w * rows.mean[k] for k, w in enumerate(weights)))
    torch.testing.assert_close(found.var, sum(w * rows.var[k] for k, w in enumerate(weights)))
    own = latent_distribution(rows, "weighted", Gaussian(rows.mean[2], rows.var[2]))
    assert slow_w2(own, Gaussian(rows.mean[2], rows.var[2])) < slow_w2(
        latent_distribution(rows), Gaussian(rows.mean[2], rows.var[2])
    )
    with pytest.raises(ValueError, match="needs the batch's own statistics"):
        latent_distribution(rows, "weighted")


def consistency_gradient(**changes: Any) -> tuple[float, Tensor, LDA, Tensor]:
    """L_consis of a step on domain 1, its gradient with respect to the map of Network-E, the method, and the map."""
    method = warmed(small(**changes))
    with method.switch.on(Expert(1)):
        maps = method.backbone(batch(1, seed=5).images).detach().requires_grad_()
    (latent,) = method._latents(1, [maps], method._update_output_banks(1, [maps]))
    loss = consistency_loss(maps, latent)
    loss.backward()
    assert maps.grad is not None
    return loss.item(), maps.grad, method, maps


def test_gradient_through_the_latent_is_that_of_the_banks_equation() -> None:
    stopped, own, _, _ = consistency_gradient()
    flows, through, method, maps = consistency_gradient(latent_gradient="flows")
    assert flows == stopped  # the value is the same
    assert not torch.allclose(own, through)
    # By hand: the row before the step, and 1 - m of the batch with its gradient.
    bank = method.output_bank
    live = batch_statistics(maps)
    before = [(row[1] - 0.1 * of.detach()) / 0.9 for row, of in ((bank.mean, live.mean), (bank.var, live.var))]
    rows = [
        torch.stack([row[0], 0.9 * old + 0.1 * of, row[2]])
        for row, old, of in ((bank.mean, before[0], live.mean), (bank.var, before[1], live.var))
    ]
    maps.grad = None
    consistency_loss(maps, Gaussian(rows[0].mean(0), rows[1].mean(0))).backward()
    torch.testing.assert_close(through, maps.grad, rtol=1e-3, atol=1e-8)


def test_like_is_compared_with_like() -> None:
    """Maps whose images all have the same moments: the variance within images is the whole variance, and the loss of
    the banks' own images is nothing."""
    method = warmed(small(alignment="within"))
    (within,) = method.within_banks
    expected = torch.stack([image_statistics(maps_of(method, k)).var.mean(0) for k in range(3)])
    torch.testing.assert_close(within.var, expected, rtol=1e-4, atol=1e-6)
    assert bool((within.var <= method.output_bank.var + 1e-6).all())
    latents = method._latents(0, [maps_of(method, 0)], [batch_statistics(maps_of(method, 0))])
    (aim,) = method._within(latents)
    torch.testing.assert_close(aim.var, within.var.mean(0))
    assert torch.equal(aim.mean, latents[0].mean)


def maps_of(method: LDA, domain: int) -> Tensor:
    """The map of Network-E that entered the banks of a method that is only warmed."""
    again = warmed_until(method, domain)
    with torch.no_grad(), again.switch.on(Expert(domain)):
        return again.backbone(batch(domain, seed=domain).images)


def warmed_until(method: LDA, domain: int) -> LDA:
    again = build_method(small(alignment="within"), NUM_IDS)
    assert isinstance(again, LDA)
    again.load_state_dict(method.state_dict())
    return again.train()


def test_latent_losses_after_every_stage() -> None:
    config = small(latent_maps="stages", warmup_epochs=0)
    method = warmed(config)
    assert [bank.mean.shape[1] for bank in method._output_banks()] == [24, 48, 96, 192]
    images = batch(1, seed=9).images
    with torch.no_grad(), method.switch.on(UnseenExpert()):
        assert torch.equal(method.backbone.stage_maps(images)[-1], method.backbone(images))
    reference = warmed(config)
    reference.load_state_dict(method.state_dict())
    losses = method.training_losses(batch(1, seed=9), 41)
    with torch.no_grad(), reference.switch.on(Expert(1)):
        maps_e = reference.backbone.stage_maps(images)
    with torch.no_grad(), reference.switch.on(reference.draw_routes(1, 41, 8)[0]):
        maps_a = reference.backbone.stage_maps(images)
    each = []
    for bank, maps, aligned in zip(method._output_banks(), maps_e, maps_a, strict=True):
        latent = Gaussian(bank.mean.mean(0), bank.var.mean(0))
        each.append((consistency_loss(maps, latent), alignment_loss(aligned, latent)))
    torch.testing.assert_close(losses["loss/consistency"], sum(one[0] for one in each) / 4, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss/alignment"], sum(one[1] for one in each) / 4, rtol=1e-4, atol=1e-6)


# --- the step and the test -------------------------------------------------------------------------------------------


def test_all_donors_are_the_average_of_their_passes() -> None:
    every = warmed(small(donor="all", warmup_epochs=0))
    assert every.cost.train_passes == 3
    state = every.state_dict()
    found = every.training_losses(batch(1, seed=9), 41)
    each = []
    for donor in (0, 2):
        one = warmed(small(warmup_epochs=0))
        one.load_state_dict(state)
        one.draw_routes = lambda *_, donor=donor: [AntiNormalised(given.Row(donor))]  # type: ignore[method-assign]
        each.append(one.training_losses(batch(1, seed=9), 41))
    for name in ("loss/id_a", "loss/triplet_a", "loss/alignment", "loss/total"):
        torch.testing.assert_close(found[name], (each[0][name] + each[1][name]) / 2, rtol=1e-4, atol=1e-5)


def test_the_margin_of_network_a_is_its_own() -> None:
    one, two = (warmed(small(margin_ratio=ratio)).training_losses(batch(1, seed=9), 41) for ratio in (1.0, 50.0))
    assert one["loss/triplet_e"] == two["loss/triplet_e"]
    gap = (two["loss/triplet_a"] - one["loss/triplet_a"]).item()
    assert gap == pytest.approx(49 * 0.3, abs=0.3)  # all triplets are active at a margin of 15


@pytest.mark.parametrize(
    ("unseen", "donors"),
    [("mean", "all"), ("nearest", "weighted"), ("weighted", "nearest"), ("mixed_with_own", "mixed")],
)
def test_inference_is_made_of_the_named_passes(unseen: str, donors: str) -> None:
    parts = {
        "mean": given.MeanRow(), "nearest": given.NearestRow(), "weighted": given.WeightedRows(),
        "mixed_with_own": given.MeanRowAndOwn(),
    }  # fmt: skip
    borrowed = {"all": [given.Row(k) for k in range(3)], "mixed": [parts["mean"]], "nearest": [parts["nearest"]],
                "weighted": [parts["weighted"]]}[donors]  # fmt: skip
    method = warmed(small(unseen_expert=unseen, test_donors=donors)).eval()
    images = batch(0, seed=3).images

    def feature(route: Any) -> Tensor:
        with method.switch.on(route):
            return torch.nn.functional.normalize(gem(method.backbone(images), 3.0))

    expert = feature(UnseenExpert(parts[unseen]))
    aligned = sum(feature(AntiNormalised(one)) for one in borrowed) / len(borrowed)
    torch.testing.assert_close(method(images), expert + aligned)
    assert method.cost.test_forwards == 1 + len(borrowed)
    together = torch.cat([method(images[n : n + 1]) for n in range(len(images))])
    torch.testing.assert_close(together, method(images), rtol=1e-4, atol=1e-5)
    behind = warmed(small(unseen_expert=unseen, test_donors=donors, inference="concatenated")).eval()
    torch.testing.assert_close(behind(images), torch.cat([expert, aligned], 1))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"network_a": "in", "an_affine": "shared"}, "an_affine: 'shared' needs Anti-Normalization, but network_a"),
        ({"network_a": "in", "donor": "all"}, "donor: 'all' needs Anti-Normalization"),
        ({"network_a": "none", "inference": "expert", "alignment": "batch"}, "alignment: 'batch' needs Network-A"),
        ({"network_a": "none", "inference": "expert", "margin_ratio": 2.0}, "margin_ratio: 2.0 needs Network-A"),
        ({"inference": "expert", "test_donors": "mixed"}, "test_donors: 'mixed' needs Anti-Normalization in the test"),
        ({"inference": "aligned", "unseen_expert": "nearest"}, "unseen_expert: 'nearest' needs Network-E in the test"),
        ({"camera_statistics": "on", "unseen_expert": "nearest"}, "unseen_expert: 'nearest' needs statistics of the"),
    ],
)  # fmt: skip
def test_what_would_change_nothing_is_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        small(**changes)


def test_one_source_has_no_other_domain_but_controls() -> None:
    with pytest.raises(UsageError, match="borrows the statistics of another source domain"):
        build_method(small(), (5,))
    for donor in ("own", "gaussian", "other_images"):
        method = build_method(small(donor=donor), (5,))
        for step in range(3):
            losses = method.training_losses(batch(0, seed=step), step)
        assert "loss/id_a" in losses


# --- any combination -------------------------------------------------------------------------------------------------


def combination(draw: random.Random) -> dict[str, Any]:
    """Settings of LDA drawn at random: of every switch half the time its default."""
    known = known_settings("lda")
    chosen: dict[str, Any] = {}
    for field in fields(LDASettings):
        setting = known[field.name]
        if setting.choices and draw.random() < 0.5:
            chosen[field.name] = draw.choice(setting.choices)
    return {**chosen, "margin_ratio": draw.choice([1.0, 1.0, 2.0]), "bank_warmup_updates": draw.choice([0, 1])}


def try_combination(seed: int) -> str:
    """ "" for one that trains and embeds, or why it is refused; fails where it does neither."""
    changes = combination(random.Random(seed))
    try:
        method = build_method(small(image_height=32, image_width=16, **changes), NUM_IDS)
    except UsageError as refused:
        return str(refused)
    assert isinstance(method, LDA)
    optimiser = torch.optim.Adam(method.parameters(), 1e-3)
    for step in range(5):  # two of them with Network-A, whatever its warm-up
        losses = method.training_losses(batch(step % 3, seed=step), step)
        optimiser.zero_grad()
        losses["loss/total"].backward()
        optimiser.step()
        assert all(bool(torch.isfinite(value)) for value in losses.values()), (changes, losses)
    again = build_method(small(image_height=32, image_width=16, **changes), NUM_IDS)
    again.load_state_dict(method.state_dict())
    with torch.no_grad():
        if not method.looks_at_target:
            features = method.eval()(batch(0).images)
            assert bool(torch.isfinite(features).all()), changes
            assert torch.equal(features, again.eval()(batch(0).images)), changes
            assert np.ndim(features) == 2
    return ""


@pytest.mark.parametrize("seed", range(12))
def test_any_combination_trains_or_is_refused(seed: int) -> None:
    refused = try_combination(seed)
    assert not refused or refused.partition(":")[0] in known_settings("lda")


@pytest.mark.slow
def test_many_combinations(capsys: pytest.CaptureFixture[str]) -> None:
    refused = [bool(try_combination(seed)) for seed in range(1000, 2000)]
    with capsys.disabled():
        print(f"1000 combinations: {len(refused) - sum(refused)} trained, {sum(refused)} refused")
    assert 100 < sum(refused) < 900
