"""MLDG's step against deep copies of the network, its gradient against finite differences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lda import methods
from lda.batch import Batch
from lda.config import preset
from lda.errors import UsageError
from lda.methods.mldg import MLDG
from lda.parts.episodes import draw_held_out, split_by_domain
from lda.parts.heads import gem
from lda.parts.losses import batch_hard_triplet_loss, identity_loss

NUM_IDS = (5, 7, 6)
OFFSETS = torch.tensor([0, 5, 12])


def method_of(seed: int = 0, **changes: Any) -> MLDG:
    config = preset("standin", method="mldg", warmup_epochs=0, seed=seed, **changes)
    method = methods.build(config.method, config.setup(NUM_IDS))
    assert isinstance(method, MLDG)
    return method


def batch_of(ids: tuple[int, ...] = (2, 2, 2), seed: int = 0) -> Batch:
    """Two images of `ids[k]` identities of every domain k."""
    labels = torch.cat([torch.arange(n).repeat_interleave(2) for n in ids])
    domains = torch.cat([torch.full((2 * n,), k) for k, n in enumerate(ids)])
    images = torch.randn(len(labels), 3, 32, 16, generator=torch.Generator().manual_seed(seed))
    return Batch(images, labels, domains)


def loss_of(method: MLDG, batch: Batch) -> Tensor:
    """L of a batch by the method's own weights, written again."""
    features = gem(method.backbone(batch.images), 3.0)
    labels = batch.labels + OFFSETS[batch.domains]
    identity = identity_loss(method.head(features, 0), labels, method.settings.label_smoothing)
    margin, weight = method.settings.triplet_margin, method.settings.triplet_weight
    return identity + weight * batch_hard_triplet_loss(features, labels, margin, part=True)


def gradients(method: MLDG) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def parts_of(method: MLDG, batch: Batch, step: int) -> tuple[Batch, Batch]:
    return split_by_domain(batch, draw_held_out(batch.domains, method.setup.seed, step))


@pytest.mark.parametrize("inner", ["sgd", "adam_first"])
@pytest.mark.parametrize("rate", [0.05, 3.0])
def test_step_equals_deep_copies(inner: str, rate: float) -> None:
    """Value, gradient and running statistics of one step, at rates of 1e-4 and 6e-3."""
    method = method_of(mldg_inner=inner, mldg_inner_rate=rate, mldg_beta=0.7, learning_rate=2e-3, triplet_weight=0.6)
    here, there, running = copy.deepcopy(method), copy.deepcopy(method), copy.deepcopy(method)
    batch, step = batch_of(), 4
    others, held_out = parts_of(method, batch, step)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    losses = method.training_losses(batch, step)
    assert all(torch.equal(p, before[name]) for name, p in method.named_parameters()), "the step is virtual"
    losses["loss/total"].backward()

    l_tr = loss_of(here, others)
    l_tr.backward()
    kind = {"sgd": torch.optim.SGD, "adam_first": torch.optim.Adam}[inner]
    optimizer = kind(there.parameters(), lr=2e-3 * rate)
    loss_of(there, others).backward()
    optimizer.step()
    there.zero_grad()
    l_te = loss_of(there, held_out)
    l_te.backward()
    assert losses["loss/total"].item() == pytest.approx((l_tr + 0.7 * l_te).item(), rel=1e-5)
    of_here, of_there = gradients(here), gradients(there)
    for name, found in gradients(method).items():
        expected = of_here[name] + 0.7 * of_there[name]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()), msg=name)

    loss_of(running, others)  # each part enters the running statistics once, in this order
    stepped = {name: p for name, p in there.named_parameters()}
    with torch.no_grad():
        for name, p in running.named_parameters():
            p.copy_(stepped[name])
    loss_of(running, held_out)
    for (key, found), (_, expected) in zip(method.named_buffers(), running.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=key)
    assert int(method.backbone.bn1.num_batches_tracked) == 2


def test_inner_rate_zero_is_the_plain_gradient_of_both_losses() -> None:
    method = method_of(mldg_inner_rate=0.0, mldg_beta=0.5)
    plain = copy.deepcopy(method)
    batch = batch_of(seed=2)
    others, held_out = parts_of(method, batch, 0)
    total = method.training_losses(batch, 0)["loss/total"]
    total.backward()
    expected = loss_of(plain, others) + 0.5 * loss_of(plain, held_out)
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    of_plain = gradients(plain)
    assert set(gradients(method)) == set(of_plain)
    for name, found in gradients(method).items():
        torch.testing.assert_close(found, of_plain[name], rtol=1e-4, atol=1e-5 * float(found.abs().max()), msg=name)


def test_gradient_equals_finite_differences_with_a_constant_inner_step() -> None:
    """d/dt of L_tr(theta + t d) + beta L_te(theta + t d - alpha g), g held: first order, along the gradient."""
    method = method_of(mldg_inner_rate=1.0, mldg_beta=0.9, learning_rate=5e-3)
    batch = batch_of(seed=3)
    others, held_out = parts_of(method, batch, 0)
    here = copy.deepcopy(method)
    loss_of(here, others).backward()
    inner = gradients(here)
    method.training_losses(batch, 0)["loss/total"].backward()
    direction = gradients(method)
    norm = torch.stack([g.square().sum() for g in direction.values()]).sum().sqrt()

    def at(t: float) -> float:
        def loss(part: Batch, rate: float) -> Tensor:
            moved = copy.deepcopy(method)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    if name in direction:
                        p.add_(direction[name] / norm, alpha=t).sub_(inner[name], alpha=rate)
                return loss_of(moved, part)

        return float(loss(others, 0.0) + 0.9 * loss(held_out, 5e-3))

    width = 1e-3
    assert (at(width) - at(-width)) / (2 * width) == pytest.approx(float(norm), rel=0.01)


def test_every_weight_that_the_plain_loss_reaches_is_reached() -> None:
    method = method_of()
    method.training_losses(batch_of(), 0)["loss/total"].backward()
    missing = {name for name, p in method.named_parameters() if p.grad is None}
    assert missing == {"head.necks.0.bias"}


@pytest.mark.parametrize("ids", [(2, 1, 1), (1, 1, 1)])
def test_a_part_of_one_identity_has_no_triplets(ids: tuple[int, ...]) -> None:
    method, batch = method_of(), batch_of(ids)
    found = set()
    for step in range(8):
        held_out = draw_held_out(batch.domains, 0, step)[0]
        losses = method.training_losses(batch, step)
        losses["loss/total"].backward()
        found.add(held_out)
        if ids[held_out] == 1:
            assert losses["loss/triplet_held_out"].item() == 0.0
        assert all(g.isfinite().all() for g in gradients(method).values())
    assert found == {0, 1, 2}


def test_the_inner_rate_follows_the_schedule() -> None:
    """A milestone divides it by ten: the held-out loss is that of a step a tenth as long."""
    batch = batch_of(seed=5)
    late = method_of(milestones=(1,), steps_per_epoch=10, mldg_inner_rate=10.0).training_losses(batch, 12)
    same = method_of(milestones=(), steps_per_epoch=10, mldg_inner_rate=1.0).training_losses(batch, 12)
    other = method_of(milestones=(), steps_per_epoch=10, mldg_inner_rate=10.0).training_losses(batch, 12)
    assert late["loss/id_held_out"].item() == pytest.approx(same["loss/id_held_out"].item(), rel=1e-6)
    assert late["loss/id_held_out"].item() != pytest.approx(other["loss/id_held_out"].item(), rel=1e-4)


def test_recomputation_and_one_source_are_refused() -> None:
    with pytest.raises(UsageError, match="activation_checkpointing: MLDG"):
        method_of(activation_checkpointing=True)
    config = preset("standin", method="mldg")
    with pytest.raises(UsageError, match="2 or more source domains"):
        methods.build(config.method, config.setup([5]))
