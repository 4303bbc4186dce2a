"""The Buffer Bank layer against slow loops, torch's own layers, and the identities that any reading must satisfy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lda.parts.anti_norm import (
    AntiNormalised,
    BufferBankNorm2d,
    Expert,
    InstanceNormalised,
    UnseenExpert,
    named_banks,
)
from lda.parts.bank import BufferBank
from lda.parts.given import Row
from lda.parts.routes import Switch, statistics_held

K, C, N, H, W = 3, 5, 4, 6, 7
EPS = 1e-5


@pytest.fixture
def layer() -> BufferBankNorm2d:
    """A layer whose bank and affine hold arbitrary values."""
    generator = torch.Generator().manual_seed(0)
    made = BufferBankNorm2d(BufferBank(K, C, momentum=0.9), Switch())
    made.bank.mean.copy_(torch.randn(K, C, generator=generator))
    made.bank.var.copy_(torch.rand(K, C, generator=generator) + 0.5)
    made.bank.counts = [1] * K
    with torch.no_grad():
        made.weight.copy_(torch.randn(C, generator=generator))
        made.bias.copy_(torch.randn(C, generator=generator))
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, C, H, W, generator=torch.Generator().manual_seed(1)) * 3 + 1


def run(layer: BufferBankNorm2d, route: object, x: Tensor) -> Tensor:
    with layer.switch.on(route):
        return layer(x)


def slow_normalise(x: Tensor, mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Element by element: scale * (x - mean) / sqrt(var + eps) + shift."""
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[n, c] = scale[c] * (x[n, c] - mean[n, c]) / (var[n, c] + EPS) ** 0.5 + shift[c]
    return out


def test_expert_training_equals_loop_and_writes_its_row(layer: BufferBankNorm2d, x: Tensor) -> None:
    before = copy.deepcopy(layer.bank)
    mean = torch.stack([x[:, c].mean() for c in range(C)])
    biased = torch.stack([((x[:, c] - mean[c]) ** 2).mean() for c in range(C)])
    y = run(layer, Expert(1), x)
    expected = slow_normalise(x, mean.expand(N, C), biased.expand(N, C), layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(y, expected)
    unbiased = biased * (N * H * W) / (N * H * W - 1)
    torch.testing.assert_close(layer.bank.mean[1], 0.9 * before.mean[1] + 0.1 * mean)
    torch.testing.assert_close(layer.bank.var[1], 0.9 * before.var[1] + 0.1 * unbiased)
    assert layer.bank.counts == [1, 2, 1]
    for row in (0, 2):
        assert torch.equal(layer.bank.mean[row], before.mean[row])
        assert torch.equal(layer.bank.var[row], before.var[row])


def test_first_update_copies(x: Tensor) -> None:
    layer = BufferBankNorm2d(BufferBank(K, C, momentum=0.99), Switch())
    run(layer, Expert(2), x)
    torch.testing.assert_close(layer.bank.mean[2], x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.bank.var[2], x.var((0, 2, 3)))
    assert layer.bank.seen() == [2]


@pytest.mark.parametrize("route", [AntiNormalised(Row(0)), InstanceNormalised(), UnseenExpert()])
@pytest.mark.parametrize("training", [True, False])
def test_only_expert_in_training_writes(layer: BufferBankNorm2d, x: Tensor, route: object, training: bool) -> None:
    before = copy.deepcopy(layer.state_dict())
    layer.train(training)
    run(layer, route, x)
    layer.eval()
    run(layer, Expert(0), x)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_an_equals_loop(layer: BufferBankNorm2d, x: Tensor) -> None:
    mean, var = x.mean((2, 3)), x.var((2, 3), correction=0)
    sigma = (layer.bank.var[2] + EPS).sqrt()
    expected = slow_normalise(x, mean, var, sigma, layer.bank.mean[2])
    torch.testing.assert_close(run(layer, AntiNormalised(Row(2)), x), expected)


def test_an_gives_every_image_the_donors_statistics(layer: BufferBankNorm2d, x: Tensor) -> None:
    y = run(layer, AntiNormalised(Row(0)), x)
    torch.testing.assert_close(y.mean((2, 3)), layer.bank.mean[0].expand(N, C), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.var((2, 3), correction=0), layer.bank.var[0].expand(N, C), rtol=1e-3, atol=1e-4)


def test_bn_j_after_an_j_is_instance_norm(layer: BufferBankNorm2d, x: Tensor) -> None:
    """The bank cancels, so AN must replace a normalisation and never precede one with the same row."""
    layer.eval()
    y = run(layer, AntiNormalised(Row(1)), x)
    back = nn.functional.batch_norm(y, layer.bank.mean[1], layer.bank.var[1], eps=EPS)
    torch.testing.assert_close(back, nn.functional.instance_norm(x, eps=EPS), rtol=1e-4, atol=1e-5)


def test_an_shared_affine(layer: BufferBankNorm2d, x: Tensor) -> None:
    plain = run(layer, AntiNormalised(Row(1)), x)
    layer.affine = "shared"
    affine = run(layer, AntiNormalised(Row(1)), x)
    shape = (1, C, 1, 1)
    torch.testing.assert_close(affine, layer.weight.view(shape) * plain + layer.bias.view(shape), rtol=1e-4, atol=1e-4)


def test_mean_expert_uses_average_rows(layer: BufferBankNorm2d, x: Tensor) -> None:
    layer.eval()
    mean, var = sum(layer.bank.mean) / K, sum(layer.bank.var) / K
    expected = slow_normalise(x, mean.expand(N, C), var.expand(N, C), layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(run(layer, UnseenExpert(), x), expected)


def test_one_domain_is_batch_norm(x: Tensor) -> None:
    """Outputs, gradients and statistics over several steps, then evaluation."""
    ours, theirs = BufferBankNorm2d(BufferBank(1, C, momentum=0.9), Switch()), nn.BatchNorm2d(C, momentum=0.1)
    ours.bank.counts = [1]  # torch starts from mean 0 and variance 1, a bank from its first batch
    for step in range(3):
        a, b = x.clone().add(step).requires_grad_(), x.clone().add(step).requires_grad_()
        left, right = run(ours, Expert(0), a), theirs(b)
        torch.testing.assert_close(left, right)
        left.square().sum().backward()
        right.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bank.mean[0], theirs.running_mean)
    torch.testing.assert_close(ours.bank.var[0], theirs.running_var)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(run(ours, UnseenExpert(), x), theirs(x))
    torch.testing.assert_close(run(ours, Expert(0), x), theirs(x))


def test_no_gradient_reaches_the_bank(layer: BufferBankNorm2d, x: Tensor) -> None:
    x.requires_grad_()
    (run(layer, Expert(0), x) + run(layer, AntiNormalised(Row(1)), x)).sum().backward()
    assert not layer.bank.mean.requires_grad
    assert layer.bank.mean.grad is None
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("route", [Expert(0), AntiNormalised(Row(1)), InstanceNormalised()])
def test_constant_channel_gives_finite_gradients(layer: BufferBankNorm2d, x: Tensor, route: object) -> None:
    x[:, 2] = 1.5
    x.requires_grad_()
    (run(layer, route, x) ** 2).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("route", [Expert(0), AntiNormalised(Row(1)), UnseenExpert()])
def test_autocast_keeps_statistics_in_fp32(layer: BufferBankNorm2d, x: Tensor, route: object) -> None:
    exact = run(copy.deepcopy(layer), route, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(layer, route, x.bfloat16())
    assert layer.bank.mean.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_state_dict_carries_bank_and_counts(layer: BufferBankNorm2d, x: Tensor, tmp_path) -> None:
    run(layer, Expert(1), x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = BufferBankNorm2d(BufferBank(K, C, momentum=0.9), Switch())
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert other.bank.counts == [1, 2, 1]
    assert torch.equal(other.bank.mean, layer.bank.mean)
    assert torch.equal(other.bank.var, layer.bank.var)


def test_route_is_required_and_restored(layer: BufferBankNorm2d, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="needs a route"):
        layer(x)
    with pytest.raises(ZeroDivisionError), layer.switch.on(UnseenExpert()):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="needs a route"):
        layer(x)


def test_named_banks_in_network_order() -> None:
    switch = Switch()
    network = nn.Sequential(BufferBankNorm2d(BufferBank(K, 2, 0.9), switch), nn.ReLU())
    network.append(BufferBankNorm2d(BufferBank(K, 4, 0.9), switch))
    assert [(name, bank.mean.shape[1]) for name, bank in named_banks(network)] == [("0", 2), ("2", 4)]


def test_held_statistics_normalise_as_ever_and_write_nothing(layer: BufferBankNorm2d, x: Tensor) -> None:
    recorded = run(copy.deepcopy(layer), Expert(1), x)
    before = copy.deepcopy(layer.state_dict())
    with statistics_held(layer):
        held = run(layer, Expert(1), x)
    assert torch.equal(held, recorded)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    run(layer, Expert(1), x)
    assert layer.bank.counts == [1, 2, 1]
