"""M3L's virtual step against Hessians, finite differences and deep copies; its memory and MetaBN against loops."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import build, shaken
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lda.batch import Batch
from lda.errors import UsageError
from lda.methods import m3l
from lda.methods.base import Losses, Method
from lda.methods.m3l import M3L, draws, mixed, moments, virtual_weights
from lda.parts.episodes import domain_parts, draw_held_out
from lda.parts.heads import gem
from lda.parts.identity_memory import IdentityMemory, unit
from lda.parts.losses import Gaussian, batch_hard_triplet_loss

NUM_IDS = (5, 7, 6)
RATE, DECAY = 3e-3, 2e-2  # large enough for the second derivatives to be seen


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed in fp32 "at least" is computed in fp64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def method_of(num_ids: tuple[int, ...] = NUM_IDS, **changes: Any) -> M3L:
    """With full memories of random rows, and a neck that is not at its start."""
    common = {"warmup_epochs": 0, "learning_rate": RATE, "weight_decay": DECAY}
    method = shaken(build("m3l", num_ids, **{**common, **changes}))
    assert isinstance(method, M3L)
    memory = method.memory
    memory.rows.copy_(unit(torch.randn(memory.rows.shape, generator=torch.Generator().manual_seed(5))))
    memory.seen.fill_(True)
    return method


def batch_of(ids: tuple[int, ...] = (2, 2, 2), seed: int = 0) -> Batch:
    """Two images of `ids[k]` identities of every domain k."""
    labels = torch.cat([torch.arange(n).repeat_interleave(2) for n in ids])
    domains = torch.cat([torch.full((2 * n,), k) for k, n in enumerate(ids)])
    images = torch.randn(len(labels), 3, 32, 16, generator=torch.Generator().manual_seed(seed))
    return Batch(images, labels, domains)


def in_double(method: M3L, batch: Batch) -> tuple[M3L, Batch]:
    return method.double(), batch._replace(images=batch.images.double())


def slopes(method: Method, loss: Tensor) -> dict[str, Tensor]:
    """Name -> derivative by every weight."""
    names = {name: p for name, p in method.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(names.items(), found, strict=True)}


def total_slopes(method: M3L, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    return slopes(method, method.training_losses(batch, step)["loss/total"])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    size = max(float(e.abs().max()) for e in expected.values())
    for name, f in found.items():
        torch.testing.assert_close(f, expected[name], rtol=tolerance, atol=tolerance * size, msg=name)


def norm(of: dict[str, Tensor]) -> float:
    return float(torch.stack([g.square().sum() for g in of.values()]).sum().sqrt())


# --- written again, by the method's own weights ---------------------------------------------------------------------


def memory_loss(method: M3L, vectors: Tensor, labels: Tensor, domain: int) -> Tensor:
    rows = method.memory.rows.split(list(method.setup.num_ids))[domain]
    return F.cross_entropy(vectors @ rows.T / method.settings.m3l_temperature, labels)


def loss_of(method: M3L, part: Batch, domain: int, mix: Callable[[Tensor], list[Tensor]] = lambda f: [f]) -> Tensor:
    """Mean of l(z, y; k) over the features that `mix` makes of f, and Tri(f, y)."""
    features = gem(method.backbone(part.images), 3.0)
    terms = [memory_loss(method, F.normalize(method.neck(f)), part.labels, domain) for f in mix(features)]
    triplet = batch_hard_triplet_loss(features, part.labels, method.settings.triplet_margin, part=True)
    return sum(terms) / len(terms) + method.settings.triplet_weight * triplet


def held_out_of(method: M3L, batch: Batch, step: int) -> int:
    return draw_held_out(batch.domains, method.setup.seed, step)[0]


def trained_loss(method: M3L, batch: Batch, step: int) -> Tensor:
    """L_tr."""
    parts, q = domain_parts(batch), held_out_of(method, batch, step)
    return torch.stack([loss_of(method, part, k) for k, part in parts.items() if k != q]).mean()


def mix_of(method: M3L, batch: Batch, step: int) -> Callable[[Tensor], list[Tensor]]:
    """Eq. (M5) in loops, by the moments under the method's weights."""
    parts, q = domain_parts(batch), held_out_of(method, batch, step)
    here = copy.deepcopy(method)
    with torch.no_grad():
        others = [gem(here.backbone(part.images), 3.0) for k, part in parts.items() if k != q]
    share, noise = draws(method.setup.seed, step, (len(others), len(parts[q].images), others[0].shape[1]))

    def mix(features: Tensor) -> list[Tensor]:
        made = []
        for f, e in zip(others, noise, strict=True):
            mean = f.mean(0)
            var = (f - mean).square().mean(0)
            sigma = var if method.settings.m3l_scale == "variance" else var.sqrt()
            made.append(share * (mean + sigma * e) + (1 - share) * features)
        return made

    return mix if method.settings.m3l_metabn == "on" else lambda f: [f]


def judged_loss(method: M3L, there: M3L, batch: Batch, step: int) -> Tensor:
    """L_te by the weights of `there`, with the moments by those of `method`."""
    q = held_out_of(method, batch, step)
    return loss_of(there, domain_parts(batch)[q], q, mix_of(method, batch, step))


def stepped(method: M3L, gradient: dict[str, Tensor], rate: float, decay: float) -> M3L:
    """A copy after the step of the release: Adam's moments, 1e-8 inside the root, then the bias correction."""
    there = copy.deepcopy(method)
    with torch.no_grad():
        for name, p in there.named_parameters():
            d = gradient[name] + decay * p
            first, second = (1 - 0.9) * d, (1 - 0.999) * d * d
            divisor = (second + 1e-8).sqrt() / (1 - 0.999) ** 0.5 + 1e-8
            p.sub_(rate / (1 - 0.9) * first / divisor)
    return there


# --- Eq. (M4), (M7): the meta-gradient ------------------------------------------------------------------------------


def test_inner_step_is_the_release_s_first_step_of_adam() -> None:
    theta = torch.linspace(-2, 2, 9, dtype=torch.float64)
    g = torch.tensor([-1e3, -1.0, -3e-3, -1e-5, 0.0, 1e-8, 1e-3, 0.5, 30.0], dtype=torch.float64)
    found = virtual_weights({"w": theta}, {"w": g}, 0.01, 5e-4, "exact")["w"]
    d = g + 5e-4 * theta
    first, second = 0.1 * d, 0.001 * d * d
    divisor = (second + 1e-8).sqrt() / 0.001**0.5 + 1e-8
    torch.testing.assert_close(found, theta - 0.01 / 0.1 * first / divisor, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("size", [1.0, 3e-3])
@pytest.mark.parametrize("meta", ["exact", "first", "release"])
def test_modes_against_hessians(meta: m3l.Meta, size: float) -> None:
    """Five weights, gradients of about 1 and of the step's floor: what each mode lets through of g_te."""
    mixing = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4], dtype=torch.float64)
    rate, decay = 0.05, 0.1

    def trained(w: Tensor) -> Tensor:
        return size * ((mixing @ w).sin().sum() + (w * w.roll(1)).sum())

    def tested(w: Tensor) -> Tensor:
        return (w.exp() * torch.arange(1.0, 6.0)).sum().log() + (w**3).sum()

    theta = start.clone().requires_grad_()
    g = torch.autograd.grad(trained(theta), theta, create_graph=meta != "first", retain_graph=True)[0]
    virtual = virtual_weights({"w": theta}, {"w": g}, rate, decay, meta)["w"]
    found = torch.autograd.grad(tested(virtual), theta, allow_unused=True)[0]

    hessian = torch.func.jacrev(torch.func.grad(trained))(start)
    one = torch.eye(5, dtype=torch.float64)
    d = torch.func.grad(trained)(start) + decay * start
    root = (d.square() + 1e-5).sqrt()
    slope = torch.diag(1 / (root + 1e-8) - d.square() / (root * (root + 1e-8) ** 2))  # D
    g_te = torch.func.grad(tested)(start - rate * d / (root + 1e-8))
    expected = {
        "exact": (one - rate * slope @ (hessian + decay * one)).T @ g_te,
        "first": g_te,
        "release": -(rate * slope @ hessian).T @ g_te,
    }[meta]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert meta == "first" or size == 1.0 or float((expected - g_te).norm()) > 1e-2


@pytest.mark.parametrize("metabn", ["on", "off"])
def test_exact_gradient_equals_finite_differences(metabn: str, double: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of theta -> L_tr(theta) + L_te(theta'(theta)), through the network; mu_j, sigma_j are constants."""
    method, batch = in_double(method_of(m3l_metabn=metabn), batch_of())
    held: list[Gaussian] = []
    monkeypatch.setattr(m3l, "moments", lambda f: held.append(moments(f)) or held[-1])
    exact = total_slopes(method, batch)
    constants = itertools.cycle(held)
    monkeypatch.setattr(m3l, "moments", lambda f: next(constants))
    object.__setattr__(method.settings, "m3l_meta", "first")
    first = total_slopes(method, batch)
    # Along what the second derivatives add: the first-order gradient has another slope there.
    direction = {name: exact[name] - first[name] for name in exact}
    length = norm(direction)

    def at(t: float) -> float:
        moved = copy.deepcopy(method)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.add_(direction[name], alpha=t / length)
        return float(moved.training_losses(batch, 0)["loss/total"].detach())

    def along(slope: dict[str, Tensor]) -> float:
        return float(sum((slope[name] * direction[name]).sum() for name in slope)) / length

    width = 2e-8
    measured = (at(width) - at(-width)) / (2 * width)
    assert along(exact) == pytest.approx(measured, rel=1e-4)
    assert along(first) != pytest.approx(measured, rel=1e-2)


def test_first_order_step_equals_deep_copies(double: None) -> None:
    method, batch = in_double(method_of(m3l_meta="first", triplet_weight=0.6), batch_of())
    here, step = copy.deepcopy(method), 4
    losses = method.training_losses(batch, step)
    l_tr = trained_loss(here, batch, step)
    g_tr = slopes(here, l_tr)
    there = stepped(here, g_tr, RATE, DECAY)
    l_te = judged_loss(here, there, batch, step)
    g_te = slopes(there, l_te)
    assert losses["loss/total"].item() == pytest.approx((l_tr + l_te).item(), rel=1e-10)
    held_out = losses["loss/memory_held_out"] + 0.6 * losses["loss/triplet_held_out"]
    assert held_out.item() == pytest.approx(l_te.item(), rel=1e-10)
    assert_close(slopes(method, losses["loss/total"]), {n: g_tr[n] + g_te[n] for n in g_tr}, 1e-8)


def test_the_modes_have_one_value_and_differ_by_the_paths_that_they_cut(double: None) -> None:
    """Without decay: exact = first + (what is left in the release), through the network."""
    method, batch = in_double(method_of(weight_decay=0.0), batch_of(seed=2))
    found, values = {}, set()
    for meta in ("exact", "first", "release"):
        object.__setattr__(method.settings, "m3l_meta", meta)
        total = method.training_losses(batch, 1)["loss/total"]
        values.add(round(total.item(), 10))
        found[meta] = slopes(method, total)
    assert len(values) == 1
    here = copy.deepcopy(method)
    g_tr = slopes(here, trained_loss(here, batch, 1))
    expected = {n: found["first"][n] + found["release"][n] - g_tr[n] for n in g_tr}
    assert_close(found["exact"], expected, 1e-9)
    through_hessian = {n: found["release"][n] - g_tr[n] for n in g_tr}
    assert norm(through_hessian) > 1e-3 * norm(g_tr)


@pytest.mark.parametrize("meta", ["exact", "first", "release"])
def test_rate_zero_leaves_the_plain_joint_gradient(meta: str, double: None) -> None:
    """L_te(theta') = L_te(theta); the release's judging adds exactly nothing."""
    method, batch = in_double(method_of(m3l_meta=meta, warmup_epochs=1, warmup_factor=0.0), batch_of(seed=3))
    here = copy.deepcopy(method)
    l_tr, l_te = trained_loss(here, batch, 0), judged_loss(here, here, batch, 0)
    total = method.training_losses(batch, 0)["loss/total"]
    assert total.item() == pytest.approx((l_tr + l_te).item(), rel=1e-12)
    expected = l_tr if meta == "release" else l_tr + l_te
    assert_close(slopes(method, total), slopes(here, expected), 1e-10)
    losses = method.training_losses(batch, 0)
    judged = slopes(method, losses["loss/memory_held_out"] + losses["loss/triplet_held_out"])
    assert (norm(judged) == 0.0) == (meta == "release")


def test_none_is_the_joint_loss_of_all_domains_twice() -> None:
    method, batch = method_of(m3l_meta="none"), batch_of()
    here = copy.deepcopy(method)
    expected = 2 * torch.stack([loss_of(here, part, k) for k, part in domain_parts(batch).items()]).mean()
    losses = method.training_losses(batch, 0)
    assert losses["loss/total"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(slopes(method, losses["loss/total"]), slopes(here, expected), 1e-3)
    assert not [name for name in losses if name.endswith("held_out")]


def test_the_inner_rate_follows_the_schedule_unless_it_is_set() -> None:
    def judged(step: int, **changes: Any) -> float:
        common = {"steps_per_epoch": 10, "milestones": (1,), "learning_rate": 1e-2}
        losses = method_of(**{**common, **changes}).training_losses(batch_of(), step)
        return losses["loss/memory_held_out"].item()

    late = judged(12)
    assert late == pytest.approx(judged(12, learning_rate=1e-3, milestones=()), rel=1e-6)
    assert late == pytest.approx(judged(12, m3l_inner_rate=1e-3, learning_rate=0.5), rel=1e-6)
    assert late != pytest.approx(judged(12, m3l_inner_rate=1e-2), rel=1e-3)


def test_the_step_is_virtual_and_writes_nothing() -> None:
    method, batch = method_of(), batch_of()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    seen: list[dict[str, Tensor]] = []
    inner = method._stepped
    method._stepped = lambda value, step: seen.append(inner(value, step)) or seen[-1]  # type: ignore[method-assign]
    method.training_losses(batch, 0)["loss/total"].backward()
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert seen[0].keys() == dict(method.named_parameters()).keys()
    assert all(not torch.equal(virtual, before[name]) for name, virtual in seen[0].items())


def test_virtual_weights_of_rate_zero_are_the_weights_and_a_call_with_them_is_a_call() -> None:
    method, batch = method_of().eval(), batch_of()
    theta = dict(method.named_parameters())
    same = virtual_weights(theta, {name: torch.ones_like(p) for name, p in theta.items()}, 0.0, DECAY, "exact")
    with torch.no_grad():
        features = gem(m3l.virtual_call(method, "backbone", same, batch.images), 3.0)
        assert torch.equal(unit(m3l.virtual_call(method, "neck", same, features)), method(batch.images))


def test_every_parameter_has_a_gradient_and_there_is_no_classifier() -> None:
    method = method_of()
    method.training_losses(batch_of(), 0)["loss/total"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in method.parameters())
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"backbone", "neck"}
    assert {name for name, _ in method.neck.named_parameters()} == {"weight", "bias"}


# --- Eqs. (M2), (M8): the memory ------------------------------------------------------------------------------------


def memory_of(momentum: float = 0.2, full: bool = True) -> IdentityMemory:
    memory = IdentityMemory((3, 4), 6, momentum, 0.05)
    if full:
        memory.rows.copy_(unit(torch.randn(7, 6, generator=torch.Generator().manual_seed(1))))
        memory.seen.fill_(True)
    return memory


def vectors_of(number: int, seed: int = 2) -> Tensor:
    return unit(torch.randn(number, 6, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.9])
def test_update_goes_image_by_image(momentum: float) -> None:
    memory, labels = memory_of(momentum), torch.tensor([2, 0, 2, 2, 0])
    vectors = vectors_of(5).requires_grad_()
    expected = [row.clone() for row in memory.rows]
    for z, y in zip(vectors.detach(), labels.tolist(), strict=True):
        moved = momentum * expected[3 + y] + (1 - momentum) * z
        expected[3 + y] = moved / moved.norm()
    before = memory.rows.clone()
    memory.update(vectors, labels, 1)
    torch.testing.assert_close(memory.rows, torch.stack(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(memory.rows.norm(dim=1), torch.ones(7))
    untouched = torch.tensor([0, 1, 2, 4, 6])
    assert torch.equal(memory.rows[untouched], before[untouched])
    assert not memory.rows.requires_grad
    backwards = memory_of(momentum)
    backwards.update(vectors.flip(0), labels.flip(0), 1)
    assert not torch.allclose(backwards.rows[5], memory.rows[5], atol=1e-3), "the order matters"


def test_the_old_row_s_share_after_four_images() -> None:
    memory = memory_of()
    old, z = torch.eye(6)[0], torch.eye(6)[1]
    memory.rows[0] = old
    memory.update(z.expand(4, 6), torch.zeros(4, dtype=torch.int64), 0)
    assert float(memory.rows[0] @ old) == pytest.approx(0.2**4, rel=0.5)
    assert float(memory.rows[0] @ z) > 0.999


def test_loss_is_a_cross_entropy_within_the_domain() -> None:
    memory, labels = memory_of(), torch.tensor([3, 1, 1])
    vectors = vectors_of(3).requires_grad_()
    loss = memory.loss(vectors, labels, 1)
    expected = torch.zeros(())
    for z, y in zip(vectors, labels.tolist(), strict=True):
        similar = torch.stack([z @ memory.rows[3 + other] / 0.05 for other in range(4)])
        expected = expected - similar[y] + similar.exp().sum().log()
    assert loss.item() == pytest.approx(expected.item() / 3, rel=1e-5)
    found, wanted = (torch.autograd.grad(one, vectors, retain_graph=True)[0] for one in (loss, expected / 3))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    memory.rows[:3] = -memory.rows[:3]
    assert torch.equal(memory.loss(vectors, labels, 1), loss), "images never meet another domain's rows"
    memory.rows[3:] = -memory.rows[3:]
    assert not torch.equal(memory.loss(vectors, labels, 1), loss)


def test_a_memory_that_is_written_before_the_backward_pass_is_noticed() -> None:
    memory = memory_of()
    vectors = vectors_of(2).requires_grad_()
    loss = memory.loss(vectors, torch.tensor([0, 1]), 0)
    memory.update(vectors, torch.tensor([0, 1]), 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_without_content_are_no_candidates_and_their_images_add_nothing() -> None:
    memory = memory_of()
    memory.rows[4] = 0
    memory.seen[4] = False  # identity 1 of domain 1
    vectors, labels = vectors_of(3), torch.tensor([0, 1, 3])
    known = vectors[[0, 2]] @ memory.rows[[3, 5, 6]].T / 0.05
    expected = F.cross_entropy(known, torch.tensor([0, 2]))
    assert memory.loss(vectors, labels, 1).item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_empty_memory_has_a_loss_of_zero_and_a_gradient_of_zero() -> None:
    memory, vectors = memory_of(full=False), vectors_of(3).requires_grad_()
    loss = memory.loss(vectors, torch.tensor([0, 1, 3]), 1)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(vectors.grad, torch.zeros(3, 6))


def test_what_is_seen_first_is_copied() -> None:
    memory, vectors = memory_of(full=False), vectors_of(5)
    memory.update(vectors, torch.tensor([1, 1, 2, 1, 2]), 1)
    torch.testing.assert_close(memory.rows[4], F.normalize(vectors[[0, 1, 3]].mean(0), dim=0))
    torch.testing.assert_close(memory.rows[5], F.normalize(vectors[[2, 4]].mean(0), dim=0))
    assert memory.seen.tolist() == [False, False, False, False, True, True, False]
    assert not memory.rows[~memory.seen].any()


def test_fill_takes_the_mean_of_each_identity() -> None:
    memory = memory_of()
    vectors = vectors_of(6)
    labels, domains = torch.tensor([0, 0, 2, 1, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 0])
    pieces = [(vectors[i : i + 2], labels[i : i + 2], domains[i : i + 2]) for i in (0, 2, 4)]
    memory.fill(pieces)
    expected = {0: [0, 1], 2: [2, 5], 4: [3], 3: [4]}
    for row in range(7):
        assert bool(memory.seen[row]) == (row in expected)
        mean = vectors[expected[row]].mean(0) if row in expected else torch.zeros(6)
        torch.testing.assert_close(memory.rows[row], F.normalize(mean, dim=0))


def test_prepare_encodes_clean_images_in_evaluation_mode_and_changes_nothing_else() -> None:
    method = method_of()
    batches = [batch_of(seed=s) for s in range(3)]
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.prepare(iter(batches))
    assert method.training
    assert all(torch.equal(v, before[n]) for n, v in method.state_dict().items() if not n.startswith("memory."))
    method.eval()
    with torch.no_grad():
        rows = torch.stack([method(batch.images) for batch in batches])  # (3, 12, D)
    sums = rows.sum(0).view(6, 2, -1).sum(1)
    there = torch.tensor([0, 1, 5, 6, 12, 13])
    torch.testing.assert_close(method.memory.rows[there], F.normalize(sums))
    assert method.memory.seen.nonzero()[:, 0].tolist() == there.tolist()


def test_sources_are_looked_at_before_step_0_only() -> None:
    assert [method_of().looks_at_sources(step) for step in (0, 1, 2)] == [True, False, False]
    assert not method_of(m3l_memory_init="lazy").looks_at_sources(0)


def test_unit() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]], requires_grad=True)
    torch.testing.assert_close(unit(vectors)[0], torch.tensor([0.6, 0.8]))
    first = torch.autograd.grad(unit(vectors).square().sum(), vectors, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), vectors)[0]
    assert first.isfinite().all()
    assert second.isfinite().all()


# --- Eq. (M5): MetaBN -----------------------------------------------------------------------------------------------


def test_mixing_with_share_zero_is_the_feature_itself() -> None:
    features, noise = torch.randn(8, 4), torch.randn(8, 4)
    donor = Gaussian(torch.ones(4), torch.ones(4))
    assert torch.equal(mixed(features, donor, 0.0, noise, "std"), features)


@pytest.mark.parametrize(("scale", "power"), [("std", 0.5), ("variance", 1.0)])
def test_draws_have_the_donor_s_moments(scale: m3l.Scale, power: float) -> None:
    donor = Gaussian(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.04, 2.25, 0.0]))
    noise = draws(0, 0, (1, 20000, 3)).noise[0]
    found = mixed(torch.full((20000, 3), 7.0), donor, 1.0, noise, scale)
    torch.testing.assert_close(found.mean(0), donor.mean, rtol=0.05, atol=0.02)
    torch.testing.assert_close(found.std(0), donor.var**power, rtol=0.03, atol=1e-6)
    assert torch.equal(found[:, 2], torch.full((20000,), 0.5)), "a channel without variance is drawn as its mean"


def test_moments_are_biased_and_constant() -> None:
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mean, var = moments(features)
    torch.testing.assert_close(mean, features.detach().mean(0))
    torch.testing.assert_close(var, (features.detach() - mean).square().sum(0) / 5)
    assert not mean.requires_grad
    assert not var.requires_grad


def test_gradients_reach_the_neck_and_the_feature_through_batch_statistics() -> None:
    method = method_of()
    features = torch.randn(6, 192, generator=torch.Generator().manual_seed(0)).requires_grad_()
    share, noise = draws(0, 3, (1, 6, 192))
    donor = moments(torch.randn(6, 192, generator=torch.Generator().manual_seed(1)))
    weights = {f"neck.{name}": p.detach().clone().requires_grad_() for name, p in method.neck.named_parameters()}
    mixture = mixed(features, donor, share, noise[0], "std")
    loss = m3l.virtual_call(method, "neck", weights, mixture).square().sum()
    found = torch.autograd.grad(loss, [features, *weights.values()])
    assert all(bool(g.any()) for g in found)
    # The sum of gamma x_hat + beta over the batch is fixed: a gradient that treats the statistics as constants is not
    # orthogonal to a shift of all features.
    torch.testing.assert_close(found[0].sum(0), torch.zeros(192), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_domains", [2, 3, 4])
def test_one_draw_per_other_domain_and_one_share_a_step(num_domains: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of((4,) * num_domains, m3l_meta="first")
    drawn, mixtures = [], []

    def spied_draws(seed: int, step: int, shape: tuple[int, int, int]) -> m3l.Draws:
        drawn.append(shape)
        return draws(seed, step, shape)

    def spied_mixed(features: Tensor, donor: Gaussian, share: float, noise: Tensor, scale: m3l.Scale) -> Tensor:
        mixtures.append((share, noise))
        return mixed(features, donor, share, noise, scale)

    monkeypatch.setattr(m3l, "draws", spied_draws)
    monkeypatch.setattr(m3l, "mixed", spied_mixed)
    method.training_losses(batch_of((2,) * num_domains), 0)
    assert drawn == [(num_domains - 1, 4, 192)]
    assert len(mixtures) == num_domains - 1
    assert len({share for share, _ in mixtures}) == 1
    assert len({float(noise[0, 0]) for _, noise in mixtures}) == num_domains - 1


def test_metabn_off_is_the_plain_neck_and_the_scale_matters() -> None:
    found = {}
    for metabn, scale in (("off", "std"), ("on", "std"), ("on", "variance")):
        method, batch = method_of(m3l_metabn=metabn, m3l_scale=scale, m3l_meta="first"), batch_of()
        here = copy.deepcopy(method)
        there = stepped(here, slopes(here, trained_loss(here, batch, 0)), RATE, DECAY)
        expected = judged_loss(here, there, batch, 0)
        losses = method.training_losses(batch, 0)
        found[metabn, scale] = (losses["loss/memory_held_out"] + losses["loss/triplet_held_out"]).item()
        assert found[metabn, scale] == pytest.approx(expected.item(), rel=1e-4)
    assert len({round(value, 3) for value in found.values()}) == 3


def test_draws_are_a_function_of_seed_and_step() -> None:
    one, same = draws(3, 7, (2, 4, 5)), draws(3, 7, (2, 4, 5))
    assert one.share == same.share
    assert torch.equal(one.noise, same.noise)
    others = [draws(3, 8, (2, 4, 5)), draws(4, 7, (2, 4, 5))]
    assert all(other.share != one.share and not torch.equal(other.noise, one.noise) for other in others)
    shares = torch.tensor([draws(0, step, (1, 1, 1)).share for step in range(400)])
    assert 0.45 < float(shares.mean()) < 0.55
    assert float(shares.var()) == pytest.approx(1 / 12, rel=0.15)


# --- a whole step ---------------------------------------------------------------------------------------------------


class Stepping:
    """The trainer's `update`: plain gradient descent, and a copy of the method just after it."""

    def __init__(self, method: M3L, rate: float = 0.01) -> None:
        self.method, self.rate, self.after = method, rate, method
        self.count = 0

    def __call__(self, losses: Losses, groups: tuple[str, ...] = ("main",), rule: str = "optimiser") -> None:
        self.count += 1
        found = slopes(self.method, losses["loss/total"])
        with torch.no_grad():
            for name, p in self.method.named_parameters():
                p.sub_(self.rate * found[name])
        self.after = copy.deepcopy(self.method)


@pytest.mark.parametrize(
    ("meta", "step", "order"), [("exact", 0, (0, 1, 2)), ("first", 1, (1, 2, 0)), ("none", 5, (2, 0, 1))]
)
def test_statistics_are_those_of_the_last_passes_in_rotated_order(meta: str, step: int, order: tuple[int, ...]) -> None:
    method, batch = method_of(m3l_meta=meta), batch_of()
    before = copy.deepcopy(method)
    update = Stepping(method)
    method.train_step(batch, step, update)
    assert update.count == 1
    for name, buffer in update.after.named_buffers():
        assert torch.equal(buffer, before.get_buffer(name)), f"{name} is written before the update"

    after, parts = update.after, domain_parts(batch)
    stem = after.backbone.bn1
    mean, var = stem.running_mean.clone(), stem.running_var.clone()
    for k in order:
        with torch.no_grad():
            maps = after.backbone.conv1(parts[k].images)
            mean = 0.9 * mean + 0.1 * maps.mean((0, 2, 3))
            var = 0.9 * var + 0.1 * maps.var((0, 2, 3))
            vectors = F.normalize(after.neck(gem(after.backbone(parts[k].images), 3.0)))
        for z, y in zip(vectors, parts[k].labels.tolist(), strict=True):
            row = sum(NUM_IDS[:k]) + y
            moved = 0.2 * after.memory.rows[row] + 0.8 * z
            after.memory.rows[row] = moved / moved.norm()
    torch.testing.assert_close(method.backbone.bn1.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.backbone.bn1.running_var, var, rtol=1e-5, atol=1e-6)
    for name, buffer in method.named_buffers():
        torch.testing.assert_close(buffer, after.get_buffer(name), rtol=1e-4, atol=1e-5, msg=name)
    assert int(method.neck.num_batches_tracked) == 3
    kept = torch.ones(18, dtype=torch.bool)
    kept[[0, 1, 5, 6, 12, 13]] = False
    assert torch.equal(method.memory.rows[kept], before.memory.rows[kept])


def test_a_lazy_memory_begins_with_the_first_batch() -> None:
    method, batch = method_of(m3l_memory_init="lazy", m3l_temperature=1.0), batch_of()
    method.memory.rows.zero_()
    method.memory.seen.zero_()
    losses = method.train_step(batch, 0, Stepping(method))
    assert losses["loss/memory"].item() == 0.0
    assert losses["loss/memory_held_out"].item() == 0.0
    assert method.memory.seen.nonzero()[:, 0].tolist() == [0, 1, 5, 6, 12, 13]
    assert all(p.isfinite().all() for p in method.parameters())
    assert method.train_step(batch, 1, Stepping(method))["loss/memory"].item() > 0.0


def test_memories_are_in_the_state_and_go_on() -> None:
    method, batch = method_of(m3l_meta="first"), batch_of()
    method.train_step(batch, 0, Stepping(method))
    later = method_of(m3l_meta="first")
    later.load_state_dict(method.state_dict())
    assert {"memory.rows", "memory.seen"} <= method.state_dict().keys()
    for one in (method, later):
        one.train_step(batch, 1, Stepping(one))
    assert all(torch.equal(v, later.state_dict()[n]) for n, v in method.state_dict().items())


@pytest.mark.parametrize("ids", [(2, 1, 1), (1, 1, 1), (2, 0, 2)])
def test_domains_of_one_identity_or_of_none_in_a_batch(ids: tuple[int, ...]) -> None:
    method, batch = method_of(m3l_meta="first"), batch_of(ids)
    for step in range(4):
        held_out = held_out_of(method, batch, step)
        losses = method.train_step(batch, step, Stepping(method))
        if ids[held_out] == 1:
            assert losses["loss/triplet_held_out"].item() == 0.0
        assert all(value.isfinite() for value in losses.values())
        assert all(p.isfinite().all() for p in method.parameters())


def test_a_batch_of_one_domain_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="hold out"):
        method_of().training_losses(batch_of((3, 0, 0)), 0)


@pytest.mark.parametrize(("meta", "num_domains"), [("none", 2), ("first", 3), ("release", 2), ("exact", 4)])
def test_convolutions_cost_what_is_declared(meta: str, num_domains: int) -> None:
    num_ids, batch = (4,) * num_domains, batch_of((1,) * num_domains)
    baseline = build("baseline", num_ids)
    with FlopCounterMode(display=False) as plain:
        slopes(baseline, baseline.training_losses(batch, 0)["loss/total"])
    method = method_of(num_ids, m3l_meta=meta)
    with FlopCounterMode(display=False) as counted:
        method.train_step(batch, 0, Stepping(method))

    def convolutions(counter: FlopCounterMode) -> int:
        found = counter.get_flop_counts()["Global"]
        return sum(number for operation, number in found.items() if "convolution" in str(operation))

    assert convolutions(counted) / convolutions(plain) == pytest.approx(method.cost.train_passes, rel=0.02)


def test_in_bf16_memories_and_comparisons_stay_in_fp32() -> None:
    memory, vectors, labels = memory_of(), vectors_of(4), torch.tensor([0, 1, 1, 3])
    full = memory_of(full=False)
    full.update(vectors, labels, 1)
    expected = memory.loss(vectors, labels, 1), full.rows
    lazy = memory_of(full=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lazy.update(vectors, labels, 1)
        assert torch.equal(memory.loss(vectors, labels, 1), expected[0])
    assert torch.equal(lazy.rows, expected[1])

    method, batch = method_of(), batch_of()
    terms: list[Losses] = []
    features, vectors = torch.randn(4, 192, generator=torch.Generator().manual_seed(0)), unit(torch.ones(4, 192))
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            terms.append(method._terms(features, [vectors], batch.labels[:4], 0))
            assert all(v.dtype == torch.float32 for v in method.training_losses(batch, 0).values())
    assert terms[0] == terms[1]


@pytest.mark.parametrize("case", ["equal images", "dead channels"])
def test_second_derivatives_are_finite_where_distances_and_variances_are_zero(case: str) -> None:
    method, batch = method_of(), batch_of()
    with torch.no_grad():
        if case == "equal images":
            method.neck.weight.fill_(1.0)
            method.neck.bias.zero_()  # z = 0
            batch = batch._replace(images=batch.images[:1].expand_as(batch.images).clone())
        else:
            method.backbone.layer4[-1].bn2.weight[:20] = 0.0
            method.backbone.layer4[-1].bn2.bias[:20] = -50.0
    for step in range(2):
        assert all(g.isfinite().all() for g in total_slopes(method, batch, step).values())


# --- test, and what is refused --------------------------------------------------------------------------------------


def test_encodes_behind_the_neck_by_running_statistics() -> None:
    method, images = method_of(), batch_of().images
    method.train_step(batch_of(), 0, Stepping(method))
    method.eval()
    with torch.no_grad():
        features = gem(method.backbone(images), 3.0)
        neck = method.neck
        behind = neck.weight * (features - neck.running_mean) / (neck.running_var + 1e-5).sqrt() + neck.bias
        torch.testing.assert_close(method(images), F.normalize(behind), rtol=1e-4, atol=1e-5)
        rows = method.memory.rows.clone()
        method.memory.rows.zero_()
        torch.testing.assert_close(method(images), F.normalize(behind), rtol=1e-4, atol=1e-5)
    assert rows.any()


def test_recomputation_and_one_source_are_refused() -> None:
    with pytest.raises(UsageError, match=r"activation_checkpointing: M3L.*; set "):
        build("m3l", activation_checkpointing=True)
    with pytest.raises(UsageError, match="2 or more source domains"):
        build("m3l", (5,))
