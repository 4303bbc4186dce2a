"""META: experts against each other, the mixture against loops, what learns from what, the two readings of its test."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import NUM_IDS, build, mixed_batch, shaken
from torch import Tensor, nn

from lda.batch import Batch
from lda.errors import UsageError
from lda.methods.base import Losses
from lda.methods.meta import META, GlobalBranch, aggregator, mixture
from lda.parts.backbones import build_backbone
from lda.parts.domain_norm import DomainBatchNorm2d, OneSet, site_distances, use_domain_norm
from lda.parts.heads import gem
from lda.parts.instance_sites import InstanceSite
from lda.parts.losses import batch_hard_triplet_loss, identity_loss
from lda.trainer import build_optimizer


def meta(**changes: Any) -> META:
    method = build("meta", **changes)
    assert isinstance(method, META)
    return method


def pure_batch(domain: int, seed: int = 0) -> Batch:
    batch = mixed_batch(seed)
    rows = (batch.domains == domain).nonzero()[:, 0]
    return Batch(batch.images[rows], batch.labels[rows], batch.domains[rows])


def apart(method: META, seed: int = 5) -> META:
    """The method with sets and aggregators that differ."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in method.modules():
            if isinstance(layer, DomainBatchNorm2d):
                for norm in layer.sets:
                    norm.running_mean.add_(0.2 * torch.randn(norm.running_mean.shape, generator=random))
                    norm.running_var.mul_(0.5 + torch.rand(norm.running_var.shape, generator=random))
        for parameter in method.aggregators.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return method


class Steps:
    """The trainer's update, with its optimiser."""

    def __init__(self, method: META, **schedule: Any) -> None:
        self.method = method
        self.optimizer = build_optimizer(method.setup.schedule, method.parameter_groups())

    def __call__(self, losses: Losses, groups: tuple[str, ...] = ("main",), rule: str = "optimiser") -> None:
        self.optimizer.zero_grad(set_to_none=True)
        chosen = [group for group in self.optimizer.param_groups if group["name"] in groups]
        losses["loss/total"].backward(inputs=[p for group in chosen for p in group["params"]])
        self.optimizer.step()


def state(method: META) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items()}


# --- experts ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_equal_sets_are_one_expert_whatever_the_weights() -> None:
    method, images = shaken(meta()).eval(), mixed_batch().images
    for layer in method.modules():
        if isinstance(layer, DomainBatchNorm2d):
            for norm in layer.sets:
                norm.load_state_dict(layer.sets[0].state_dict())
    maps = [method.expert(images, domain)[0] for domain in range(3)]
    assert all(torch.equal(of_expert, maps[0]) for of_expert in maps)
    weights = torch.rand(12, 3).softmax(1)
    torch.testing.assert_close(mixture(weights, maps), maps[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_step_on_a_domain_leaves_the_sets_and_heads_of_others_to_the_bit(optimizer: str) -> None:
    """After steps on domains 1 and 2 too, so that there is momentum that could move them."""
    method = meta(optimizer=optimizer, weight_decay=0.1)
    update = Steps(method)
    for step in range(6):
        method.train_step(pure_batch(step % 3, step), step, update)
    before = state(method)
    method.train_step(pure_batch(0, 9), 9, update)
    theirs = (".sets.1.", ".sets.2.", "head.necks.1", "head.necks.2", "head.classifiers.1", "head.classifiers.2")
    checked = 0
    for name, value in method.state_dict().items():
        if any(part in f".{name}" for part in theirs):
            assert torch.equal(value, before[name]), name
            checked += 1
    assert checked > 100
    changed = [name for name, value in method.state_dict().items() if not torch.equal(value, before[name])]
    for part in (".sets.0.", ".sets.3.", "head.necks.0", "head.classifiers.0", "head_global", "branch", "conv1.weight"):
        assert any(part in name for name in changed), part
    assert not any("aggregators.0." in name for name in changed), "no image of domain 0 has expert 0 in its mixture"
    assert any("aggregators.1." in name for name in changed)


def test_foreign_experts_without_gradient_are_detached_ones() -> None:
    """(M1) and (M5): the gradients of a step equal those with foreign maps computed with a graph and detached."""
    method, batch = apart(shaken(meta())), pure_batch(1)
    other = copy.deepcopy(method)
    original = META.expert

    def with_graph(self: META, images: Tensor, domain: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            maps = self._maps(images, OneSet(domain, running=True))
        return maps.detach(), original(self, images, domain)[1]

    method.training_losses(batch, 0)["loss/total"].backward()
    other.expert = with_graph.__get__(other)
    other.training_losses(batch, 0)["loss/total"].backward()
    theirs = dict(other.named_parameters())
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None), name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, theirs[name].grad), name


def test_foreign_experts_leave_no_trace() -> None:
    method = apart(meta())
    before = state(method)
    method.expert(mixed_batch().images, 2)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


# --- (M3) and (M4) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["sqrt_c", "raw"])
@torch.no_grad()
def test_distances_equal_loops(scale: str) -> None:
    method, images = apart(shaken(meta(meta_relevance_scale=scale))), mixed_batch().images[:3]
    entered: list[Tensor] = []
    layers = [m for m in method.backbone.modules() if isinstance(m, DomainBatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(lambda m, inputs: entered.append(inputs[0])) for layer in layers]
    _, found = method.expert(images, 1)
    for hook in hooks:
        hook.remove()
    assert found.shape == (3, len(entered)) == (3, 12)
    order = [m for m in method.backbone.modules() if isinstance(m, DomainBatchNorm2d)]
    by_input = {id(x): layer for x, layer in zip(entered, _in_order(method, images), strict=True)}
    for place, x in enumerate(entered):
        norm, channels = by_input[id(x)].sets[1], x.shape[1]
        for i in range(3):
            total = 0.0
            for c in range(channels):
                values = x[i, c].flatten()
                total += float(norm.running_mean[c] - values.mean()) ** 2
                total += float(norm.running_var[c].sqrt() - values.std(correction=1)) ** 2
            expected = (total if scale == "raw" else total / channels) ** 0.5
            assert float(found[i, place]) == pytest.approx(expected, rel=1e-3)
    assert len(order) == 12


def _in_order(method: META, images: Tensor) -> list[DomainBatchNorm2d]:
    """The layers in the order of a pass."""
    seen: list[DomainBatchNorm2d] = []
    layers = [m for m in method.backbone.modules() if isinstance(m, DomainBatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(lambda m, inputs: seen.append(m)) for layer in layers]
    method.expert(images, 1)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_weights_sum_to_one_and_begin_uniform() -> None:
    method = meta()
    distances = [torch.rand(5, 12, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    torch.testing.assert_close(method.test_weights(distances), torch.full((5, 3), 1 / 3))
    trained = apart(method)
    weights = trained.test_weights(distances)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert not torch.allclose(weights, torch.full((5, 3), 1 / 3), atol=1e-3)
    torch.testing.assert_close(trained.learned_weights([2], distances[2:]), torch.ones(5, 1))
    by_hand = torch.cat([trained.aggregators[j](distances[j]) for j in (0, 2)], 1).softmax(1)
    torch.testing.assert_close(trained.learned_weights([0, 2], [distances[0], distances[2]]), by_hand)


def test_near_and_far_are_mirror_images() -> None:
    """For two experts a_near + a_far = 1 for each; the release's `far` takes the farthest."""
    near, far = (
        build("meta", (5, 7), meta_test_weights="distance", meta_relevance_sign=sign) for sign in ("near", "far")
    )
    assert isinstance(near, META)
    assert isinstance(far, META)
    distances = [torch.rand(4, 12), torch.rand(4, 12) + 0.5]
    torch.testing.assert_close(near.test_weights(distances) + far.test_weights(distances), torch.ones(4, 2))
    assert bool((near.test_weights(distances)[:, 0] > 0.5).all())
    assert bool((far.test_weights(distances)[:, 0] < 0.5).all())
    assert (near.inference, far.inference, meta().inference) == ("distance near", "distance far", "learned")


def test_an_aggregator_is_linear_and_its_start_gives_uniform_weights_with_a_gradient() -> None:
    zero, kaiming = aggregator(12, "zero"), aggregator(12, "kaiming")
    a, b = torch.rand(4, 12), torch.rand(4, 12)
    assert torch.equal(zero(a), torch.zeros(4, 1))
    torch.testing.assert_close(kaiming(a + b), kaiming(a) + kaiming(b), rtol=1e-3, atol=1e-4)
    zero(a).sum().backward()
    assert zero[1].weight.grad is not None
    assert bool((zero[1].weight.grad != 0).any())


# --- (M5) to (M7) ----------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_equations() -> None:
    changes = {"meta_consistency_weight": 0.7, "triplet_weight": 0.6, "label_smoothing": 0.2}
    method, batch = apart(shaken(meta(**changes))), pure_batch(1)
    other = copy.deepcopy(method)
    losses = method.training_losses(batch, 0)
    with other.switch.on(OneSet(1)):
        own = gem(other.backbone(batch.images), 3.0)
    with torch.no_grad():
        theirs = {j: other.expert(batch.images, j) for j in (0, 2)}
    logits = torch.cat([other.aggregators[j](theirs[j][1]) for j in (0, 2)], 1)
    a = logits.softmax(1)
    mixed = gem(sum(a[:, n, None, None, None] * theirs[j][0] for n, j in enumerate((0, 2))), 3.0)
    with other.switch.on(OneSet(3)):
        steps = dict(other.backbone.steps())
        x = batch.images
        for name in other.branch.shared:
            x = steps[name](x)
    for step in other.branch.own:
        x = step(x)
    beside = gem(x, 3.0)
    joint = batch.labels + NUM_IDS[0]
    expected = {
        "loss/id": identity_loss(other.head(own, 1), batch.labels, 0.2),
        "loss/triplet": batch_hard_triplet_loss(own, batch.labels, 0.3),
        "loss/id_global": identity_loss(other.head_global(beside, 0), joint, 0.2),
        "loss/triplet_global": batch_hard_triplet_loss(beside, joint, 0.3),
        "loss/consistency": _slow_consistency(mixed, own.detach(), batch.labels),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-3, atol=1e-4, msg=name)
    weights = {"id": 1, "triplet": 0.6, "id_global": 1, "triplet_global": 0.6, "consistency": 0.7}
    total = sum(weight * losses[f"loss/{name}"] for name, weight in weights.items())
    torch.testing.assert_close(losses["loss/total"], total)


def _slow_consistency(mixed: Tensor, own: Tensor, labels: Tensor) -> Tensor:
    """(M6) with loops."""
    count, farther, nearer = len(labels), [], []
    for i in range(count):
        same = [j for j in range(count) if labels[j] == labels[i]]
        rest = [j for j in range(count) if labels[j] != labels[i]]
        far = [max((z[i] - z[j]).norm() for j in same) for z in (mixed, own)]
        near = [min((z[i] - z[j]).norm() for j in rest) for z in (mixed, own)]
        farther.append((far[0] - far[1]).clamp_min(0))
        nearer.append((near[1] - near[0]).clamp_min(0))
    return torch.stack(farther).mean() + torch.stack(nearer).mean()


def test_the_consistency_loss_trains_the_aggregators_and_nothing_else() -> None:
    method = apart(shaken(meta()))
    losses = method.training_losses(pure_batch(0), 0)
    losses["loss/consistency"].backward()
    moved = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"aggregators"}


def test_without_consistency_no_foreign_expert_is_asked() -> None:
    method = meta(meta_consistency_weight=0.0, meta_test_weights="uniform")
    assert method.cost.train_passes == 2
    assert meta().cost.train_passes == pytest.approx(2 + 2 / 3)
    assert "loss/consistency" not in method.training_losses(pure_batch(0), 0)


# --- (M2): the global branch -----------------------------------------------------------------------------------------


def test_the_branch_shares_the_trunks_first_convolutions_and_nothing_else() -> None:
    """Up to and with the first block of stage 3; IN in stage 4; no other memory is shared, on a CPU neither."""
    method = meta(backbone="resnet18")
    assert method.branch.shared[-1] == "layer3.0"
    assert method.branch.names == ["layer3.1", "layer4.0", "layer4.1"]
    tensors = {name: value for name, value in method.state_dict(keep_vars=True).items() if value.numel() > 1}
    storages = [value.untyped_storage().data_ptr() for value in tensors.values()]
    assert len(storages) == len(set(storages)), "two names, one memory"
    norms = [type(m) for m in method.branch.own.modules() if isinstance(m, InstanceSite | torch.nn.BatchNorm2d)]
    assert norms.count(InstanceSite) == 5
    assert norms.count(torch.nn.BatchNorm2d) == 2
    layers = [m for m in method.backbone.modules() if isinstance(m, DomainBatchNorm2d)]
    beside = [len(layer.sets) for layer in layers]
    assert beside.count(4) == 13, "stem, stages 1 and 2, and the first block of stage 3 with its shortcut"
    assert beside.count(3) == len(layers) - 13


def test_the_branch_keeps_statistics_in_its_own_set() -> None:
    method = meta()
    before = state(method)
    method.branch(mixed_batch().images, method.backbone, method.switch, 3)
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".sets.3." in name for name in changed), "stage 4 has IN, which keeps none"


# --- freezing, test, refusals ----------------------------------------------------------------------------------------


def test_the_trunk_is_frozen_for_so_many_steps() -> None:
    method = meta(meta_freeze_steps=2)
    update, before = Steps(method), state(method)
    for step in range(2):
        method.train_step(pure_batch(step, step), step, update)
    trunk = {f"backbone.{n}.weight" for n, m in method.backbone.named_modules() if isinstance(m, torch.nn.Conv2d)}
    now = method.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in trunk)
    assert not torch.equal(now["branch.own.0.conv1.weight"], before["branch.own.0.conv1.weight"])
    method.train_step(pure_batch(2, 2), 2, update)
    assert not any(torch.equal(method.state_dict()[name], before[name]) for name in trunk)


@pytest.mark.parametrize(
    "changes",
    [{}, {"meta_test_weights": "uniform"}, {"meta_test_weights": "distance"},
     {"meta_test_weights": "distance", "meta_relevance_sign": "far"}],
)  # fmt: skip
@torch.no_grad()
def test_features_are_mixture_and_branch_side_by_side(changes: dict[str, str]) -> None:
    method, images = apart(shaken(meta(**changes))).eval(), mixed_batch(3).images[:4]
    found = [method.expert(images, j) for j in range(3)]
    distance = torch.stack([w.sum(1) for _, w in found], 1)
    weights = {
        "learned": torch.cat([method.aggregators[j](found[j][1]) for j in range(3)], 1).softmax(1),
        "uniform": torch.full((4, 3), 1 / 3),
        "distance near": (-distance).softmax(1),
        "distance far": distance.softmax(1),
    }[method.inference]
    mixed = gem(sum(weights[:, j, None, None, None] * found[j][0] for j in range(3)), 3.0) / (1 + 1e-5) ** 0.5
    beside = gem(method.branch(images, method.backbone, method.switch, 3), 3.0)
    joined = torch.cat([mixed, method.head_global.necks[0](beside)], 1)
    assert joined.shape[1] == 2 * method.backbone.channels
    torch.testing.assert_close(method(images), F.normalize(joined), rtol=1e-3, atol=1e-5)


def test_settings_that_would_say_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="meta_relevance_sign: far says nothing with meta_test_weights=learned; set"):
        meta(meta_relevance_sign="far")
    with pytest.raises(UsageError, match="meta_consistency_weight: at 0 nothing trains the aggregators"):
        meta(meta_consistency_weight=0.0)
    with pytest.raises(UsageError, match="source domain"):
        build("meta", (5,))


# --- what is easily got wrong ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("raw", [True, False])
def test_distance_is_zero_where_an_image_has_the_experts_statistics(raw: bool) -> None:
    method = apart(meta())
    layer = method.backbone.get_submodule("layer2.0.bn1")
    assert isinstance(layer, DomainBatchNorm2d)
    norm = layer.norm(2)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = torch.randn(2, norm.num_features, 4, 3, generator=torch.Generator().manual_seed(0))
    var, mean = torch.var_mean(x[1], dim=(1, 2), keepdim=True)
    x[1] = (x[1] - mean) * (norm.running_var[:, None, None] / var).sqrt() + norm.running_mean[:, None, None]
    with method.switch.on(OneSet(2)), site_distances(layer, raw) as found:
        layer(x)
    assert found[0][1] < 1e-5 < 0.1 < found[0][0]
    one_pixel = torch.zeros(2, norm.num_features, 1, 1)
    with method.switch.on(OneSet(2, running=True)), site_distances(layer), pytest.raises(UsageError, match="image_hei"):
        layer(one_pixel)


@torch.no_grad()
def test_consistency_is_zero_where_the_mixture_is_the_own_map() -> None:
    """Every set holds the statistics by which this very batch is normalised, so every expert is the own one."""
    method, batch = meta(), pure_batch(0)

    def fit(layer: DomainBatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        for norm in layer.sets:
            norm.running_mean.copy_(mean)  # type: ignore[operator, union-attr]
            norm.running_var.copy_(var)  # type: ignore[operator, union-attr]

    before = method.training_losses(batch, 0)["loss/consistency"]
    hooks = [m.register_forward_pre_hook(fit) for m in method.backbone.modules() if isinstance(m, DomainBatchNorm2d)]
    method.expert(batch.images, 0)
    for hook in hooks:
        hook.remove()
    assert float(method.training_losses(batch, 0)["loss/consistency"]) < 1e-3 < 0.1 < float(before)


def test_two_sources_mix_the_other_expert_and_train_no_aggregator() -> None:
    method = build("meta", (5, 7))
    losses = method.training_losses(pure_batch(0), 0)
    assert float(losses["weights/largest"]) == 1.0
    losses["loss/total"].backward()
    assert isinstance(method, META)
    assert all(p.grad is not None and not p.grad.any() for p in method.aggregators[1].parameters())
    with pytest.raises(UsageError, match=r"meta_aggregator_init: .* random; set meta_aggregator_init=zero"):
        build("meta", (5, 7), meta_aggregator_init="kaiming")
    build("meta", (5, 7), meta_aggregator_init="kaiming", meta_test_weights="distance")


def test_the_releases_start_has_logits_of_twice_the_length_of_the_distances() -> None:
    torch.manual_seed(0)
    logits = torch.cat([aggregator(53, "kaiming")(torch.ones(1, 53)) for _ in range(200)])
    assert float(logits.detach().std()) == pytest.approx(2 * 53**0.5, rel=0.2)


@pytest.mark.parametrize(("num_domains", "millions"), [(3, 44.26), (4, 44.35)])
def test_parameters_of_a_resnet50(num_domains: int, millions: float) -> None:
    with torch.device("meta"):
        backbone = build_backbone("resnet50")
        branch = GlobalBranch(backbone)
        steps = dict(backbone.steps())
        use_domain_norm(backbone, num_domains, one_beside=[steps[name] for name in branch.shared])
        aggregators = nn.ModuleList(aggregator(53, "zero") for _ in range(num_domains))
    layers = [m for m in backbone.modules() if isinstance(m, DomainBatchNorm2d)]
    assert [len(layer.sets) for layer in layers].count(num_domains + 1) == 28
    assert sum(p.numel() for p in branch.parameters()) == pytest.approx(20.55e6, abs=5e3)
    assert sum(p.numel() for p in aggregators.parameters()) == num_domains * 28_161
    total = sum(p.numel() for part in (backbone, branch, aggregators) for p in part.parameters())
    assert total / 1e6 == pytest.approx(millions, abs=0.005)
