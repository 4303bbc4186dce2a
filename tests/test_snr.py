"""SNR: its maps and gates by hand, its loss against loops and in its two forms, its place in the network."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import build, gradients, mixed_batch, shaken
from torch import Tensor, nn

from lda.errors import UsageError
from lda.methods.snr import SNR, Distance, Pool, Pooled, Restitution, hardest, restitution_loss
from lda.parts.routes import Switch

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def snr(**changes: Any) -> SNR:
    method = build("snr", **changes)
    assert isinstance(method, SNR)
    return method


def site(pool: Pool = "plain", channels: int = 6, reduction: int = 1) -> Restitution:
    torch.manual_seed(0)
    made = Restitution(channels, reduction, pool, Switch())
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 1.5)
        made.norm.bias.uniform_(-0.5, 0.5)
        made.squeeze.bias.uniform_(-0.2, 0.2)
        made.excite.bias.uniform_(-1, 1)
    return made.requires_grad_(False)


def a_map(images: int = 6, channels: int = 6, seed: int = 1) -> Tensor:
    """What a ReLU leaves, with a style of its own for every image."""
    random = torch.Generator().manual_seed(seed)
    scale, shift = (torch.rand(images, channels, 1, 1, generator=random) + 0.3 for _ in range(2))
    return F.relu(torch.randn(images, channels, 5, 3, generator=random) * scale + shift)


def forward(of: Restitution, x: Tensor) -> tuple[Tensor, Pooled]:
    seen: list[Pooled] = []
    with of.switch.on(seen):
        restored = of.train()(x)
    return restored, seen[0]


def gates(network: nn.Module, bias: float) -> None:
    """Gates at sigmoid(bias) for every image and channel."""
    for module in network.modules():
        if isinstance(module, Restitution):
            nn.init.zeros_(module.excite.weight)
            nn.init.constant_(module.excite.bias, bias)


# --- (S1) to (S5) ----------------------------------------------------------------------------------------------------


def test_a_site_equals_the_equations_one_value_at_a_time() -> None:
    of, x = site(), a_map()
    found = of.eval()(x)
    w1, b1, w2, b2 = (p.double() for layer in (of.squeeze, of.excite) for p in (layer.weight, layer.bias))
    gamma, beta = of.norm.weight.double(), of.norm.bias.double()
    for i, image in enumerate(x.double()):
        mean, var = image.mean((1, 2)), image.var((1, 2), correction=0)
        normalised = (image - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        normalised = gamma[:, None, None] * normalised + beta[:, None, None]
        lost = image - normalised
        hidden = [max(0.0, float(w1[h] @ lost.mean((1, 2)) + b1[h])) for h in range(len(b1))]
        for c in range(len(gamma)):
            a = 1 / (1 + math.exp(-float(w2[c] @ torch.tensor(hidden, dtype=torch.float64) + b2[c])))
            torch.testing.assert_close(found[i, c].double(), normalised[c] + a * lost[c], rtol=1e-4, atol=1e-5)


def test_nothing_in_a_site_is_detached() -> None:
    """Gradients of F+ and of the pooled features against the equations in float64, by map and parameters."""
    of = site().requires_grad_(True)
    x = a_map().requires_grad_()
    weights = torch.rand(6, 6, 5, 3, generator=torch.Generator().manual_seed(9))
    restored, pooled = forward(of, x)
    of_pooled = (pooled.restored * weights[..., 0, 0]).sum() + 2 * (pooled.rest * weights[..., 1, 1]).sum()
    inputs = [x, *of.parameters()]
    found = torch.autograd.grad((restored * weights).sum() + of_pooled, inputs)

    leaves = {name: p.detach().double().requires_grad_() for name, p in of.named_parameters()}
    y = x.detach().double().requires_grad_()
    var, mean = torch.var_mean(y, (2, 3), correction=0, keepdim=True)
    gamma, beta = (leaves[f"norm.{name}"][:, None, None] for name in ("weight", "bias"))
    normalised = gamma * (y - mean) / (var + 1e-5).sqrt() + beta
    hidden = F.relu(F.linear((y - normalised).mean((2, 3)), leaves["squeeze.weight"], leaves["squeeze.bias"]))
    a = F.linear(hidden, leaves["excite.weight"], leaves["excite.bias"]).sigmoid()[:, :, None, None]
    plus, minus = normalised + a * (y - normalised), normalised + (1 - a) * (y - normalised)
    total = (plus * weights).sum() + (plus.mean((2, 3)) * weights[..., 0, 0]).sum()
    total = total + 2 * (minus.mean((2, 3)) * weights[..., 1, 1]).sum()
    expected = torch.autograd.grad(total, [y, *leaves.values()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_both_branches_add_up_to_map_and_normalised_map() -> None:
    of, x = site(), a_map()
    parts = of.parts(x)
    a = parts.gate[:, :, None, None]
    restored, _ = forward(of, x)
    rest = parts.normalised + (1 - a) * parts.residual
    torch.testing.assert_close(restored + rest, x + parts.normalised)
    assert float(a.std()) > 0.1


def test_open_gates_give_the_map_back_and_closed_ones_the_normalised_map() -> None:
    of, x = site(), a_map()
    gates(of, 60.0)
    torch.testing.assert_close(of.eval()(x), x, rtol=1e-5, atol=1e-6)
    gates(of, -60.0)
    assert torch.equal(of(x), of.parts(x).normalised)


def test_style_of_an_image_is_gone_from_the_normalised_map() -> None:
    """Ft does not see F -> c F + d with c > 0 per image and channel, up to eps; R and F+ do."""
    of, x = site(), a_map()
    scale, shift = torch.rand(6, 6, 1, 1) + 1.0, torch.rand(6, 6, 1, 1)
    changed = scale * x + shift
    torch.testing.assert_close(of.parts(changed).normalised, of.parts(x).normalised, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(of.eval()(changed), of(x), atol=0.1)


@pytest.mark.parametrize("pool", ["plain", "relu"])
def test_what_is_pooled_equals_the_pooled_maps(pool: Pool) -> None:
    of, x = site(pool), a_map()
    restored, pooled = forward(of, x)
    parts = of.parts(x)
    rest = parts.normalised + (1 - parts.gate)[:, :, None, None] * parts.residual
    f, plus, minus = (
        (F.relu(maps) if pool == "relu" else maps).mean((2, 3)) for maps in (parts.normalised, restored, rest)
    )
    torch.testing.assert_close(pooled.restored, plus, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled.rest, minus, rtol=1e-4, atol=1e-5)
    if pool == "plain":
        assert pooled.normalised is None
        torch.testing.assert_close(f, of.norm.bias.expand(6, 6), rtol=1e-4, atol=1e-5)  # beta, whatever image
    else:
        torch.testing.assert_close(pooled.normalised, f)
        assert float(f.std(0).min()) > 1e-3


def test_a_site_is_computed_in_full_precision_inside_autocast() -> None:
    of, x = site().eval(), a_map().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = of(x)
    assert inside.dtype is torch.bfloat16
    assert torch.equal(inside, of(x.float()).bfloat16())


# --- (S6) ------------------------------------------------------------------------------------------------------------


def slow_distance(a: Tensor, b: Tensor, distance: Distance) -> float:
    if distance == "cosine":
        return 0.5 - float(a @ b) / (2 * float(a.norm()) * float(b.norm()))
    return math.sqrt(max(float((a - b).square().sum()), 1e-12))


def slow_loss(f: Tensor, plus: Tensor, minus: Tensor, labels: Tensor, distance: Distance) -> float:
    """(S6) by loops over anchors, positives and negatives."""

    def dp(z: Tensor, i: int) -> float:
        return max(slow_distance(z[i], z[j], distance) for j in range(len(z)) if labels[j] == labels[i])

    def dn(z: Tensor, i: int) -> float:
        return min(slow_distance(z[i], z[j], distance) for j in range(len(z)) if labels[j] != labels[i])

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    total = 0.0
    for i in range(len(f)):
        total += softplus(dp(plus, i) - dp(f, i)) + softplus(dp(f, i) - dp(minus, i))
        total += softplus(dn(f, i) - dn(plus, i)) + softplus(dn(minus, i) - dn(f, i))
    return total / len(f)


def three_features(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    f, plus, minus = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(seed))
    return f, plus, minus


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_loops(distance: Distance, seed: int) -> None:
    f, plus, minus = three_features(seed)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    found = restitution_loss(Pooled(plus, minus, f), labels, distance)
    expected = slow_loss(*(z.double() for z in (f, plus, minus)), labels, distance)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_plain_pooling_is_the_four_term_form_without_the_normalised_feature() -> None:
    """(S8) = (S6) with f = beta for all images; softplus is the soft margin loss of the release."""
    of, x = site(), a_map()
    _, pooled = forward(of, x)
    beta = of.norm.bias.expand(6, 6)
    found = float(restitution_loss(pooled, LABELS, "euclidean"))
    with_f = pooled._replace(normalised=beta)
    assert found == pytest.approx(float(restitution_loss(with_f, LABELS, "euclidean")), abs=1e-5)
    plus, minus = pooled.restored.detach().double(), pooled.rest.detach().double()
    assert found == pytest.approx(slow_loss(beta.double(), plus, minus, LABELS, "euclidean"), abs=1e-5)

    margin, one = nn.SoftMarginLoss(), torch.ones(6)
    dp_plus, dn_plus = hardest(pooled.restored, LABELS, "euclidean")
    dp_minus, dn_minus = hardest(pooled.rest, LABELS, "euclidean")
    four = margin(-dp_plus, one) + margin(dp_minus, one) + margin(dn_plus, one) + margin(-dn_minus, one)
    assert found == pytest.approx(float(four), rel=1e-6)


def test_relu_pooling_compares_with_the_normalised_feature() -> None:
    of, x = site("relu"), a_map()
    _, pooled = forward(of, x)
    assert pooled.normalised is not None
    found = float(restitution_loss(pooled, LABELS, "euclidean"))
    f, plus, minus = (z.detach().double() for z in (pooled.normalised, pooled.restored, pooled.rest))
    assert found == pytest.approx(slow_loss(f, plus, minus, LABELS, "euclidean"), rel=1e-5)
    without = float(restitution_loss(pooled._replace(normalised=None), LABELS, "euclidean"))
    assert found != pytest.approx(without, rel=1e-3)


@pytest.mark.parametrize("normalised", [True, False])
def test_descent_draws_restored_features_together_and_the_rest_apart(normalised: bool) -> None:
    """dp(f+) down, dn(f+) up, dp(f-) up, dn(f-) down, on a rectangle with an identity at each short side."""
    rectangle, labels = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 3.0]]), torch.tensor([0, 0, 1, 1])
    plus, minus = rectangle.clone().requires_grad_(), rectangle.clone().requires_grad_()
    loss = restitution_loss(Pooled(plus, minus, rectangle if normalised else None), labels, "euclidean")
    loss.backward()
    assert plus.grad is not None
    assert minus.grad is not None
    for z, closer in ((plus, True), (minus, False)):
        dp, dn = (d.mean() for d in hardest(z.detach(), labels, "euclidean"))
        dp_after, dn_after = (d.mean() for d in hardest(z.detach() - 0.05 * z.grad, labels, "euclidean"))
        assert bool(dp_after < dp) == closer
        assert bool(dn_after > dn) == closer


def test_loss_of_equal_features_has_a_finite_gradient() -> None:
    z = torch.ones(6, 5, requires_grad=True)
    loss = restitution_loss(Pooled(z, z, z), LABELS, "euclidean")
    loss.backward()
    assert loss.item() == pytest.approx(4 * math.log(2), rel=1e-5)
    assert z.grad is not None
    assert z.grad.isfinite().all()


# --- the network and the step ----------------------------------------------------------------------------------------


def test_with_open_gates_the_network_is_the_plain_baseline() -> None:
    method, baseline = snr(), build("baseline")
    gates(method, 60.0)
    data = mixed_batch()
    losses, expected = method.training_losses(data, 0), baseline.training_losses(data, 0)
    for key in ("loss/id", "loss/triplet"):
        torch.testing.assert_close(losses[key], expected[key], rtol=1e-3, atol=1e-4)
    images = mixed_batch(3).images
    with torch.no_grad():
        torch.testing.assert_close(method.eval()(images), baseline.eval()(images), rtol=1e-3, atol=1e-4)
        gates(method, 0.0)
        assert not torch.allclose(method(images), baseline(images), atol=1e-2), "the modules are there at test"


@pytest.mark.parametrize(("changes", "hidden"), [({}, (4, 4, 6, 12)), ({"snr_reduction": 4}, (6, 12, 24, 48))])
def test_parameters_added(changes: dict[str, Any], hidden: tuple[int, ...]) -> None:
    """2 C + 2 C H + H + C a site, H never below 4."""
    method = snr(**changes)
    added = sum(p.numel() for p in method.parameters()) - sum(p.numel() for p in build("baseline").parameters())
    widths = (24, 48, 96, 192)
    assert added == sum(2 * c + 2 * c * h + h + c for c, h in zip(widths, hidden, strict=True))


def test_a_site_begins_as_in_the_release() -> None:
    """gamma 1, beta 0, gates without shift, weights of fan-out size; the plain network's weights are kept."""
    method, baseline = snr(), build("baseline")
    for made in method.modules():
        if isinstance(made, Restitution):
            assert torch.equal(made.norm.weight, torch.ones_like(made.norm.weight))
            assert not any(bias.any() for bias in (made.norm.bias, made.squeeze.bias, made.excite.bias))
            for layer in (made.squeeze, made.excite):
                assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.out_features), rel=0.2)
    ours = method.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in baseline.state_dict().items())


def test_total_is_the_weighted_sum_and_every_site_has_its_weight() -> None:
    weights = {1: 0.3, 2: 0.7, 3: 1.1, 4: 2.0}
    method = snr(triplet_weight=0.6, **{f"snr_weight{stage}": weight for stage, weight in weights.items()})
    losses = method.training_losses(mixed_batch(), 0)
    expected = losses["loss/id"] + 0.6 * losses["loss/triplet"]
    expected = expected + sum(weight * losses[f"loss/snr{stage}"] for stage, weight in weights.items())
    torch.testing.assert_close(losses["loss/total"], expected)
    assert len({round(losses[f"loss/snr{stage}"].item(), 5) for stage in weights}) == 4


def test_step_of_a_site_is_that_of_its_map() -> None:
    """`loss/snr2` from the maps that enter the second site, joint labels included."""
    method, data = shaken(snr(snr_sites="1 2", snr_pool="relu")), mixed_batch()
    assert isinstance(method, SNR)
    entered: list[Tensor] = []
    other = copy.deepcopy(method)
    second = other.backbone.get_submodule("snr2")
    second.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0].detach()))
    losses = method.training_losses(data, 0)
    assert not any(key in losses for key in ("loss/snr3", "loss/snr4"))
    other.training_losses(data, 0)
    assert isinstance(second, Restitution)
    _, pooled = forward(second, entered[0])
    labels = torch.tensor([0, 1, 5, 8, 14, 16]).repeat_interleave(2)
    assert pooled.normalised is not None
    f, plus, minus = (z.detach().double() for z in (pooled.normalised, pooled.restored, pooled.rest))
    assert losses["loss/snr2"].item() == pytest.approx(slow_loss(f, plus, minus, labels, "euclidean"), rel=1e-4)


def test_without_weights_the_gates_still_learn_by_the_identity_loss() -> None:
    method = snr(**{f"snr_weight{stage}": 0.0 for stage in (1, 2, 3, 4)})
    losses = method.training_losses(mixed_batch(), 0)
    torch.testing.assert_close(losses["loss/total"], losses["loss/id"] + losses["loss/triplet"])
    losses["loss/total"].backward()
    found = {name: value for name, value in gradients(method).items() if "snr" in name}
    assert len(found) == 4 * 6
    for name, value in found.items():
        assert bool(value.any()), name


def test_a_site_does_the_same_in_training_and_evaluation_and_image_by_image() -> None:
    of, x = site(), a_map()
    training, _ = forward(of, x)
    assert torch.equal(of.eval()(x), training)
    torch.testing.assert_close(torch.cat([of(image[None]) for image in x]), training)


@pytest.mark.parametrize("sites", ["", "0 1", "2 1", "1 1", "5"])
def test_sites_are_rising_stages(sites: str) -> None:
    with pytest.raises(UsageError, match="snr_sites: expected rising stages"):
        snr(snr_sites=sites)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UsageError, match=r"snr_distance: cosine .*; set snr_pool=relu"):
        snr(snr_distance="cosine")
    snr(snr_distance="cosine", snr_pool="relu")
    with pytest.raises(RuntimeError, match="needs a route"):
        site().train()(a_map())
    with pytest.raises(UsageError, match="image_height, image_width"):
        site().eval()(a_map()[:, :, :1, :1])
