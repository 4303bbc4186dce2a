"""ACL's blocks against loops over separate experts, its losses against slow ones, its meta step against deep copies."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import build
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from lda.batch import Batch
from lda.errors import UsageError
from lda.methods.acl import ACL, cluster_losses, experts_in_use
from lda.methods.base import Losses
from lda.parts.backbones import Backbone, build_backbone
from lda.parts.batch_instance_norm import shuffle_loss
from lda.parts.episodes import draw_held_out, split_by_domain
from lda.parts.heads import gem
from lda.parts.instance_sites import InstanceSite, SplitNorm2d
from lda.parts.routed_blocks import ChannelGate, RoutedBlock, Router, ThinExperts, invariant_block
from lda.parts.routes import Switch, statistics_held
from lda.step_cost import convolutions_counted

OFFSETS = torch.tensor([0, 5, 12])
DUE = 2  # the first step that is due with the default of every third
WIDE, THIN = 48, 12


def mixed_batch(seed: int = 0) -> Batch:
    """Twelve small images, two of every identity, two identities of every domain."""
    images = torch.randn(12, 3, 32, 16, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 1, 0, 3, 2, 4]).repeat_interleave(2)
    return Batch(images, labels, torch.tensor([0, 1, 2]).repeat_interleave(4))


def acl(**changes: Any) -> ACL:
    method = build("acl", warmup_epochs=0, **changes)
    assert isinstance(method, ACL)
    return method


def drawn(module: nn.Module, seed: int = 0) -> Any:
    """The module in float64 and training mode, with random weights and norms."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().train().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random).double())
    return module


def block_of(kind: type[BasicBlock] | type[Bottleneck]) -> BasicBlock | Bottleneck:
    return drawn(kind(WIDE, WIDE) if kind is BasicBlock else kind(WIDE, THIN), 1)


def maps(seed: int = 3, n: int = 5) -> Tensor:
    return torch.randn(n, WIDE, 4, 3, generator=torch.Generator().manual_seed(seed)).double()


class Call(NamedTuple):
    losses: Losses
    groups: tuple[str, ...]
    rule: str
    gradients: dict[str, Tensor]
    running: dict[str, Tensor]
    """Buffers when it was called."""


class Updates:
    """An update that notes what it was asked for, and makes the meta step as the trainer does."""

    def __init__(self, method: ACL, rate: float = 2e-3, decay: float = 0.0) -> None:
        self.method, self.rate, self.decay = method, rate, decay
        self.calls: list[Call] = []

    def __call__(
        self, losses: Losses, groups: tuple[str, ...] = ("main",), rule: Literal["optimiser", "plain_sgd"] = "optimiser"
    ) -> None:
        known = self.method.parameter_groups()
        chosen = [p for name in groups for p in known[name].parameters]
        self.method.zero_grad(set_to_none=True)
        torch.autograd.backward(losses["loss/total"], inputs=chosen)
        found = {name: p.grad.clone() for name, p in self.method.named_parameters() if p.grad is not None}
        running = {name: b.clone() for name, b in self.method.named_buffers()}
        self.calls.append(Call(losses, groups, rule, found, running))
        if rule == "plain_sgd":
            with torch.no_grad():
                for p in chosen:
                    if p.grad is not None:
                        p.sub_(self.rate * (p.grad + self.decay * p))


# --- (A1) to (A5) ----------------------------------------------------------------------------------------------------


def alone(experts: ThinExperts, e: int, x: Tensor) -> Tensor:
    """Expert e as a block of its own, (A2): its filters and its channels of every norm."""
    count, y = experts.experts, x
    for number, (conv, norm) in enumerate(zip(experts.convs, experts.norms, strict=True)):
        own = slice(e * conv.out_channels // count, (e + 1) * conv.out_channels // count)
        y = F.conv2d(y, conv.weight[own], padding=conv.padding)
        means, variances = [], []
        for channel in range(conv.out_channels)[own]:
            by_image = isinstance(norm, SplitNorm2d) and channel < norm.instance_channels
            values = y[:, channel - own.start]
            dims = (1, 2) if by_image else (0, 1, 2)
            means.append(values.mean(dims, keepdim=True).expand(len(y), 1, 1))
            variances.append(values.var(dims, keepdim=True, correction=0).expand(len(y), 1, 1))
        mean, var = torch.stack(means, 1), torch.stack(variances, 1)
        parts = [norm.instance, norm.batch] if isinstance(norm, SplitNorm2d) else [norm]
        weight, bias = (torch.cat([getattr(p, key) for p in parts])[own][:, None, None] for key in ("weight", "bias"))
        y = (y - mean) / (var + 1e-5).sqrt() * weight + bias
        if number + 1 < len(experts.convs):
            y = F.relu(y)
    return F.relu(y + x)


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("norm", ["split", "bn"])
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_grouped_convolutions_equal_a_loop_over_separate_thin_blocks(kind: Any, norm: Any, count: int) -> None:
    experts = drawn(ThinExperts(block_of(kind), count, norm), 2)
    x = maps()
    found = experts(x)
    assert found.shape == (5, count, WIDE, 4, 3)
    for e in range(count):
        torch.testing.assert_close(found[:, e], alone(experts, e, x), rtol=0, atol=1e-9)


def test_half_of_the_experts_begin_with_instance_normalisation_or_none() -> None:
    block = block_of(Bottleneck)
    split, plain = ThinExperts(block, 4, "split"), ThinExperts(block, 4, "bn")
    assert isinstance(split.norms[0], SplitNorm2d)
    assert split.norms[0].instance_channels == THIN // 2
    assert [type(norm) for norm in [*plain.norms, *split.norms[1:]]] == [nn.BatchNorm2d] * 5


def test_experts_begin_with_shares_of_the_block() -> None:
    """By hand: 48 > 12 > 48 channels, four experts of three."""
    block = block_of(Bottleneck)
    experts = ThinExperts(block, 4, "bn")
    for e, o, i in itertools.product(range(4), range(3), range(3)):
        row = 3 * e + o
        assert torch.equal(experts.convs[0].weight[row].double(), block.conv1.weight[row].float().double())
        expected = block.conv2.weight[row, 4 * i : 4 * i + 4].mean(0)
        torch.testing.assert_close(experts.convs[1].weight[row, i].double(), expected, rtol=1e-5, atol=1e-6)
        expected = block.conv3.weight[:, 4 * i : 4 * i + 4].mean(1)
        torch.testing.assert_close(
            experts.convs[2].weight[e * WIDE : (e + 1) * WIDE, i].double(), expected, rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(experts.norms[2].weight.double(), block.bn3.weight.repeat(4), rtol=1e-6, atol=0)
    torch.testing.assert_close(experts.norms[1].bias.double(), block.bn2.bias, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_the_invariant_block_is_the_block_with_instance_normalisation(kind: Any) -> None:
    block, x = block_of(kind), maps()
    found = invariant_block(block).double()(x)

    def instance_norm(norm: nn.BatchNorm2d, y: Tensor) -> Tensor:
        y = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        return y * norm.weight[:, None, None] + norm.bias[:, None, None]

    y = F.relu(instance_norm(block.bn1, block.conv1(x)))
    y = instance_norm(block.bn2, block.conv2(y))
    if kind is Bottleneck:
        y = instance_norm(block.bn3, block.conv3(F.relu(y)))
    torch.testing.assert_close(found, F.relu(y + x), rtol=1e-5, atol=1e-5)


def test_a_block_that_changes_the_width_gives_what_fits() -> None:
    shortcut = nn.Sequential(nn.Conv2d(24, WIDE, 1, stride=2, bias=False), nn.BatchNorm2d(WIDE))
    block = BasicBlock(24, WIDE, 2, shortcut)
    new = invariant_block(block)
    assert new.downsample is None
    assert torch.equal(new.conv2.weight, block.conv2.weight)
    assert new.conv1.weight.shape == (WIDE, WIDE, 3, 3)
    assert new(maps().float()).shape == (5, WIDE, 4, 3)


def test_router_equals_its_equation_image_by_image() -> None:
    router = drawn(Router(WIDE, 4), 5).float()
    x = maps().float()
    found = router(x)
    for image, weights in zip(x, found, strict=True):
        g = image.mean((1, 2))
        hidden = router.squeeze.weight @ g
        hidden = (hidden / hidden.norm()).clamp_min(0)
        theta = (router.expand.weight @ hidden).reshape(WIDE, 4)
        logits = torch.stack([sum(g[c] * theta[c, e] for c in range(WIDE)) for e in range(4)])
        torch.testing.assert_close(weights, logits.exp() / logits.exp().sum(), rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in found.tolist()}) == 5
    assert router.squeeze.out_features == 4, "at least four hidden units"
    assert Router(2048, 4).squeeze.out_features == 128


class OneHot(nn.Module):
    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(x),), self.chosen), 4).to(x.dtype)


def routed(kind: Any = Bottleneck) -> RoutedBlock:
    block: RoutedBlock = drawn(RoutedBlock(block_of(kind), 4, "split", Switch()), 4)
    return block.float()


def test_a_one_hot_router_is_that_expert_alone() -> None:
    block, x = routed(), maps().float()
    nn.init.constant_(block.gate, -math.inf)
    for chosen in range(4):
        block.router = OneHot(chosen)
        seen: list[Tensor] = []
        with block.switch.on(seen):
            found = block(x)
        assert seen[0][:, chosen].eq(1).all()
        expected = block.channel_gate(block.specific_norm(alone(block.experts, chosen, x)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_gate_at_its_ends_is_one_branch_and_between_them_both() -> None:
    """(A5), with the channel gate written again."""
    block, x = routed(), maps().float()
    u = block.invariant_norm(block.invariant(x))
    w = block.router(x)
    v = block.specific_norm(sum(w[:, e, None, None, None] * block.experts(x)[:, e] for e in range(4)))
    for gate, share in ((math.inf, 1.0), (-math.inf, 0.0), (0.5, 1 / (1 + math.exp(-0.5)))):
        nn.init.constant_(block.gate, gate)
        with block.switch.on([]):
            found = block(x)
        a = share * u + (1 - share) * v
        squeezed = F.relu(a.mean((2, 3)) @ block.channel_gate.squeeze.weight.T)
        s = torch.sigmoid(squeezed @ block.channel_gate.excite.weight.T)
        torch.testing.assert_close(found, a * s[:, :, None, None], rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="switch"):
        block(x)


def test_router_and_gates_are_exact_inside_autocast() -> None:
    router, gate, x = drawn(Router(WIDE, 4)).float(), drawn(ChannelGate(WIDE)).float(), maps().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x.bfloat16()), router(x.bfloat16().float()))
        assert router(x.bfloat16()).dtype == torch.float32
        assert gate(x.bfloat16()).dtype == torch.bfloat16


def test_a_network_of_other_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"backbone: .*; set backbone to one of: resnet50, resnet18, small"):
        acl(backbone="mobilenet_v2")


def test_blocks_are_replaced_where_the_stage_keeps_another_bottleneck_and_follow_it_otherwise() -> None:
    blocks = {}
    for name in ("small", "resnet18", "resnet50"):
        with torch.device("meta"):
            plain, method = build_backbone(name), acl(backbone=name)
        blocks[name] = [len(method.backbone.get_submodule(stage)) for stage in method.backbone.stages]
        kinds = {type(method.backbone.get_submodule(f"routed{s}").invariant) for s in (1, 2, 3, 4)}
        assert kinds == {Bottleneck if name == "resnet50" else BasicBlock}
        if name == "resnet50":
            # The specification: 29.62 M, 1.79 M of them routers, with a domain classifier and necks that nothing uses.
            assert sum(p.numel() for p in plain.parameters()) == 23_508_032
            assert sum(p.numel() for p in method.backbone.parameters()) == 29_567_552
            assert sum(p.numel() for p in method.parameter_groups()["routers"].parameters) == 1_740_800
            assert method.cost.test_forwards == pytest.approx(1.148, abs=1e-3)
            assert method.cost.train_passes == pytest.approx(1.533, abs=1e-3)
    assert blocks == {"small": [1, 1, 1, 1], "resnet18": [2, 2, 2, 2], "resnet50": [2, 3, 5, 2]}


def test_ibn_a_is_in_the_other_blocks_of_stages_one_to_three() -> None:
    method = acl(acl_backbone="ibn_a", acl_expert_norm="bn")
    found = [name for name, m in method.backbone.named_modules() if isinstance(m, SplitNorm2d)]
    assert found == ["layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn1"]
    assert not any(isinstance(m, SplitNorm2d) for m in acl(acl_expert_norm="bn").modules())
    assert sum(isinstance(m, InstanceSite) for m in acl(acl_expert_norm="bn").modules()) == 8


# --- (A6) to (A8) and the other losses -------------------------------------------------------------------------------


def one_hot_routing(choices: list[int], stages: int = 4, experts: int = 4) -> Tensor:
    return F.one_hot(torch.tensor(choices), experts).float().repeat(1, stages)


def slow_clusters(routing: Tensor, domains: Tensor, scalar: bool, m1: float, m2: float) -> tuple[float, float]:
    unit = [row / row.norm() for row in routing]
    centres, within = {}, []
    for domain in sorted(set(domains.tolist())):
        own = [r for r, d in zip(unit, domains.tolist(), strict=True) if d == domain]
        centre = sum(own) / len(own)
        centres[domain] = centre.mean() if scalar else centre
        terms = [max(0.0, math.sqrt(float(((r - centres[domain]) ** 2).sum())) - m1) ** 2 for r in own]
        within.append(sum(terms) / len(terms))
    between = [
        max(0.0, m2 - math.sqrt(float(((a - b) ** 2).sum()))) ** 2
        for a, b in itertools.combinations(centres.values(), 2)
    ]
    return sum(within) / len(within), sum(between) / len(between)


@pytest.mark.parametrize("centre", ["vector", "scalar"])
def test_cluster_losses_equal_slow_ones(centre: Any) -> None:
    random = torch.Generator().manual_seed(0)
    routing = (3.0 * torch.randn(9, 4, 4, generator=random)).softmax(2).flatten(1)
    domains = torch.tensor([0, 2, 2, 0, 3, 3, 3, 0, 2])
    found = cluster_losses(routing, domains, centre, 0.15, 0.9)
    expected = slow_clusters(routing, domains, centre == "scalar", 0.15, 0.9)
    assert [float(f) for f in found] == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 1e-3


def test_vector_centres_reach_both_minima_and_scalar_ones_do_not() -> None:
    """By hand, four stages of four experts: |r| = 1 for one-hot routing, r = 1/2 at four of 16 places."""
    domains = torch.tensor([0, 0, 1, 1, 2, 2])
    apart = one_hot_routing([0, 0, 1, 1, 2, 2])
    intra, inter = cluster_losses(apart, domains, "vector", 0.1, 0.3)
    assert (float(intra), float(inter)) == pytest.approx((0.0, 0.0), abs=1e-7), "equal within, orthogonal between"
    same = cluster_losses(one_hot_routing([1] * 6), domains, "vector", 0.1, 0.3)
    assert [float(loss) for loss in same] == pytest.approx([0.0, 0.09], abs=1e-6)

    # The number that a domain is compared with: 4 x 1/2 / 16 = 0.125, and uniform 16 x 1/4 / 16 = 0.25.
    intra, inter = cluster_losses(apart, domains, "scalar", 0.1, 0.3)
    distance = math.sqrt(4 * (0.5 - 0.125) ** 2 + 12 * 0.125**2)
    assert float(intra) == pytest.approx((distance - 0.1) ** 2, rel=1e-5)
    assert float(intra) == pytest.approx(0.587, abs=1e-3)
    assert float(inter) == pytest.approx(0.09, abs=1e-6), "one number cannot tell them apart"
    uniform = torch.full((6, 16), 0.25)
    assert float(cluster_losses(uniform, domains, "scalar", 0.1, 0.3)[0]) == pytest.approx(0.0, abs=1e-7)
    mixed = torch.cat([apart[:2], uniform[:2]])
    _, inter = cluster_losses(mixed, torch.tensor([0, 0, 1, 1]), "scalar", 0.1, 0.3)
    assert float(inter) == pytest.approx((0.3 - 0.125) ** 2, rel=1e-5), "the farthest that two domains can be"


@pytest.mark.parametrize("centre", ["vector", "scalar"])
@pytest.mark.parametrize("domains", [[1, 1, 1], [0, 1, 1]])
def test_gradients_are_finite_for_one_domain_and_for_equal_routing(centre: Any, domains: list[int]) -> None:
    routing = torch.full((3, 16), 0.25, requires_grad=True)
    intra, inter = cluster_losses(routing, torch.tensor(domains), centre, 0.0, 0.3)
    (intra + inter).backward()
    assert routing.grad is not None
    assert routing.grad.isfinite().all()
    assert inter.item() == pytest.approx(0.0 if len(set(domains)) == 1 else 0.09, abs=1e-6)


@pytest.mark.parametrize("domains", [[0, 0, 0, 1, 1, 1, 2, 2], [1] * 8])
def test_soft_triplet_equals_a_slow_loop(domains: list[int]) -> None:
    """The last two images are one identity, so that domain 2 has no other."""
    labels = torch.tensor([0, 0, 1, 2, 3, 3, 4, 4])
    features = F.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    terms = []
    for i in range(8):
        farthest = [math.dist(features[i], features[j]) for j in range(8) if domains[j] != domains[i] or i == j]
        nearest = [
            math.dist(features[i], features[j]) for j in range(8) if domains[j] == domains[i] and labels[j] != labels[i]
        ]
        terms.append(math.log1p(math.exp(max(farthest) - min(nearest))) if nearest else 0.0)
    found = shuffle_loss(features, labels, torch.tensor(domains), itself=True)
    assert float(found) == pytest.approx(sum(terms) / 8, rel=1e-5)


def test_experts_in_use() -> None:
    assert float(experts_in_use(one_hot_routing([0, 3, 1]), 4)) == pytest.approx(1.0)
    assert float(experts_in_use(torch.full((2, 16), 0.25), 4)) == pytest.approx(4.0)


# --- the step --------------------------------------------------------------------------------------------------------


class Slow(NamedTuple):
    """A pass of a method by its own weights, written again."""

    f: Tensor
    u: Tensor
    routing: Tensor


def slow_pass(method: ACL, batch: Batch) -> Slow:
    seen: list[Tensor] = []
    with method.switch.on(seen):
        f = method.neck(gem(method.backbone(batch.images), 3.0))
    return Slow(f, f / f.norm(dim=1, keepdim=True), torch.cat(seen, 1))


def slow_triplet(u: Tensor, labels: Tensor, margin: float) -> Tensor:
    terms = []
    for i in range(len(u)):
        to = [(u[i] - u[j]).square().sum().clamp_min(1e-12).sqrt() for j in range(len(u))]
        same = [to[j] for j in range(len(u)) if labels[j] == labels[i]]
        other = [to[j] for j in range(len(u)) if labels[j] != labels[i]]
        terms.append((torch.stack(same).max() - torch.stack(other).min() + margin).clamp_min(0))
    return torch.stack(terms).mean()


def joint(batch: Batch) -> Tensor:
    return batch.labels + OFFSETS[batch.domains]


def slow_clusters_of(method: ACL, seen: Slow, batch: Batch) -> Tensor:
    s = method.settings
    return sum(cluster_losses(seen.routing, batch.domains, s.acl_centre, s.acl_intra_margin, s.acl_inter_margin))


def slow_meta_train(method: ACL, batch: Batch) -> Tensor:
    """(A10)."""
    seen, s = slow_pass(method, batch), method.settings
    scatter = []
    for domain in set(batch.domains.tolist()):
        own = seen.u[batch.domains == domain]
        scatter.append(F.cosine_similarity(own, own.mean(0, keepdim=True)).mean())
    loss = shuffle_loss(seen.u, joint(batch), batch.domains, itself=True) + torch.stack(scatter).mean()
    loss = loss + s.triplet_weight * slow_triplet(seen.u, joint(batch), s.triplet_margin)
    return loss + s.acl_cluster_weight * slow_clusters_of(method, seen, batch)


def slow_held_out(method: ACL, batch: Batch) -> Tensor:
    """(A12)."""
    seen, s = slow_pass(method, batch), method.settings
    centre = torch.stack([(f - method.centres[y]).square().sum() for f, y in zip(seen.f, joint(batch), strict=True)])
    loss = s.triplet_weight * slow_triplet(seen.u, joint(batch), s.triplet_margin)
    return loss + 2 * s.acl_centre_weight * centre.mean() + s.acl_cluster_weight * slow_clusters_of(method, seen, batch)


def gradients(method: ACL) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


CHANGES: dict[str, Any] = {
    "acl_intra_margin": 0.0,  # at the start, routing is close to uniform
    "acl_cluster_weight": 3.0,
    "acl_centre_weight": 1e-3,
    "triplet_weight": 0.7,
}


def test_basic_loss_is_what_its_equation_says() -> None:
    method = acl(acl_ce_weight=0.3, **CHANGES)
    slow, batch = copy.deepcopy(method), mixed_batch()
    losses = method.training_losses(batch, 0)
    seen, s = slow_pass(slow, batch), slow.settings
    terms = []
    for domain in range(3):
        own = batch.domains == domain
        logits = seen.f[own] @ slow.classifiers[domain].weight.T
        terms.append(F.cross_entropy(logits, batch.labels[own], label_smoothing=0.1))
    centre = torch.stack([(f - slow.centres[y]).square().sum() for f, y in zip(seen.f, joint(batch), strict=True)])
    expected = 0.3 * sum(terms) / 3 + 0.7 * slow_triplet(seen.u, joint(batch), s.triplet_margin) + 1e-3 * centre.mean()
    expected = expected + 3.0 * slow_clusters_of(slow, seen, batch)
    assert losses["loss/total"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["loss/intra"].item() > 0
    assert losses["loss/inter"].item() > 0


def test_cross_entropy_is_a_mean_over_domains_not_over_images() -> None:
    batch = mixed_batch()
    fewer = Batch(batch.images[:10], batch.labels[:10], batch.domains[:10])
    method = acl()
    seen = method.passed(fewer, {})
    alone = [method.identity_term(_part(seen, fewer.domains == domain)) for domain in range(3)]
    assert method.identity_term(seen).item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-6)


def _part(seen: Any, chosen: Tensor) -> Any:
    return seen._replace(features=seen.features[chosen], labels=seen.labels[chosen], domains=seen.domains[chosen])


@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.02])
def test_meta_step_equals_deep_copies(rate: float) -> None:
    """Value and gradient of (A10) to (A13) with theta' in a copy of the network; without a rate, the plain gradient."""
    method = acl(acl_meta_rate=max(rate, 1e-12), learning_rate=2e-3, **CHANGES)
    here, there, batch = copy.deepcopy(method), copy.deepcopy(method), mixed_batch()
    others, held_out = split_by_domain(batch, draw_held_out(batch.domains, method.setup.seed, DUE))
    losses = method.meta_losses(batch, DUE)
    losses["loss/total"].backward()

    slow_meta_train(here, others).backward()
    g = gradients(here)
    with torch.no_grad():
        for name, p in there.named_parameters():
            if name in g:
                thin = ".invariant." in name or ".experts." in name
                p.sub_(g[name], alpha=rate * (0.5 if thin else 1.0))
    judged = slow_held_out(there, held_out)
    judged.backward()
    scale = max(rate, 1e-12) / 2e-3
    value = slow_meta_train(copy.deepcopy(here), others) + judged
    assert losses["loss/total"].item() / scale == pytest.approx(value.item(), rel=1e-5)
    of_there, found = gradients(there), gradients(method)
    assert set(found) == set(g) | set(of_there)
    for name, gradient in found.items():
        expected = sum(part[name] for part in (g, of_there) if name in part)
        allowed = 2e-3 * float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(gradient / scale, expected, rtol=2e-3, atol=allowed, msg=name)


@pytest.mark.slow
def test_held_out_loss_is_judged_after_the_virtual_step() -> None:
    """The rate changes what is judged, and half a rate on the blocks is not the whole one."""
    batch = mixed_batch()

    def judged(method: ACL) -> float:
        return method.meta_losses(batch, DUE)["loss/held_out_centre"].item()

    near, far, late = acl(acl_meta_rate=1e-6), acl(acl_meta_rate=0.1), acl(milestones=(1,), steps_per_epoch=1)
    assert judged(near) != pytest.approx(judged(far), rel=1e-4)
    same = acl(acl_meta_rate=0.004, milestones=())
    assert judged(late) == pytest.approx(judged(same), rel=1e-5), "a tenth of 0.04 behind a milestone"


@pytest.mark.slow
def test_gradient_equals_finite_differences_along_itself() -> None:
    """d/dt of L_tr(theta + t d) + L_te(theta + t d - alpha g) with g held."""
    method = acl(acl_meta_rate=0.01, learning_rate=0.01, **CHANGES)
    batch = mixed_batch(2)
    others, held_out = split_by_domain(batch, draw_held_out(batch.domains, method.setup.seed, DUE))
    method.meta_losses(batch, DUE)["loss/total"].backward()
    direction = gradients(method)
    method.zero_grad(set_to_none=True)
    exact = copy.deepcopy(method)
    slow_meta_train(exact, others).backward()
    g = gradients(exact)
    norm = float(torch.stack([d.square().sum() for d in direction.values()]).sum().sqrt())

    def at(t: float) -> float:
        def moved(virtual: float) -> ACL:
            copied = copy.deepcopy(method)
            with torch.no_grad():
                for name, p in copied.named_parameters():
                    if name in direction:
                        p.add_(direction[name] / norm, alpha=t)
                    if name in g:
                        half = 0.5 if ".invariant." in name or ".experts." in name else 1.0
                        p.sub_(g[name], alpha=virtual * half)
            return copied

        with torch.no_grad():
            return float(slow_meta_train(moved(0.0), others) + slow_held_out(moved(0.01), held_out))

    width = 1e-4  # the hardest images change along the way, and single precision has no room for less
    assert (at(width) - at(-width)) / (2 * width) == pytest.approx(norm, rel=0.03)


@pytest.mark.parametrize("params", ["all", "router"])
def test_meta_step_comes_first_moves_its_group_and_no_running_statistics(params: str) -> None:
    method = acl(acl_meta_params=params)
    before = copy.deepcopy(method.state_dict())
    updates = Updates(method)
    losses = method.train_step(mixed_batch(), DUE, updates)
    meta, basic = updates.calls
    assert (meta.groups, meta.rule) == (("main", "routers") if params == "all" else ("routers",), "plain_sgd")
    assert (basic.groups, basic.rule) == (("main", "routers"), "optimiser")
    assert all(torch.equal(value, before[name]) for name, value in meta.running.items() if name in before)
    assert not torch.equal(method.backbone.bn1.running_mean, before["backbone.bn1.running_mean"])
    assert int(method.neck.num_batches_tracked) == 1
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(meta.gradients)
    routers = {name for name, _ in method.named_parameters() if ".router." in name}
    assert len(routers) == 8
    assert moved == routers if params == "router" else moved > routers
    assert params == "router" or {"centres", "neck.weight", "backbone.conv1.weight"} <= moved
    assert not any(name.startswith("classifiers") for name in moved), "no cross-entropy in a meta step"
    assert losses["loss/total"] is basic.losses["loss/total"]


def test_router_gradient_is_that_of_all() -> None:
    found = []
    for params in ("all", "router"):
        method = acl(acl_meta_params=params)
        updates = Updates(method)
        method.train_step(mixed_batch(), DUE, updates)
        found.append(updates.calls[0].gradients)
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name], rtol=1e-4, atol=1e-7)


def test_plain_step_has_the_size_that_was_asked_for() -> None:
    """(A13): eta times the gradient, whatever the optimiser's rate, which the trainer puts into the plain step."""
    moved = []
    for rate in (1e-3, 1e-2):
        method = acl(learning_rate=rate, acl_meta_rate=0.02)
        before = method.backbone.get_submodule("routed2").gate.detach().clone()
        method.train_step(mixed_batch(), DUE, Updates(method, rate))
        moved.append(method.backbone.get_submodule("routed2").gate.detach() - before)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-8)
    assert moved[0].abs().max() > 0


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [0, 1, 2, 3, 4, 5]), (3, [2, 5]), (4, [3])])
def test_meta_steps_are_every_so_many(every: int, due: list[int]) -> None:
    method, found = acl(acl_meta_every=every), []
    method.training_losses = lambda batch, step: {"loss/total": method.gate_of_nothing}  # type: ignore[assignment]
    method.meta_losses = lambda batch, step: found.append(step) or {}  # type: ignore[assignment, func-returns-value]
    method.gate_of_nothing = torch.zeros(())  # type: ignore[assignment]
    for step in range(6):
        method.train_step(mixed_batch(), step, lambda *_, **__: None)
    assert found == due


def test_every_source_is_held_out_at_some_step_and_two_sources_are_enough() -> None:
    images = mixed_batch()
    two = Batch(images.images[:8], images.labels[:8], images.domains[:8])
    method = build("acl", (5, 7), warmup_epochs=0)
    assert isinstance(method, ACL)
    losses = method.meta_losses(two, DUE)
    losses["loss/total"].backward()
    assert all(g.isfinite().all() for g in gradients(method).values())
    assert losses["loss/meta_inter"].item() == 0.0
    assert losses["loss/meta_shuffle"].item() > 0.0


def test_a_held_out_part_of_one_identity_has_no_triplets() -> None:
    batch = mixed_batch()
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 8, 9])
    few = Batch(batch.images[kept], batch.labels[kept], batch.domains[kept])
    method, found = acl(), {}
    for step in range(8):
        losses = method.meta_losses(few, step)
        losses["loss/total"].backward()
        assert all(g.isfinite().all() for g in gradients(method).values())
        found[draw_held_out(few.domains, 0, step)[0]] = losses["loss/held_out_triplet"].item()
    assert set(found) == {0, 1, 2}
    assert found[0] > 0
    assert found[1] == found[2] == 0.0


@pytest.fixture(scope="module")
def basic_loss() -> float:
    """With the default settings."""
    return float(acl().training_losses(mixed_batch(), 0)["loss/total"].detach())


@pytest.mark.parametrize(
    "changes",
    [
        {"acl_experts": 2},
        {"acl_expert_norm": "bn"},
        {"acl_backbone": "ibn_a"},
        {"acl_centre": "scalar"},
        {"acl_intra_margin": 0.0},
        {"acl_inter_margin": 1.0},
        {"acl_cluster_weight": 2.0},
        {"acl_centre_weight": 1e-3},
        {"acl_ce_weight": 1.0},
    ],
)
def test_settings_have_an_effect_on_the_basic_loss(changes: dict[str, Any], basic_loss: float) -> None:
    assert acl(**changes).training_losses(mixed_batch(), 0)["loss/total"].item() != pytest.approx(basic_loss, rel=1e-6)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_features_are_behind_the_neck_and_of_length_one() -> None:
    method, batch = acl(), mixed_batch()
    with torch.no_grad():
        method.neck.weight.uniform_(0.5, 2.0)
        method.neck.running_mean.fill_(0.3)
        method.eval()
        found = method(batch.images)
        f = method.neck(gem(method.backbone(batch.images), 3.0))
    torch.testing.assert_close(found, f / f.norm(dim=1, keepdim=True))
    assert not method.neck.bias.requires_grad


def narrow_bottlenecks() -> Backbone:
    """Two stages of one and two bottlenecks."""
    stem = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
    shortcut = nn.Sequential(nn.Conv2d(32, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64))
    second = nn.Sequential(Bottleneck(32, 16, 2, shortcut), Bottleneck(64, 16))
    parts = [("conv1", stem), ("bn1", nn.BatchNorm2d(32)), ("layer1", nn.Sequential(Bottleneck(32, 8)))]
    return Backbone([*parts, ("layer2", second)], 64)


@pytest.mark.parametrize("params", ["all", "router"])
def test_declared_cost_of_a_bottleneck_network_is_what_is_counted(params: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage is followed by its block, in the other one it takes a place; with one meta step of three."""
    monkeypatch.setattr("lda.methods.acl.backbone_of", lambda setup: narrow_bottlenecks())
    method, plain, batch = acl(acl_meta_params=params), narrow_bottlenecks(), mixed_batch()
    assert [len(method.backbone.get_submodule(stage)) for stage in ("layer1", "layer2")] == [1, 1]
    with convolutions_counted() as of_plain:
        plain(batch.images)
    with convolutions_counted() as of_stem:
        plain.conv1(batch.images)
    with convolutions_counted() as basic:
        method.train_step(batch, 0, Updates(method))
    with convolutions_counted() as both:
        method.train_step(batch, DUE, Updates(method))
    with convolutions_counted() as test, torch.no_grad():
        method.eval()(batch.images)
    passes = (2 * basic() + both()) / 3 / (3 * of_plain() - of_stem())
    assert passes == pytest.approx(method.cost.train_passes, rel=1e-3)
    assert test() / of_plain() == pytest.approx(method.cost.test_forwards, rel=1e-3)


def test_recomputation_is_refused_with_meta_steps_only_and_one_pixel_always() -> None:
    with pytest.raises(UsageError, match="activation_checkpointing: ACL"):
        acl(activation_checkpointing=True)
    batch = mixed_batch()
    recomputing = acl(activation_checkpointing=True, acl_meta_every=0)
    plain = acl(acl_meta_every=0)
    for method in (recomputing, plain):
        method.training_losses(batch, 0)["loss/total"].backward()
    of_plain = gradients(plain)
    assert all(torch.equal(gradient, of_plain[name]) for name, gradient in gradients(recomputing).items())
    with pytest.raises(UsageError, match="image_height, image_width"), torch.no_grad():
        plain.eval()(torch.zeros(1, 3, 8, 8))


def test_one_source_is_refused() -> None:
    with pytest.raises(UsageError, match="2 or more source domains"):
        build("acl", (5,))


def test_statistics_held_reaches_every_norm_of_the_blocks() -> None:
    method = acl()
    before = copy.deepcopy(method.state_dict())
    with statistics_held(method):
        method.training_losses(mixed_batch(), 0)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    method.training_losses(mixed_batch(), 0)
    moved = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert {"backbone.routed1.specific_norm.running_mean", "backbone.routed4.experts.norms.1.running_var"} <= moved
