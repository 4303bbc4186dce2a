"""ReNorm's layer against slow loops, and its two passes, heads and inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lda import methods
from lda.batch import Batch
from lda.config import preset
from lda.errors import UsageError
from lda.methods.renorm import Emulation, MeanRemix, Remix, ReNorm, ReNorm2d, Route
from lda.parts.bank import BufferBank
from lda.parts.donors import draw_donor
from lda.parts.heads import gem
from lda.parts.losses import batch_hard_triplet_loss, identity_loss
from lda.parts.routes import Switch, statistics_held

NUM_IDS = (5, 7, 6)
EPS = 1e-5


def renorm(num_ids: tuple[int, ...] = NUM_IDS, **changes: Any) -> ReNorm:
    config = preset("standin", method="renorm", warmup_epochs=0, **changes)
    method = methods.build(config.method, config.setup(num_ids))
    assert isinstance(method, ReNorm)
    return method


def batch_of(domain: int, seed: int = 0) -> Batch:
    images = torch.randn(8, 3, 32, 16, generator=torch.Generator().manual_seed(seed)) * (1 + domain) + domain
    return Batch(images, torch.tensor([0, 1, 2, 3]).repeat_interleave(2), torch.full((8,), domain))


def warmed(method: ReNorm) -> ReNorm:
    """A method that has seen every domain, with other blends and affine than at the start."""
    for domain in range(method.num_domains):
        method.training_losses(batch_of(domain, domain), 0)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in method.backbone.named_parameters():
            if "blends" in name:
                parameter.normal_(generator=generator)
            elif parameter.ndim == 1:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    return method


def layer_of(mix: float = 0.5, momentum: float = 0.9) -> tuple[ReNorm2d, Switch[Route]]:
    switch: Switch[Route] = Switch()
    bank = BufferBank(3, 5, momentum)
    generator = torch.Generator().manual_seed(1)
    for domain in range(3):
        bank.update(domain, torch.randn(5, generator=generator), 0.5 + torch.rand(5, generator=generator))
    layer = ReNorm2d(bank, switch, mix)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(5, generator=generator))
        layer.bias.copy_(torch.randn(5, generator=generator))
        for blend in layer.blends:
            blend.copy_(torch.randn(2, 2, generator=generator))
    return layer, switch


def slowly(x: Tensor, statistics: Callable[[int, int], tuple[Tensor, Tensor]]) -> Tensor:
    """(x - mean) / sqrt(var + eps), one image and one channel at a time."""
    y = torch.zeros_like(x)
    for n in range(len(x)):
        for c in range(x.shape[1]):
            mean, var = statistics(n, c)
            y[n, c] = (x[n, c] - mean) / (var + EPS).sqrt()
    return y


def slow_remix(layer: ReNorm2d, x: Tensor, r: float) -> Tensor:
    """Eq. (R1)."""

    def statistics(n: int, c: int) -> tuple[Tensor, Tensor]:
        batch = x[:, c].flatten()
        return (r * x[n, c].mean() + (1 - r) * batch.mean(), r * x[n, c].var() + (1 - r) * batch.var())

    return slowly(x, statistics) * layer.weight[:, None, None] + layer.bias[:, None, None]


def slow_emulation(layer: ReNorm2d, x: Tensor, donor: int) -> Tensor:
    """Eq. (R3)."""
    a, b = torch.softmax(layer.blends[donor][0], 0), torch.softmax(layer.blends[donor][1], 0)
    bank = layer.bank

    def statistics(n: int, c: int) -> tuple[Tensor, Tensor]:
        mean = a[0] * x[n, c].mean() + a[1] * bank.mean[donor, c]
        return mean, b[0] * x[n, c].var() + b[1] * bank.var[donor, c]

    return slowly(x, statistics)


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.0, 0.3, 0.5, 1.0])
def test_remix_equals_a_loop_with_its_gradient_and_its_bank(mix: float) -> None:
    layer, switch = layer_of(mix)
    x = torch.randn(4, 5, 6, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    again = x.detach().clone().requires_grad_()
    mean, var = layer.bank.mean[1].clone(), layer.bank.var[1].clone()
    with switch.on(Remix(1)):
        y = layer(x)
    expected = slow_remix(layer, again, mix)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    slope = torch.randn_like(y)
    (y * slope).sum().backward()
    (expected * slope).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-3, atol=1e-5)
    for c in range(5):  # Eq. (R2)
        values = x.detach()[:, c].flatten()
        assert float(layer.bank.mean[1, c]) == pytest.approx(float(0.9 * mean[c] + 0.1 * values.mean()), abs=1e-5)
        assert float(layer.bank.var[1, c]) == pytest.approx(float(0.9 * var[c] + 0.1 * values.var()), abs=1e-5)
    assert not layer.bank.mean.requires_grad


@pytest.mark.parametrize("donor", [0, 2])
def test_emulation_equals_a_loop_with_its_gradient_and_writes_nothing(donor: int) -> None:
    layer, switch = layer_of()
    x = torch.randn(4, 5, 6, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    again = x.detach().clone().requires_grad_()
    before = copy.deepcopy(layer.bank.state_dict())
    with switch.on(Emulation(donor)):
        y = layer(x)
    expected = slow_emulation(layer, again, donor)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    slope = torch.randn_like(y)
    (y * slope).sum().backward()
    found = layer.blends[donor].grad.clone()
    layer.blends[donor].grad = None
    (expected * slope).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found, layer.blends[donor].grad, rtol=1e-3, atol=1e-4)
    assert [k for k, blend in enumerate(layer.blends) if blend.grad is not None] == [donor]
    assert layer.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in layer.bank.state_dict().items())


def test_mix_one_is_instance_and_mix_zero_is_batch_normalisation() -> None:
    """With unbiased variances: u = n/(n-1) of the biased one, so the plain layer's eps and scale shrink by u."""
    x = torch.randn(4, 5, 6, 3)
    for mix, count, plain in ((1.0, 18, F.instance_norm), (0.0, 72, F.batch_norm)):
        layer, switch = layer_of(mix)
        with switch.on(Remix(0)):
            y = layer(x)
        u = count / (count - 1)
        arguments: dict[str, Any] = {"training": True} if plain is F.batch_norm else {}
        state = (None, None) if plain is F.batch_norm else ()
        normalised = plain(x, *state, **arguments, eps=EPS / u) / u**0.5
        expected = normalised * layer.weight[:, None, None] + layer.bias[:, None, None]
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_emulation_by_the_image_alone_or_the_donor_alone() -> None:
    layer, switch = layer_of()
    x = torch.randn(4, 5, 6, 3)

    def emulated(donor: int, logits: list[float]) -> Tensor:
        with torch.no_grad():
            layer.blends[donor].copy_(torch.tensor([logits, logits]))
        with switch.on(Emulation(donor)):
            y: Tensor = layer(x)
        return y.detach()

    alone = [emulated(donor, [100.0, -100.0]) for donor in range(3)]
    u = 18 / 17
    torch.testing.assert_close(alone[0], F.instance_norm(x, eps=EPS / u) / u**0.5, rtol=1e-4, atol=1e-5)
    assert torch.equal(alone[0], alone[1])
    assert torch.equal(alone[0], alone[2])
    for donor in range(3):
        expected = F.batch_norm(x, layer.bank.mean[donor], layer.bank.var[donor], eps=EPS)
        torch.testing.assert_close(emulated(donor, [-100.0, 100.0]), expected, rtol=1e-4, atol=1e-5)


def test_remix_on_an_unseen_domain_takes_the_mean_row_and_each_image_alone() -> None:
    layer, switch = layer_of()
    layer.eval()
    x = torch.randn(4, 5, 6, 3)
    bank = layer.bank

    def statistics(n: int, c: int) -> tuple[Tensor, Tensor]:
        return (x[n, c].mean() + bank.mean[:, c].mean()) / 2, (x[n, c].var() + bank.var[:, c].mean()) / 2

    expected = slowly(x, statistics) * layer.weight[:, None, None] + layer.bias[:, None, None]
    with switch.on(MeanRemix()):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x[2:3]), expected[2:3], rtol=1e-4, atol=1e-5)


def test_a_map_of_one_pixel_is_refused() -> None:
    layer, switch = layer_of()
    with switch.on(MeanRemix()), pytest.raises(UsageError, match="image_height, image_width"):
        layer(torch.randn(2, 5, 1, 1))


def test_statistics_held_holds_the_bank() -> None:
    layer, switch = layer_of()
    before = copy.deepcopy(layer.bank.state_dict())
    with switch.on(Remix(1)), statistics_held(layer):
        layer(torch.randn(4, 5, 6, 3))
    assert all(torch.equal(value, before[key]) for key, value in layer.bank.state_dict().items())


def test_banks_copy_their_first_batch_or_begin_at_zero() -> None:
    for start, share in (("copy", 1.0), ("zeros", 0.1)):
        method = renorm(renorm_bank_init=start)
        inputs: list[Tensor] = []
        site = method.backbone.get_submodule("layer1.0.bn1")
        site.register_forward_pre_hook(lambda module, found, seen=inputs: seen.append(found[0]))
        method.training_losses(batch_of(2), 0)
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        bank = dict(method.banks())["layer1.0.bn1"]
        torch.testing.assert_close(bank.mean[2], share * mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bank.var[2], share * var, rtol=1e-4, atol=1e-6)
        assert float(bank.var[0].sum()) == (24.0 if start == "copy" else 0.0)


# --- the network and its step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [Remix(1), Emulation(2)])
def test_every_site_but_the_stem_equals_the_loop(route: Route) -> None:
    method = warmed(renorm())
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    sites = {name: m for name, m in method.backbone.named_modules() if isinstance(m, ReNorm2d)}
    assert len(sites) == 11
    assert isinstance(method.backbone.bn1, torch.nn.BatchNorm2d)
    for name, site in sites.items():
        site.register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (inputs[0].clone(), output.clone())})
        )
    with torch.no_grad(), method.switch.on(route):
        method.backbone(batch_of(1, 7).images[:4])
    assert seen.keys() == sites.keys()
    for name, (x, y) in seen.items():
        layer = sites[name]
        slow = slow_remix(layer, x, 0.5) if isinstance(route, Remix) else slow_emulation(layer, x, 2)
        torch.testing.assert_close(y, slow.detach(), rtol=1e-3, atol=1e-4, msg=name)


def test_step_equals_the_equations() -> None:
    """Eq. (R4) assembled by hand from a copy."""
    method = warmed(renorm(triplet_weight=0.8, renorm_margin_second=1.3))
    reference = copy.deepcopy(method)
    data, step = batch_of(1, seed=9), 5
    losses = method.training_losses(data, step)
    expected = torch.zeros(())
    donor = [0, 2][step % 2]
    for route, head, margin in ((Remix(1), reference.head_rn, 0.5), (Emulation(donor), reference.head_en, 1.3)):
        with reference.switch.on(route):
            features = gem(reference.backbone(data.images), 3.0)
        expected = expected + identity_loss(head(features, 1), data.labels, 0.1)
        expected = expected + 0.8 * batch_hard_triplet_loss(features, data.labels, margin)
    torch.testing.assert_close(losses["loss/total"], expected)
    losses["loss/total"].backward()
    expected.backward()
    for (name, one), (_, other) in zip(method.named_parameters(), reference.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_step_writes_row_k_once_and_counts_the_stem_once() -> None:
    method = warmed(renorm())
    rows = {name: copy.deepcopy(bank.state_dict()) for name, bank in method.banks()}
    counted = int(method.backbone.bn1.num_batches_tracked)
    stem = method.backbone.bn1.running_mean.clone()
    data = batch_of(2, seed=5)
    losses = method.training_losses(data, 3)
    losses["loss/total"].backward()
    assert "loss/id_en" in losses
    for name, bank in method.banks():
        assert torch.equal(bank.mean[:2], rows[name]["mean"][:2]), name
        assert torch.equal(bank.var[:2], rows[name]["var"][:2]), name
        assert not torch.equal(bank.mean[2], rows[name]["mean"][2]), name
        assert bank.counts == [1, 1, 2]
    assert int(method.backbone.bn1.num_batches_tracked) == counted + 1
    once = 0.9 * stem + 0.1 * method.backbone.conv1(data.images).mean((0, 2, 3)).detach()
    torch.testing.assert_close(method.backbone.bn1.running_mean, once)


@pytest.mark.parametrize("affine", ["frozen", "trained"])
def test_gamma_and_beta_stay_or_are_trained(affine: str) -> None:
    method = renorm(renorm_affine=affine)
    groups = method.parameter_groups()
    listed = {id(p) for group in groups.values() for p in group.parameters}
    norms = [m for m in method.backbone.modules() if isinstance(m, ReNorm2d)]
    affines = [p for norm in norms for p in (norm.weight, norm.bias)]
    assert {id(p) in listed for p in affines} == {affine == "trained"}
    optimizer = torch.optim.Adam(groups["main"].parameters, lr=0.01, weight_decay=0.1)
    before = [p.detach().clone() for p in affines]
    blends = [p.detach().clone() for p in norms[0].blends]
    for step in range(10):
        loss = method.training_losses(batch_of(step % 3, step), step)["loss/total"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(affines, before, strict=True)] == [affine == "frozen"] * len(affines)
    assert not any(torch.equal(p, b) for p, b in zip(norms[0].blends, blends, strict=True))
    assert all(neck.bias.abs().sum() > 0 for neck in method.head_rn.necks), "the necks' shift learns"


def test_foreign_heads_and_blends_keep_weights_and_moments() -> None:
    method = warmed(renorm())
    parameters = method.parameter_groups()["main"].parameters
    optimizer = torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1)
    names = {id(p): name for name, p in method.named_parameters()}
    for step in range(6):
        optimizer.zero_grad(set_to_none=True)
        method.training_losses(batch_of(step % 3, step), step)["loss/total"].backward()
        optimizer.step()
    before = {names[id(p)]: [p.detach().clone(), *map(torch.clone, optimizer.state[p].values())] for p in parameters}
    optimizer.zero_grad(set_to_none=True)
    method.training_losses(batch_of(0, 8), 7)["loss/total"].backward()  # domain 0, donor others[7 % 2] = 2
    optimizer.step()
    still = {
        names[id(p)]
        for p in parameters
        if all(map(torch.equal, [p, *optimizer.state[p].values()], before[names[id(p)]]))
    }
    foreign = {
        name
        for name in before
        if (name.startswith("head_") and name.split(".")[2] != "0") or (".blends." in name and name[-1] != "2")
    }
    assert still == foreign


def test_second_pass_waits_for_its_donor_unless_banks_begin_at_zero() -> None:
    for start in ("copy", "zeros"):
        method = renorm(renorm_bank_init=start)
        assert ("loss/id_en" in method.training_losses(batch_of(0), 0)) == (start == "zeros")
        assert ("loss/id_en" in method.training_losses(batch_of(1), 1)) == (start == "zeros")  # donor 2
        assert "loss/id_en" in method.training_losses(batch_of(1), 2)  # donor 0


@pytest.mark.parametrize("rule", ["round_robin", "uniform"])
def test_donors(rule: Any) -> None:
    for domain in range(3):
        drawn = [draw_donor(rule, domain, 3, 1, step) for step in range(200)]
        assert set(drawn) == {0, 1, 2} - {domain}
        assert 70 < drawn.count(drawn[0]) < 130
    for step in range(10):  # two sources: always the other
        assert [draw_donor(rule, domain, 2, 1, step) for domain in (0, 1)] == [1, 0]
    with pytest.raises(ValueError, match="two or more domains"):
        draw_donor(rule, 0, 1, 1, 0)


# --- inference -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fused_is_the_sum_of_the_other_two() -> None:
    method = warmed(renorm()).eval()
    images = batch_of(0).images
    features = {}
    for inference in ("fused", "expert", "aligned"):
        other = renorm(inference=inference)
        other.load_state_dict(method.state_dict())
        features[inference] = other.eval()(images)
        assert other.inference == inference
        assert other.cost.test_forwards == {"fused": 4, "expert": 1, "aligned": 3}[inference]
    with method.switch.on(MeanRemix()):
        expert = F.normalize(gem(method.backbone(images), 3.0))
    aligned = torch.zeros_like(expert)
    for donor in range(3):
        with method.switch.on(Emulation(donor)):
            aligned += F.normalize(gem(method.backbone(images), 3.0)) / 3
    torch.testing.assert_close(features["expert"], expert)
    torch.testing.assert_close(features["aligned"], aligned)
    torch.testing.assert_close(features["fused"], expert + aligned)
    norms = features["fused"].norm(dim=1)
    assert ((norms >= 0) & (norms <= 2 + 1e-5)).all()


@torch.no_grad()
def test_evaluation_writes_nothing() -> None:
    method = warmed(renorm()).eval()
    before = copy.deepcopy(method.state_dict())
    method(batch_of(0).images)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_what_it_adds_and_keeps() -> None:
    method = warmed(renorm())
    blends = [p for name, p in method.backbone.named_parameters() if "blends" in name]
    assert sum(p.numel() for p in blends) == 11 * 3 * 4
    kept = method.kept(["a", "b", "c"])["buffer_bank"]
    assert kept.arrays["layers"].tolist() == [name for name, _ in method.banks()]
    assert "bn1" not in kept.arrays["layers"].tolist()
    assert kept.arrays["mean/layer4.0.bn2"].shape == (3, 192)


def test_one_source_is_refused() -> None:
    with pytest.raises(UsageError, match="2 or more source domains"):
        renorm((5,))
