"""The reconstruction of RaMoE: its vote against loops, what learns from what, whose statistics an expert keeps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import NUM_IDS, build, mixed_batch, shaken
from torch import Tensor

from lda import methods
from lda.config import preset
from lda.errors import UsageError
from lda.methods.base import Losses
from lda.methods.ramoe import Centres, RaMoE, decorrelation_loss, mixture
from lda.parts.backbones import build_backbone, forward_shares
from lda.parts.domain_norm import RowWise
from lda.parts.heads import gem
from lda.parts.losses import batch_hard_triplet_loss, identity_loss, relation_loss

OFFSETS = torch.tensor([0, 5, 12])


def ramoe(**changes: Any) -> RaMoE:
    method = build("ramoe", **changes)
    assert isinstance(method, RaMoE)
    return method


def units(count: int, size: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))


def centres_of(num_ids: tuple[int, ...] = NUM_IDS, seen: float = 0.7, temperature: float = 0.1) -> Centres:
    centres = Centres(num_ids, 8, momentum=0.9, temperature=temperature)
    centres.rows.copy_(units(sum(num_ids), 8, 1))
    centres.seen.copy_(torch.rand(sum(num_ids), generator=torch.Generator().manual_seed(2)) < seen)
    return centres


def settled(**changes: Any) -> RaMoE:
    """After two steps whose updates change nothing: every domain has centres."""
    method = shaken(ramoe(**changes))
    for seed in range(2):
        method.train_step(mixed_batch(seed), seed, lambda *given, **more: None)
    return method


def slow_weights(centres: Centres, v: Tensor, allowed: list[int]) -> list[float]:
    """(R7) with loops."""
    tau, relevance = centres.temperature, {}
    for k in allowed:
        own = [y for y in range(len(centres.of)) if int(centres.of[y]) == k and bool(centres.seen[y])]
        mean = sum(math.exp(float((v @ centres.rows[y]).detach()) / tau) for y in own) / len(own)
        relevance[k] = tau * math.log(mean)
    total = sum(math.exp(r / tau) for r in relevance.values())
    return [math.exp(relevance[k] / tau) / total if k in relevance else 0.0 for k in range(centres.num_domains)]


# --- (R7): who votes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_votes_equal_loops_sum_to_one_and_leave_out_the_held_out(temperature: float) -> None:
    centres, v = centres_of(temperature=temperature), units(6, 8, 3)
    held_out = torch.tensor([0, 1, 2, 0, 1, 2])
    found = centres.weights(v, held_out[:, None] != torch.arange(3))
    for i, domain in enumerate(held_out.tolist()):
        expected = slow_weights(centres, v[i], [k for k in range(3) if k != domain])
        torch.testing.assert_close(found[i], torch.tensor(expected), rtol=1e-4, atol=1e-6)
        assert found[i, domain] == 0.0
    torch.testing.assert_close(found.sum(1), torch.ones(6))
    everybody = centres.weights(v)
    torch.testing.assert_close(everybody[0], torch.tensor(slow_weights(centres, v[0], [0, 1, 2])), rtol=1e-4, atol=1e-6)


def test_a_larger_domain_has_no_larger_vote() -> None:
    """All centres of a domain twice: the same weights, since (R7) takes their mean."""
    small, v = centres_of((3, 4, 5), seen=1.0), units(6, 8, 3)
    double = Centres((6, 4, 5), 8, momentum=0.9, temperature=0.1)
    double.rows.copy_(torch.cat([small.rows[:3], small.rows]))
    double.seen.fill_(True)
    torch.testing.assert_close(double.weights(v), small.weights(v))


def test_domains_in_another_order_have_their_weights_in_that_order() -> None:
    first, v = centres_of((3, 4, 5)), units(6, 8, 3)
    other = Centres((5, 3, 4), 8, momentum=0.9, temperature=0.1)
    order = [*range(7, 12), *range(3), *range(3, 7)]
    other.rows.copy_(first.rows[order])
    other.seen.copy_(first.seen[order])
    torch.testing.assert_close(other.weights(v), first.weights(v)[:, [2, 0, 1]])


def test_domains_without_centres_do_not_vote() -> None:
    centres, v = centres_of(), units(4, 8, 3)
    centres.seen[centres.of == 1] = False
    assert not centres.ready()
    assert torch.equal(centres.weights(v)[:, 1], torch.zeros(4))
    centres.seen.fill_(False)
    torch.testing.assert_close(centres.weights(v), torch.full((4, 3), 1 / 3))


def test_votes_are_in_full_precision_inside_autocast() -> None:
    centres, v = centres_of(), units(6, 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = centres.weights(v)
    assert torch.equal(inside, centres.weights(v))


# --- (R6) ------------------------------------------------------------------------------------------------------------


def test_centres_move_by_the_mean_of_an_identity_and_begin_as_it() -> None:
    centres = Centres((3, 2), 4, momentum=0.75, temperature=0.1)
    labels = torch.tensor([1, 1, 4, 1])
    first, second = units(4, 4, 1), units(4, 4, 2)
    centres.update(first, labels)
    begun = F.normalize(first[[0, 1, 3]].mean(0), dim=0)
    torch.testing.assert_close(centres.rows[1], begun)
    torch.testing.assert_close(centres.rows[4], first[2])
    assert centres.seen.tolist() == [False, True, False, False, True]
    assert torch.equal(centres.rows[[0, 2, 3]], torch.zeros(3, 4))
    centres.update(second, labels)
    moved = 0.75 * begun + 0.25 * second[[0, 1, 3]].mean(0)
    torch.testing.assert_close(centres.rows[1], moved / moved.norm())
    assert centres.rows[4].norm() == pytest.approx(1.0)


# --- (R4) and (R8) ---------------------------------------------------------------------------------------------------


def test_decorrelation_of_equal_and_of_orthogonal_features() -> None:
    own = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert float(decorrelation_loss(own, [own, 3 * own + 1])) == pytest.approx(1.0, rel=1e-5)
    left = torch.cat([torch.randn(6, 4), torch.zeros(6, 4)], 1)
    right = torch.cat([torch.zeros(6, 4), torch.randn(6, 4)], 1)
    assert float(decorrelation_loss(left, [right])) == pytest.approx(0.0, abs=1e-10)


def test_decorrelation_equals_a_loop_and_moves_the_own_expert_alone() -> None:
    random = torch.Generator().manual_seed(1)
    own, *others = (torch.randn(5, 6, generator=random, requires_grad=True) for _ in range(3))
    total = 0.0
    for other in others:
        for i in range(5):
            a, b = (own[i] - own.mean(0)).detach(), (other[i] - other.mean(0)).detach()
            total += float((a @ b / (a.norm() * b.norm())) ** 2)
    loss = decorrelation_loss(own, others)
    assert float(loss.detach()) == pytest.approx(total / 10, rel=1e-5)
    loss.backward()
    assert own.grad is not None
    assert all(other.grad is None for other in others)


def test_equal_experts_give_their_feature_whatever_the_weights() -> None:
    feature, weights = torch.randn(5, 6), torch.rand(5, 3).softmax(1)
    torch.testing.assert_close(mixture(weights, [feature] * 3), feature)
    by_hand = weights[:, 0, None] * feature + weights[:, 1, None] * 2 * feature + weights[:, 2, None] * 5 * feature
    torch.testing.assert_close(mixture(weights, [feature, 2 * feature, 5 * feature]), by_hand)


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", ["stage", "head"])
def test_losses_are_those_of_the_equations(expert: str) -> None:
    """By hand from the parts, each domain's images through each expert by themselves."""
    changes = {"ramoe_decorrelation_weight": 0.7, "ramoe_relation_weight": 0.4, "triplet_weight": 0.6}
    method, batch = settled(ramoe_expert=expert, **changes), mixed_batch(5)
    other = copy.deepcopy(method)
    losses = method.train_step(batch, 5, lambda *given, **more: None)
    maps, domains = other.trunk(batch.images), batch.domains
    labels, joint = batch.labels, batch.labels + OFFSETS[batch.domains]
    e: dict[tuple[int, int], Tensor] = {}
    for k, module in enumerate(other.experts):
        for d in (k, *(d for d in range(3) if d != k)):
            module.train(d == k)
            of_domain = maps[domains == d]
            e[k, d] = module(gem(of_domain, 3.0)) if expert == "head" else gem(module(of_domain), 3.0)
        module.train()
    rows = [domains == d for d in range(3)]
    identity = [identity_loss(other.head(e[d, d], d), labels[rows[d]], 0.1) for d in range(3)]
    triplet = [batch_hard_triplet_loss(e[d, d], labels[rows[d]], 0.3) for d in range(3)]
    apart = [decorrelation_loss(e[d, d], [e[k, d] for k in range(3) if k != d]) for d in range(3)]
    v = F.normalize(other.voting(maps.mean((2, 3))))
    weights = torch.stack(
        [
            torch.tensor(slow_weights(other.centres, v[i], [k for k in range(3) if k != int(domains[i])]))
            for i in range(len(v))
        ]
    )
    a = torch.zeros(12, e[0, 0].shape[1])
    for d in range(3):
        a[rows[d]] = sum(weights[rows[d]][:, k, None] * e[k, d] for k in range(3))
    of_vote = [batch_hard_triplet_loss(a[rows[d]], joint[rows[d]], 0.3) for d in range(3)]
    relation = [relation_loss(a[rows[d]], e[d, d], joint[rows[d]]) for d in range(3)]
    expected = {
        "loss/id": sum(identity) / 3,
        "loss/triplet": sum(triplet) / 3,
        "loss/decorrelation": sum(apart) / 3,
        "loss/id_vote": identity_loss(other.head_vote(a, 0), joint, 0.1),
        "loss/triplet_vote": sum(of_vote) / 3,
        "loss/relation": sum(relation) / 3,
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-3, atol=1e-4, msg=name)
    weighted = {"id": 1, "triplet": 0.6, "decorrelation": 0.7, "id_vote": 1, "triplet_vote": 0.6, "relation": 0.4}
    total = sum(weight * losses[f"loss/{name}"] for name, weight in weighted.items())
    torch.testing.assert_close(losses["loss/total"], total)


def parts_moved(method: RaMoE, losses: Losses, *names: str) -> set[str]:
    """Which parts of the method get a gradient of the sum of some terms."""
    method.zero_grad()
    torch.stack([losses[name] for name in names]).sum().backward(retain_graph=True)
    return {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}


def test_experts_and_vote_learn_apart() -> None:
    method = settled()

    def judge(losses: Losses, **more: Any) -> None:
        assert parts_moved(method, losses, "loss/id", "loss/triplet") == {"trunk", "experts", "head"}
        assert parts_moved(method, losses, "loss/decorrelation") == {"trunk", "experts"}
        assert parts_moved(method, losses, "loss/id_vote", "loss/triplet_vote") == {"voting", "head_vote"}
        assert parts_moved(method, losses, "loss/relation") <= {"voting"}
        judged.append(losses)

    judged: list[Losses] = []
    method.train_step(mixed_batch(3), 3, judge)
    assert judged


def test_an_expert_learns_from_its_own_domain_alone() -> None:
    """Images of domain 2 replaced, the trunk's map of the others held: experts 0 and 1 learn the same from (R3)."""
    first, second = settled(), settled()
    batch = mixed_batch(3)
    changed = batch._replace(images=torch.where((batch.domains == 2)[:, None, None, None], 0.3, batch.images))
    for method, shown in ((first, batch), (second, changed)):
        route = RowWise(shown.domains)
        with torch.no_grad():
            maps = method.trunk(batch.images)  # the trunk's batch statistics join the domains: held equal here
            maps = torch.where((shown.domains == 2)[:, None, None, None], method.trunk(shown.images), maps)
        losses = method._expert_terms(method._features(maps, route), shown, route)
        (losses["loss/id"] + losses["loss/triplet"]).backward()
    theirs = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        if name.startswith(("experts.0", "experts.1")):
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)
        if name.startswith("experts.2") and name.endswith("conv1.weight"):
            assert not torch.allclose(parameter.grad, theirs[name].grad)


@pytest.mark.parametrize("expert", ["stage", "head"])
def test_an_expert_keeps_the_statistics_of_its_own_domain(expert: str) -> None:
    method, batch = ramoe(ramoe_expert=expert), mixed_batch()
    alone = copy.deepcopy(method)
    method.train_step(batch, 0, lambda *given, **more: None)
    maps = alone.trunk(batch.images)
    for domain, module in enumerate(alone.experts):
        alone._pooled_by(module, maps[batch.domains == domain])
    expected = {k: v for k, v in alone.state_dict().items() if k.startswith("experts")}
    found = method.state_dict()
    assert any("running_mean" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_the_vote_begins_when_every_domain_has_centres() -> None:
    method = ramoe()
    first = method.train_step(mixed_batch(), 0, lambda *given, **more: None)
    assert "loss/id_vote" not in first
    assert method.centres.ready()
    assert "loss/id_vote" in method.train_step(mixed_batch(1), 1, lambda *given, **more: None)


# --- test, refusals, cost --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_the_mixture_of_all_experts() -> None:
    method, images = settled().eval(), mixed_batch(7).images
    maps = method.trunk(images)
    features = [gem(expert(maps), 3.0) for expert in method.experts]
    v = F.normalize(method.voting(maps.mean((2, 3))))
    for i in range(len(images)):
        omega = slow_weights(method.centres, v[i], [0, 1, 2])
        a = sum(weight * of_expert[i] for weight, of_expert in zip(omega, features, strict=True))
        torch.testing.assert_close(method(images)[i], a / a.norm(), rtol=1e-3, atol=1e-5)
    control = settled(ramoe_vote="uniform").eval()
    maps = control.trunk(images)
    mean = torch.stack([gem(expert(maps), 3.0) for expert in control.experts]).mean(0)
    torch.testing.assert_close(control(images), F.normalize(mean))


def test_it_says_that_it_is_a_reconstruction_and_what_its_control_is() -> None:
    assert "no code" in RaMoE.reconstructed
    assert ramoe().label == "RaMoE"
    control = ramoe(ramoe_vote="uniform")
    assert control.label == "RaMoE, uniform weights"
    assert not any(name.startswith(("voting", "centres", "head_vote")) for name in control.state_dict())


def test_two_sources_leave_nobody_to_choose_from() -> None:
    with pytest.raises(UsageError, match=r"3 or more source domains, this protocol has 2.*; set ramoe_vote=uniform"):
        build("ramoe", (5, 7))
    build("ramoe", (5, 7), ramoe_vote="uniform")


def test_cost_of_a_resnet() -> None:
    """2.4 forward passes at four sources, as computed for ResNet-50 by hand: (2.14 + 4 x 1.91) / 4.05."""
    config = preset("standin", method="ramoe", backbone="resnet50")
    method = methods.build(config.method, config.setup([8] * 4))
    assert method.cost.test_forwards == pytest.approx((2.14 + 4 * 1.91) / 4.05, rel=0.01)
    share = forward_shares(build_backbone("resnet50"))["layer4"]
    assert method.cost.train_passes == pytest.approx(1 + share)
