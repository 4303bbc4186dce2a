"""BAU: its weights against sets, its losses against loops, its prototypes, its two ways of batch normalisation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import NUM_IDS, build, gradients, mixed_batch, shaken
from torch import Tensor

from lda.batch import Batch
from lda.methods.base import Losses
from lda.methods.bau import (
    BAU,
    alignment_loss,
    domain_uniformity_loss,
    move_prototypes,
    reciprocal_weights,
    uniformity_loss,
)
from lda.parts.heads import gem
from lda.parts.instance_sites import InstanceSite
from lda.parts.losses import batch_hard_triplet_loss

B = 6
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def units(count: int, seed: int, size: int = 5) -> Tensor:
    return F.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))


def bau(**changes: Any) -> BAU:
    method = build("bau", **changes)
    assert isinstance(method, BAU)
    return method


def two_views(seed: int = 0) -> Batch:
    return mixed_batch(seed)._replace(second=mixed_batch(seed + 100).images)


def with_prototypes(method: BAU, seed: int = 3) -> BAU:
    method.prototypes.copy_(units(sum(NUM_IDS), seed, method.backbone.channels))
    return method


def backward(losses: Losses, groups: tuple[str, ...] = ("main",), rule: str = "optimiser") -> None:
    losses["loss/total"].backward()


# --- (B3) and (B4) ---------------------------------------------------------------------------------------------------


def slow_weights(weak: Tensor, strong: Tensor, k: int) -> Tensor:
    """(B3) with sets: features 0 .. B-1 are weak, B .. 2B-1 strong."""
    features = [*weak.double(), *strong.double()]
    n = len(weak)
    near: list[set[int]] = []
    for a in features:
        cosines = [float(a @ b) for b in features]
        near.append(set(sorted(range(2 * n), key=lambda b: -cosines[b])[:k]))
    mutual = [{b for b in near[a] if a in near[b]} for a in range(2 * n)]
    w = torch.zeros(n, n)
    for i in range(n):
        for j in range(n):
            w[i, j] = len(mutual[n + i] & mutual[j]) / len(mutual[n + i] | mutual[j])
    return w


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize("seed", range(4))
def test_weights_equal_sets(k: int, seed: int) -> None:
    weak = units(B, seed)
    strong = F.normalize(weak + 0.4 * units(B, seed + 50))
    found = reciprocal_weights(weak, strong, k)
    torch.testing.assert_close(found, slow_weights(weak, strong, k))
    assert bool(((found >= 0) & (found <= 1)).all())
    if 3 <= k <= 5:
        torch.testing.assert_close(reciprocal_weights(strong, weak, k), found.T)


def test_identical_views_and_two_neighbours_align_at_no_cost() -> None:
    weak = units(B, 1)
    weights = reciprocal_weights(weak, weak.clone(), 2)
    assert torch.equal(weights, torch.eye(B))
    assert float(alignment_loss(weak, weak.clone(), LABELS, weights)) == pytest.approx(0.0, abs=1e-6)


def test_one_neighbour_leaves_no_weight_and_a_finite_loss() -> None:
    weak, strong = units(B, 1).requires_grad_(), units(B, 2).requires_grad_()
    weights = reciprocal_weights(weak, strong, 1)
    assert torch.equal(weights, torch.zeros(B, B))
    loss = alignment_loss(weak, strong, LABELS, weights)
    loss.backward()
    assert loss.item() == 0.0
    assert weak.grad is not None
    assert torch.equal(weak.grad, torch.zeros_like(weak))


def test_a_batch_of_one_image_shown_many_times_is_finite() -> None:
    """Ties everywhere: a feature may not be among its own nearest, and a union may be empty."""
    same = units(1, 0).repeat(B, 1)
    weights = reciprocal_weights(same, same, 1)
    assert weights.isfinite().all()
    assert alignment_loss(same, same, LABELS, weights).isfinite()


@pytest.mark.parametrize("k", [2 * B, 512])
def test_all_neighbours_give_the_plain_mean_over_positives(k: int) -> None:
    weak, strong = units(B, 1), units(B, 2)
    weights = reciprocal_weights(weak, strong, k)
    assert torch.equal(weights, torch.ones(B, B))
    gaps = [float((strong[i] - weak[j]).square().sum()) for i in range(B) for j in range(B) if LABELS[i] == LABELS[j]]
    assert float(alignment_loss(weak, strong, LABELS, weights)) == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)


def test_alignment_equals_loop_and_the_weights_are_constant() -> None:
    weak, strong = units(B, 1), units(B, 2)
    weights = torch.rand(B, B, generator=torch.Generator().manual_seed(0))
    above = below = 0.0
    for i in range(B):
        for j in range(B):
            if LABELS[i] == LABELS[j]:
                above += float(weights[i, j] * (strong[i] - weak[j]).square().sum())
                below += float(weights[i, j])
    assert float(alignment_loss(weak, strong, LABELS, weights)) == pytest.approx(above / below, rel=1e-5)
    assert not reciprocal_weights(weak.requires_grad_(), strong.requires_grad_(), 4).requires_grad


# --- (B5) and (B6) ---------------------------------------------------------------------------------------------------


def test_uniformity_of_orthonormal_and_of_equal_points() -> None:
    assert float(uniformity_loss(torch.eye(5), 2.0)) == pytest.approx(-4.0, rel=1e-6)
    assert float(uniformity_loss(torch.eye(5), 0.5)) == pytest.approx(-1.0, rel=1e-6)
    assert float(uniformity_loss(units(1, 0).repeat(4, 1), 2.0)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("t", [0.5, 2.0, 20.0])
def test_uniformity_equals_loop(t: float) -> None:
    f = units(B, 4)
    terms = [math.exp(-t * float((f[a] - f[b]).square().sum())) for a in range(B) for b in range(a + 1, B)]
    assert float(uniformity_loss(f, t)) == pytest.approx(math.log(sum(terms) / len(terms)), rel=1e-4)


PROTOTYPE_DOMAINS = torch.tensor([0] * 3 + [1] * 20 + [2] * 9)
DOMAINS = torch.tensor([0, 0, 1, 1, 2, 2])
OWN = DOMAINS[:, None] == PROTOTYPE_DOMAINS[None, :]


def terms_of_domains(f: Tensor, prototypes: Tensor, t: float) -> list[float]:
    terms = []
    for i in range(len(f)):
        own = [c for c, k in zip(prototypes, PROTOTYPE_DOMAINS, strict=True) if k == DOMAINS[i]]
        gaps = sorted(float((f[i] - c).square().sum()) for c in own)
        terms += [math.exp(-t * gap) for gap in gaps[1 : len(f) + 1]]
    return terms


@pytest.mark.parametrize("t", [2.0, 20.0])
def test_domain_uniformity_equals_loop(t: float) -> None:
    """Domain 0 has 3 prototypes, fewer than B + 1: two pairs for each of its images, six for the others'."""
    f, prototypes = units(B, 4), units(32, 5)
    terms = terms_of_domains(f, prototypes, t)
    assert len(terms) == 2 * (2 + 6 + 6)
    found = float(domain_uniformity_loss(f, prototypes, OWN, t))
    assert found == pytest.approx(math.log(sum(terms) / len(terms)), rel=1e-4)


def test_padding_as_in_the_release_has_the_same_gradient() -> None:
    """The release fills up to B pairs with terms that are 0: log(sum / B^2) instead of log(sum / pairs there are)."""
    f, prototypes = units(B, 4).double().requires_grad_(), units(32, 5).double()
    gaps = torch.cdist(f, prototypes).square() + 9999999.0 * ~OWN
    release = gaps.sort(1).values[:, 1 : B + 1].mul(-2).exp().mean().log()
    (expected,) = torch.autograd.grad(release, f)
    ours = domain_uniformity_loss(f, prototypes, OWN, 2.0)
    (found,) = torch.autograd.grad(ours, f)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert ours.item() - release.item() == pytest.approx(math.log(36 / 28), rel=1e-4)


def test_only_prototypes_of_the_own_domain_count() -> None:
    f, prototypes = units(B, 4), units(32, 5)
    alone = DOMAINS == 1
    before = domain_uniformity_loss(f[alone], prototypes, OWN[alone], 2.0)
    permuted = prototypes.clone()
    others = (PROTOTYPE_DOMAINS != 1).nonzero()[:, 0]
    permuted[others] = prototypes[others.flip(0)]
    assert torch.equal(domain_uniformity_loss(f[alone], permuted, OWN[alone], 2.0), before)
    permuted[others] = units(len(others), 77)
    assert torch.equal(domain_uniformity_loss(f[alone], permuted, OWN[alone], 2.0), before)
    own = (PROTOTYPE_DOMAINS == 1).nonzero()[:, 0]
    permuted[own] = units(len(own), 78)
    assert not torch.equal(domain_uniformity_loss(f[alone], permuted, OWN[alone], 2.0), before)


@pytest.mark.parametrize("there", [0, 1])
def test_without_pairs_domain_uniformity_is_zero_with_a_finite_gradient(there: int) -> None:
    f = units(B, 4).requires_grad_()
    own = torch.zeros(B, 32, dtype=torch.bool)
    own[:, :there] = True
    loss = domain_uniformity_loss(f, units(32, 5), own, 2.0)
    loss.backward()
    assert loss.item() == 0.0
    assert f.grad is not None
    assert torch.equal(f.grad, torch.zeros_like(f))
    assert domain_uniformity_loss(units(B, 4), units(1, 5), own[:, :1], 2.0).item() == 0.0


# --- (B7) ------------------------------------------------------------------------------------------------------------


def test_prototypes_move_image_after_image() -> None:
    before, labels = units(8, 1), torch.tensor([3, 5, 3, 0, 5, 5])
    f = units(len(labels), 2)
    expected = before.clone()
    for i, y in enumerate(labels.tolist()):
        moved = 0.3 * expected[y] + 0.7 * f[i]
        expected[y] = moved / moved.norm()
    found = before.clone()
    move_prototypes(found, labels, f, 0.3)
    torch.testing.assert_close(found, expected)
    untouched = [1, 2, 4, 6, 7]
    assert torch.equal(found[untouched], before[untouched])
    backwards = before.clone()
    move_prototypes(backwards, labels.flip(0), f.flip(0), 0.3)
    assert not torch.allclose(backwards, found, atol=1e-2), "the last image dominates"


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.999])
def test_prototypes_stay_of_norm_one_and_begin_at_the_first_image(momentum: float) -> None:
    prototypes = torch.zeros(3, 5)
    f = units(9, 3)
    move_prototypes(prototypes, torch.zeros(1, dtype=torch.int64), f[:1], momentum)
    torch.testing.assert_close(prototypes[0], f[0])
    assert torch.equal(prototypes[1:], torch.zeros(2, 5))
    move_prototypes(prototypes, torch.arange(3).repeat(3), f, momentum)
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(3))


def test_a_step_moves_prototypes_after_its_backward_pass() -> None:
    """Loss and gradient are those of the prototypes before the step; afterwards they have moved by f_w."""
    method, batch = with_prototypes(bau()), two_views()
    other = copy.deepcopy(method)
    before = method.prototypes.clone()
    losses = method.train_step(batch, 0, backward)

    weak, strong = other.views(batch)
    moving, other.prototypes = other.prototypes, before  # the loss reads a snapshot that nobody changes
    expected = other.losses(batch, weak, strong)
    move_prototypes(moving, other.joint_labels(batch), weak.unit, 0.1)
    backward(expected)
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    found = gradients(method)
    assert found.keys() == gradients(other).keys()
    assert all(torch.equal(value, found[key]) for key, value in gradients(other).items())
    assert torch.equal(method.prototypes, moving)
    changed = (method.prototypes != before).any(1).nonzero()[:, 0]
    assert changed.tolist() == sorted(set(method.joint_labels(batch).tolist()))


def test_moving_between_forward_and_backward_is_an_error() -> None:
    """What the release does: why (B7) waits."""
    method, batch = with_prototypes(bau()), two_views()
    weak, strong = method.views(batch)
    losses = method.losses(batch, weak, strong)
    move_prototypes(method.prototypes, method.joint_labels(batch), weak.unit, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(losses)


def clean_sources(size: int) -> list[Batch]:
    """Three images of every identity of three domains, `size` at a time."""
    found = []
    for domain, count in enumerate(NUM_IDS):
        labels = torch.arange(count).repeat(3)
        images = torch.randn(len(labels), 3, 32, 16, generator=torch.Generator().manual_seed(domain))
        for start in range(0, len(labels), size):
            part = labels[start : start + size]
            found.append(Batch(images[start : start + size], part, torch.full((len(part),), domain)))
    return found


def test_prototypes_begin_as_the_mean_over_clean_images() -> None:
    method = shaken(bau())
    before = {key: value.clone() for key, value in method.state_dict().items()}
    assert method.looks_at_sources(0)
    assert not method.looks_at_sources(1)
    method.prepare(iter(clean_sources(8)))
    assert method.training
    assert not method.prototypes.requires_grad
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]) == (key != "prototypes"), key
    method.eval()
    by_identity: dict[int, list[Tensor]] = {}
    with torch.no_grad():
        for batch in clean_sources(100):
            offset = sum(NUM_IDS[: int(batch.domains[0])])
            for label, feature in zip(batch.labels.tolist(), method(batch.images), strict=True):
                by_identity.setdefault(offset + label, []).append(feature)
    for label, features in by_identity.items():
        mean = torch.stack(features).mean(0)
        torch.testing.assert_close(method.prototypes[label], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_first_seen_prototypes_join_when_they_are_met() -> None:
    method = bau(bau_prototypes="first_seen")
    assert not method.looks_at_sources(0)
    batch = two_views()
    assert method.train_step(batch, 0, backward)["loss/domain"].item() == 0.0
    seen = method.prototypes.norm(dim=1) > 0
    assert seen.nonzero()[:, 0].tolist() == sorted(set(method.joint_labels(batch).tolist()))
    second = two_views(1)
    weak, strong = method.views(second)
    found = method.losses(second, weak, strong)["loss/domain"]
    expected = torch.tensor(0.0)
    for view in (weak, strong):  # two identities of each domain were met: one pair an image
        gaps = []
        for i, domain in enumerate(second.domains.tolist()):
            own = seen & (method.prototype_domains == domain)
            gaps.append(((view.unit[i] - method.prototypes[own]).square().sum(1)).max())
        expected = expected + torch.stack(gaps).mul(-2).exp().mean().log() / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- the step --------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_equations() -> None:
    """By hand from the network's parts, with settings that are no defaults; strong views have no identity loss."""
    changes = {
        "bau_align_weight": 0.7, "bau_uniform_weight": 0.3, "bau_domain_weight": 2.5, "bau_neighbours": 5,
        "bau_temperature": 1.5, "triplet_weight": 0.6, "label_smoothing": 0.2,
    }  # fmt: skip
    method, batch = with_prototypes(shaken(bau(**changes))), two_views()
    other = copy.deepcopy(method)
    losses = method.train_step(batch, 0, lambda losses: None)
    assert batch.second is not None
    neck = other.head.necks[0]
    e_w, e_s = (gem(other.backbone(images), 3.0) for images in (batch.images, batch.second))
    n_w, n_s = neck(e_w), neck(e_s)
    f_w, f_s = F.normalize(n_w), F.normalize(n_s)
    labels = batch.labels + torch.tensor([0, 5, 12])[batch.domains]
    logits = n_w @ other.head.classifiers[0].weight.T
    own = batch.domains[:, None] == torch.tensor([0] * 5 + [1] * 7 + [2] * 6)[None, :]
    prototypes = other.prototypes
    expected = {
        "loss/id": F.cross_entropy(logits, labels, label_smoothing=0.2),
        "loss/triplet": batch_hard_triplet_loss(e_w, labels, 0.3),
        "loss/align": alignment_loss(f_w, f_s, labels, reciprocal_weights(f_w, f_s, 5)),
        "loss/uniform": (uniformity_loss(f_w, 1.5) + uniformity_loss(f_s, 1.5)) / 2,
        "loss/domain": sum(domain_uniformity_loss(f, prototypes, own, 1.5) for f in (f_w, f_s)) / 2,
    }
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-4, atol=1e-5)
    weights = {"id": 1.0, "triplet": 0.6, "align": 0.7, "uniform": 0.3, "domain": 2.5}
    total = sum(weight * losses[f"loss/{name}"] for name, weight in weights.items())
    torch.testing.assert_close(losses["loss/total"], total)
    assert all(losses[f"loss/{name}"].abs() > 1e-3 for name in weights)


def statistics(method: BAU) -> dict[str, Tensor]:
    return {key: value for key, value in method.state_dict().items() if "running" in key or "num_batches" in key}


def test_split_statistics_are_those_of_weak_views_alone() -> None:
    method, batch = bau(), two_views()
    other = copy.deepcopy(method)
    weak, strong = method.views(batch)
    expected = other.head.necks[0](gem(other.backbone(batch.images), 3.0))
    assert torch.equal(weak.neck, expected)
    assert statistics(method).keys() == statistics(other).keys()
    assert all(torch.equal(value, statistics(other)[key]) for key, value in statistics(method).items())
    assert batch.second is not None
    alone = other.head.necks[0](gem(other.backbone(batch.second), 3.0))
    torch.testing.assert_close(strong.neck, alone)  # and it is normalised by its own batch


def test_joint_statistics_are_those_of_both_views() -> None:
    method, batch = bau(bau_bn="joint"), two_views()
    other = copy.deepcopy(method)
    weak, strong = method.views(batch)
    assert batch.second is not None
    both = other.head.necks[0](gem(other.backbone(torch.cat([batch.images, batch.second])), 3.0))
    torch.testing.assert_close(torch.cat([weak.neck, strong.neck]), both)
    assert all(torch.equal(value, statistics(other)[key]) for key, value in statistics(method).items())
    split = bau()
    split.views(batch)
    assert not torch.allclose(
        statistics(split)["head.necks.0.running_mean"], statistics(method)["head.necks.0.running_mean"]
    )


@pytest.mark.parametrize("mode", ["split", "joint"])
def test_strong_images_get_no_gradient_of_the_identity_losses(mode: str) -> None:
    """Exactly none when each view is normalised by itself; of one batch, statistics carry some."""
    method, batch = with_prototypes(bau(bau_bn=mode)), two_views()
    assert batch.second is not None
    batch.second.requires_grad_()
    losses = method.losses(batch, *method.views(batch))
    plain = losses["loss/id"] + losses["loss/triplet"]
    (found,) = torch.autograd.grad(plain, [batch.second], retain_graph=True, allow_unused=True)
    assert (found is None) == (mode == "split")
    for name in ("align", "uniform", "domain"):
        (found,) = torch.autograd.grad(losses[f"loss/{name}"], [batch.second], retain_graph=True)
        assert float(found.abs().max()) > 0, name


def test_network_feature_and_layout() -> None:
    method = with_prototypes(shaken(bau(bau_strong_probability=0.3)))
    sites = [name for name, module in method.backbone.named_children() if isinstance(module, InstanceSite)]
    assert sites == [f"instance_norm_layer{stage}" for stage in (1, 2, 3)]
    assert method.layout.views == 2
    assert method.layout.strong == 0.3
    assert sum(p.numel() for p in method.parameters()) == sum(p.numel() for p in build("baseline").parameters())
    method.train_step(two_views(), 0, backward)
    method.eval()
    images, neck = mixed_batch(5).images, method.head.necks[0]
    with torch.no_grad():
        e = gem(method.backbone(images), 3.0)
        f = neck.weight * (e - neck.running_mean) / (neck.running_var + neck.eps).sqrt()
        torch.testing.assert_close(method(images), f / f.norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="two views"):
        method.views(mixed_batch())


def test_losses_are_of_full_precision_inside_autocast() -> None:
    weak, strong, prototypes = units(B, 1, 64), units(B, 2, 64), units(32, 5, 64)

    def all_of() -> list[Tensor]:
        weights = reciprocal_weights(weak, strong, 4)
        return [
            weights,
            alignment_loss(weak, strong, LABELS, weights),
            uniformity_loss(weak, 2.0),
            domain_uniformity_loss(weak, prototypes, OWN, 2.0),
        ]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = all_of()
    assert all(torch.equal(a, b) for a, b in zip(inside, all_of(), strict=True))
