"""Held-out sources, virtual weights and inner steps against slow oracles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lda.batch import Batch
from lda.config import preset
from lda.errors import UsageError
from lda.parts.episodes import (
    draw_held_out,
    inner_gradient,
    inner_step,
    refuse_recomputation,
    split_by_domain,
    virtual_call,
)

DOMAINS = torch.tensor([2, 2, 0, 0, 1, 1, 4, 4])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


def test_split_keeps_order_and_loses_nothing() -> None:
    batch = Batch(torch.arange(8.0)[:, None, None, None], torch.arange(8), DOMAINS, -torch.arange(8.0))
    others, held_out = split_by_domain(batch, [2, 4])
    assert others.labels.tolist() == [2, 3, 4, 5]
    assert held_out.labels.tolist() == [0, 1, 6, 7]
    for part in (others, held_out):
        assert torch.equal(part.images.flatten().long(), part.labels)
        assert torch.equal(part.domains, DOMAINS[part.labels])
        assert torch.equal(part.second, -part.labels.float())
    assert split_by_domain(batch._replace(second=None), [0])[1].second is None


def test_held_out_is_a_function_of_seed_and_step_and_every_source_has_its_turn() -> None:
    drawn = [draw_held_out(DOMAINS, 3, step)[0] for step in range(400)]
    assert drawn == [draw_held_out(DOMAINS, 3, step)[0] for step in range(400)]
    assert drawn != [draw_held_out(DOMAINS, 4, step)[0] for step in range(400)]
    assert all(70 < drawn.count(domain) < 130 for domain in (0, 1, 2, 4))
    pairs = [tuple(draw_held_out(DOMAINS, 3, step, number=2)) for step in range(400)]
    assert len(set(pairs)) == 6
    assert all(a < b for a, b in pairs)
    for number in (0, 4):
        with pytest.raises(ValueError, match="hold out 1 to 3"):
            draw_held_out(DOMAINS, 3, 0, number)
    with pytest.raises(ValueError, match="hold out"):
        draw_held_out(torch.zeros(4), 3, 0)


def test_virtual_call_with_own_weights_is_the_plain_call_and_others_are_used() -> None:
    network, x = net(), torch.randn(5, 4, dtype=torch.double)
    own = dict(network.named_parameters())
    plain = network.head(copy.deepcopy(network).trunk(x))
    before = copy.deepcopy(network.state_dict())
    virtual = virtual_call(network, "head", own, virtual_call(network, "trunk", own, x))
    assert torch.equal(virtual, plain)
    assert not torch.equal(network.trunk[1].running_mean, before["trunk.1.running_mean"]), "a pass counts as any other"

    moved = {name: (p + 0.1).detach() for name, p in own.items()}
    oracle = copy.deepcopy(network)
    oracle.load_state_dict(moved, strict=False)
    found = virtual_call(network, "head", moved, virtual_call(network, "trunk", moved, x))
    assert torch.equal(found, oracle.head(oracle.trunk(x)))
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_inner_steps_are_those_of_fresh_optimisers() -> None:
    network, x = net(), torch.randn(5, 4, dtype=torch.double)
    theta = dict(network.named_parameters())
    gradient = inner_gradient(network.head(network.trunk(x)).square().sum(), theta)
    assert set(theta) - set(gradient) == {"unused.weight", "unused.bias"}
    assert not any(g.requires_grad for g in gradient.values())
    for rule, kind in (("sgd", torch.optim.SGD), ("adam_first", torch.optim.Adam)):
        oracle = copy.deepcopy(network)
        optimizer = kind(oracle.parameters(), lr=0.05)
        oracle.head(oracle.trunk(x)).square().sum().backward()
        optimizer.step()
        stepped = inner_step(theta, gradient, 0.05, rule)  # type: ignore[arg-type]
        for name, value in stepped.items():
            torch.testing.assert_close(value, oracle.get_parameter(name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_derivative_at_virtual_weights_is_of_first_order_or_exact_by_what_is_detached(rate: float) -> None:
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.double, requires_grad=True)

    def inner(t: Tensor) -> Tensor:
        return (t[0] * t[1]) ** 2 + t[1] * t[2] ** 3

    def outer(t: Tensor) -> Tensor:
        return t[0] ** 3 + torch.sin(t[1]) * t[2]

    hessian = torch.autograd.functional.hessian(inner, theta.detach())
    (graph,) = torch.autograd.grad(inner(theta), theta, create_graph=True)
    at = (theta - rate * graph).detach().requires_grad_()
    (plain,) = torch.autograd.grad(outer(at), at)

    first = inner_step({"t": theta}, {"t": graph.detach()}, rate)["t"]
    exact = inner_step({"t": theta}, {"t": graph}, rate)["t"]
    torch.testing.assert_close(torch.autograd.grad(outer(first), theta)[0], plain)
    expected = plain - rate * hessian @ plain
    torch.testing.assert_close(torch.autograd.grad(outer(exact), theta)[0], expected)


def test_recomputation_is_refused_by_name() -> None:
    setup = preset("standin", method="baseline").setup([5, 6])
    refuse_recomputation(setup, "MLDG")
    with pytest.raises(UsageError, match=r"activation_checkpointing: MLDG .* set activation_checkpointing=false"):
        refuse_recomputation(preset("standin", method="baseline", activation_checkpointing=True).setup([5, 6]), "MLDG")
