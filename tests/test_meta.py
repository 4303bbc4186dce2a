"""META: the experts, the distances, the mixture and what each loss reaches, against passes and loops by hand."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import NUM_IDS, build
from torch import Tensor, nn

from lda.batch import Batch
from lda.errors import UsageError
from lda.groups import Schedule
from lda.methods.base import Losses
from lda.methods.meta import META, GlobalBranch, aggregator, mixture
from lda.parts.backbones import build_backbone
from lda.parts.domain_norm import DomainBatchNorm2d, OneSet, site_distances, use_domain_norm
from lda.parts.heads import gem
from lda.parts.instance_sites import InstanceSite
from lda.parts.losses import batch_hard_triplet_loss, identity_loss, relation_loss
from lda.trainer import build_optimizer

SITES = 12


def meta(num_ids: tuple[int, ...] = NUM_IDS, **changes: Any) -> META:
    method = build("meta", num_ids, **changes)
    assert isinstance(method, META)
    return method


def batch_of(domain: int, seed: int = 0) -> Batch:
    """Six images, two of each of three identities, of one domain."""
    images = torch.randn(6, 3, 32, 16, generator=torch.Generator().manual_seed(seed))
    return Batch(images, torch.tensor([0, 0, 2, 2, 3, 3]), torch.full((6,), domain))


def layers(method: META) -> list[DomainBatchNorm2d]:
    return [module for module in method.backbone.modules() if isinstance(module, DomainBatchNorm2d)]


@torch.no_grad()
def warmed(method: META) -> META:
    """The method with sets that all differ, and aggregators that say something."""
    random = torch.Generator().manual_seed(3)
    for norm in (norm for layer in layers(method) for norm in layer.sets):
        assert isinstance(norm, nn.BatchNorm2d)
        for values, low, high in (
            (norm.running_mean, -0.4, 0.4),
            (norm.running_var, 0.5, 2.0),
            (norm.weight, 0.6, 1.4),
            (norm.bias, -0.2, 0.2),
        ):
            assert values is not None
            values.copy_(low + (high - low) * torch.rand(values.shape, generator=random))
    for parameter in method.aggregators.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return method


def with_settings(method: META, **changes: Any) -> META:
    """The same weights under other test settings."""
    other = meta(method.setup.num_ids, **changes)
    other.load_state_dict(method.state_dict())
    return other.eval()


class Steps:
    """Steps as the trainer makes them: one optimiser, gradients absent rather than zero, chosen groups only."""

    def __init__(self, method: META, optimizer: Literal["adam", "sgd"] = "adam") -> None:
        self.method = method
        schedule = Schedule(optimizer=optimizer, learning_rate=0.01, weight_decay=0.1)
        self.optimizer = build_optimizer(schedule, method.parameter_groups())

    def __call__(self, domain: int, step: int = 0) -> Losses:
        def update(losses: Losses, groups: tuple[str, ...] = ("main",), rule: str = "optimiser") -> None:
            self.optimizer.zero_grad(set_to_none=True)
            chosen = [p for group in self.optimizer.param_groups if group["name"] in groups for p in group["params"]]
            torch.autograd.backward(losses["loss/total"], inputs=chosen)
            self.optimizer.step()

        return self.method.train_step(batch_of(domain, seed=step), step, update)

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and moments, flat."""
        flat = {name: value.clone() for name, value in self.method.state_dict().items()}
        for name, parameter in self.method.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            flat |= {f"{name}/{key}": value.clone() for key, value in moments.items() if value is not None}
        return flat


def slowly(method: META, images: Tensor, domain: int) -> tuple[Tensor, list[Tensor]]:
    """Maps of expert j by its layers set to evaluation, with a graph; and what entered its layers."""
    entered: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0])) for layer in layers(method)
    ]
    for layer in layers(method):
        layer.norm(domain).eval()
    with method.switch.on(OneSet(domain)):
        maps: Tensor = method.backbone(images)
    for layer, hook in zip(layers(method), hooks, strict=True):
        layer.norm(domain).train(method.training)
        hook.remove()
    return maps, entered


def slow_distances(method: META, entered: list[Tensor], domain: int, raw: bool = False) -> Tensor:
    """Eq. (M3), layer by layer and image by image: (N, S)."""
    found = torch.zeros(len(entered[0]), len(entered))
    for site, (layer, x) in enumerate(zip(layers(method), entered, strict=True)):
        norm = layer.norm(domain)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        for i, image in enumerate(x.detach().flatten(2)):
            mean_gap, deviation_gap = image.mean(1) - norm.running_mean, image.std(1) - norm.running_var.sqrt()
            total = float(mean_gap @ mean_gap + deviation_gap @ deviation_gap)
            found[i, site] = (total / (1 if raw else norm.num_features)) ** 0.5
    return found


def slow_branch(method: META, images: Tensor) -> Tensor:
    """Eq. (M2) by hand in the small network: up to stage 3 in the trunk, then the branch's own stage 4."""
    with method.switch.on(OneSet(method.num_domains)):
        x = images
        for name in ("conv1", "bn1", "relu", "layer1", "layer2", "layer3"):
            x = method.backbone.get_submodule(name)(x)
    (block,) = method.branch.own
    maps: Tensor = block(x)
    return maps


# --- experts, Eqs. (M1) and (M3) -------------------------------------------------------------------------------------


@torch.no_grad()
def test_equal_sets_make_equal_experts_and_any_mixture_of_them() -> None:
    method = warmed(meta()).eval()
    for layer in layers(method):
        for j in (1, 2):
            layer.norm(j).load_state_dict(layer.norm(0).state_dict())
    images = batch_of(0).images
    experts = [method.expert(images, j) for j in range(3)]
    maps, distances = zip(*experts, strict=True)
    for j in (1, 2):
        assert torch.equal(maps[j], maps[0])
        assert torch.equal(distances[j], distances[0])
    weights = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    torch.testing.assert_close(mixture(weights, maps), maps[0])
    encoded = [with_settings(method, meta_test_weights=w)(images) for w in ("uniform", "distance", "learned")]
    torch.testing.assert_close(encoded[0], encoded[1])
    torch.testing.assert_close(encoded[0], encoded[2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", ["sqrt_c", "raw"])
def test_an_expert_on_any_images_equals_the_loop_and_leaves_no_trace(scale: str, training: bool) -> None:
    method = warmed(meta(meta_relevance_scale=scale)).train(training)
    before = copy.deepcopy(method.state_dict())
    images = batch_of(0).images[:2]
    maps, distances = method.expert(images, 1)
    expected, entered = slowly(method, images, 1)
    torch.testing.assert_close(maps, expected.detach())
    assert distances.shape == (2, SITES)
    torch.testing.assert_close(distances, slow_distances(method, entered, 1, scale == "raw"), rtol=1e-4, atol=1e-5)
    assert not maps.requires_grad
    assert not distances.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("raw", [True, False])
def test_distance_is_zero_where_an_image_has_the_experts_statistics(raw: bool) -> None:
    method = warmed(meta())
    layer = layers(method)[3]
    norm = layer.norm(2)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = torch.randn(2, norm.num_features, 4, 3, generator=torch.Generator().manual_seed(0))
    var, mean = torch.var_mean(x[1], dim=(1, 2), keepdim=True)
    scale = (norm.running_var[:, None, None] / var).sqrt()
    x[1] = (x[1] - mean) * scale + norm.running_mean[:, None, None]
    with method.switch.on(OneSet(2)), site_distances(layer, raw) as found:
        layer(x)
    assert found[0][1] < 1e-5 < 0.1 < found[0][0]


def test_maps_of_one_pixel_have_no_distance() -> None:
    method = meta()
    layer = layers(method)[0]
    with method.switch.on(OneSet(0, running=True)), site_distances(layer), pytest.raises(UsageError, match="image_hei"):
        layer(torch.randn(2, 24, 1, 1))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_step_leaves_the_other_domains_alone_with_their_moments(optimizer: Literal["adam", "sgd"]) -> None:
    """Sets, necks and classifiers of the others; the aggregator of the shown domain, which does not vote."""
    steps = Steps(warmed(meta()), optimizer)
    for step in range(6):
        steps(step % 3, step)
    before = steps.state()
    steps(1, 6)
    after = steps.state()
    assert after.keys() == before.keys()
    still = {name for name, value in before.items() if torch.equal(after[name], value)}

    def foreign(name: str) -> bool:
        of_sets = any(f".sets.{j}." in name for j in (0, 2))
        of_heads = name.startswith(tuple(f"head.{part}.{j}." for part in ("necks", "classifiers") for j in (0, 2)))
        return of_sets or of_heads or name.startswith("aggregators.1.")

    constant = {name for name in before if name.startswith(("head", "head_global")) and name.endswith(".bias")}
    assert {name for name in before if foreign(name)} | constant == still | constant
    assert sum(".sets.3." in name and name.endswith("running_var") for name in before) == SITES - 3
    assert sum(foreign(name) for name in before) > 2 * SITES * 5


# --- the step, Eqs. (M4) to (M7) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["sqrt_c", "raw"])
def test_step_equals_the_equations(scale: str) -> None:
    """Values and gradients by hand, with foreign experts that keep their graph and are detached behind it."""
    method = warmed(meta(meta_relevance_scale=scale, meta_consistency_weight=0.7, triplet_weight=0.8))
    with torch.no_grad():  # weights that are neither uniform nor one-hot
        for parameter in method.aggregators.parameters():
            parameter.mul_(1.5 if scale == "sqrt_c" else 0.3)
    reference = copy.deepcopy(method)
    data = batch_of(1, seed=5)
    labels, (domain, foreign) = data.labels, (1, (0, 2))

    logits, theirs = [], []
    for j in foreign:
        maps, entered = slowly(reference, data.images, j)
        w = slow_distances(reference, entered, j, scale == "raw")
        first, last = reference.aggregators[j]  # type: ignore[misc]
        logits.append((w @ first.weight.T + first.bias) @ last.weight.T + last.bias)
        theirs.append(maps.detach())
    a = torch.cat(logits, 1).exp()
    a = a / a.sum(1, keepdim=True)
    assert 0.02 < float(a.detach().min()) < 0.45
    mixed = gem(sum(a[:, n, None, None, None] * theirs[n] for n in range(2)), 3.0)  # type: ignore[arg-type]
    with reference.switch.on(OneSet(domain)):
        own = gem(reference.backbone(data.images), 3.0)
    of_branch = gem(slow_branch(reference, data.images), 3.0)
    terms = {
        "loss/id": identity_loss(reference.head(own, domain), labels, 0.1),
        "loss/triplet": batch_hard_triplet_loss(own, labels, 0.3),
        "loss/id_global": identity_loss(reference.head_global(of_branch, 0), labels + NUM_IDS[0], 0.1),
        "loss/triplet_global": batch_hard_triplet_loss(of_branch, labels, 0.3),
        "loss/consistency": slow_consistency(mixed, own.detach(), labels),
    }
    total = terms["loss/id"] + 0.8 * terms["loss/triplet"] + terms["loss/id_global"]
    total = total + 0.8 * terms["loss/triplet_global"] + 0.7 * terms["loss/consistency"]

    losses = method.training_losses(data, 0)
    assert float(losses["loss/consistency"].detach()) > 0
    for name, value in {**terms, "loss/total": total}.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5, msg=name)
    losses["loss/total"].backward()
    total.backward()
    for (name, one), (_, other) in zip(method.named_parameters(), reference.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=2e-3, atol=2e-5, msg=name)
    for key, value in method.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], msg=key)


def slow_consistency(mixed: Tensor, own: Tensor, labels: Tensor) -> Tensor:
    """Eq. (M6) by loops."""

    def hardest(e: Tensor, i: int) -> tuple[Tensor, Tensor]:
        apart = [(e[i] - e[n]).norm() for n in range(len(e))]
        same = [apart[n] for n in range(len(e)) if n != i and labels[n] == labels[i]]
        return torch.stack(same).max(), torch.stack([apart[n] for n in range(len(e)) if labels[n] != labels[i]]).min()

    terms = []
    for i in range(len(mixed)):
        (near, far), (aim_near, aim_far) = hardest(mixed, i), hardest(own, i)
        terms.append(F.relu(near - aim_near) + F.relu(aim_far - far))
    return torch.stack(terms).mean()


def test_consistency_equals_loops_and_is_zero_for_what_is_no_harder() -> None:
    random = torch.Generator().manual_seed(0)
    mixed, own = (torch.randn(6, 4, generator=random, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = relation_loss(mixed, own, labels)
    torch.testing.assert_close(loss, slow_consistency(mixed, own, labels))
    loss.backward()
    assert mixed.grad is not None
    assert own.grad is None, "the own expert is only looked at"
    assert float(relation_loss(own, own, labels).detach()) == 0.0
    assert float(relation_loss(mixed, mixed * torch.tensor([1.0, 1.0, 1.0, 1.5]), labels).detach()) > 0.0


def test_consistency_of_a_single_identity_has_positives_only() -> None:
    mixed = torch.tensor([[0.0], [3.0]], requires_grad=True)
    own = torch.tensor([[0.0], [1.0]])
    loss = relation_loss(mixed, own, torch.tensor([4, 4]), part=True)
    assert float(loss.detach()) == pytest.approx(2.0)
    loss.backward()
    assert mixed.grad is not None
    assert mixed.grad.isfinite().all()
    with pytest.raises(ValueError, match="two identities"):
        relation_loss(mixed, own, torch.tensor([4, 4]))


def test_consistency_is_zero_where_the_mixture_is_the_own_map() -> None:
    """All sets hold the statistics of this very batch, layer by layer: so every expert is the own one."""
    method = meta()
    data = batch_of(0)
    biased(method, data.images)
    losses = method.training_losses(data, 0)
    assert float(losses["loss/consistency"].detach()) < 1e-3
    assert float(meta().training_losses(data, 0)["loss/consistency"].detach()) > 0.1


@torch.no_grad()
def biased(method: META, images: Tensor) -> None:
    """Give every set the biased batch statistics, by which a batch is normalised in training."""

    def fit(layer: DomainBatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        for norm in layer.sets:
            norm.running_mean.copy_(mean)  # type: ignore[operator, union-attr]
            norm.running_var.copy_(var)  # type: ignore[operator, union-attr]

    hooks = [layer.register_forward_pre_hook(fit) for layer in layers(method)]
    with method.switch.on(OneSet(0, running=True)):
        method.backbone(images)
    for hook in hooks:
        hook.remove()


def test_consistency_trains_the_voting_aggregators_and_nothing_else() -> None:
    method = warmed(meta())
    names, parameters = zip(*[(n, p) for n, p in method.named_parameters() if p.requires_grad], strict=True)
    found = torch.autograd.grad(
        method.training_losses(batch_of(1), 0)["loss/consistency"], parameters, allow_unused=True
    )
    reached = {name for name, gradient in zip(names, found, strict=True) if gradient is not None}
    assert reached == {name for name in names if name.startswith(("aggregators.0.", "aggregators.2."))}
    assert all(gradient.abs().sum() > 0 for gradient in found if gradient is not None and gradient.ndim == 2)


def test_without_consistency_no_foreign_expert_passes() -> None:
    method = meta(meta_consistency_weight=0.0, meta_test_weights="uniform")
    seen: list[int] = []
    method.backbone.conv1.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    losses = method.training_losses(batch_of(0), 0)
    assert sum(seen) == 2 * 6
    assert "loss/consistency" not in losses
    assert method.cost.train_passes == 2
    assert meta().cost.train_passes == pytest.approx(2 + 2 / 3)
    losses["loss/total"].backward()
    assert all(p.grad is None for p in method.aggregators.parameters())


def test_the_trunk_waits_while_it_is_frozen() -> None:
    steps = Steps(warmed(meta(meta_freeze_steps=2)))
    trunk = {n for n, m in steps.method.backbone.named_modules() if isinstance(m, nn.Conv2d)}
    names = {f"backbone.{name}.weight" for name in trunk}
    before = steps.state()
    for step in range(2):
        steps(step, step)
    frozen = steps.state()
    assert all(torch.equal(frozen[name], before[name]) for name in names)
    assert not any(name.startswith(tuple(names)) and "/" in name for name in frozen), "no moments"
    for moved in ("branch.own.0.conv1.weight", "backbone.layer4.0.bn1.sets.0.weight", "head.classifiers.1.weight"):
        assert not torch.equal(frozen[moved], before[moved]), moved
    steps(0, 2)
    assert not any(torch.equal(steps.state()[name], before[name]) for name in names)


# --- aggregators and weights, Eqs. (M4) and (M8) ---------------------------------------------------------------------


def test_aggregator_is_linear_and_begins_as_the_settings_say() -> None:
    torch.manual_seed(0)
    layer = aggregator(53, "kaiming")
    assert sum(p.numel() for p in layer.parameters()) == 28_161
    x, y = torch.randn(5, 53), torch.randn(5, 53)
    torch.testing.assert_close(layer(x + 2 * y), layer(x) + 2 * layer(y), rtol=1e-4, atol=1e-4)
    logits = torch.cat([aggregator(53, "kaiming")(torch.ones(1, 53)) for _ in range(200)])
    assert float(logits.detach().std()) == pytest.approx(2 * 53**0.5, rel=0.2), "twice the length of W"
    zero = aggregator(53, "zero")
    assert torch.equal(zero(x), torch.zeros(5, 1))
    zero(x).sum().backward()
    assert zero[1].weight.grad.abs().sum() > 0, "zero in both layers would never learn"


@torch.no_grad()
def test_weights_sum_to_one_and_begin_uniform() -> None:
    method = meta().eval()
    images = batch_of(0).images
    experts = [method.expert(images, j) for j in range(3)]
    maps, distances = zip(*experts, strict=True)
    fresh = method.test_weights(distances)
    assert torch.equal(fresh, torch.full((6, 3), 1 / 3))
    torch.testing.assert_close(mixture(fresh, maps), torch.stack(maps).mean(0))
    encoded = with_settings(method, meta_test_weights="uniform")(images)
    torch.testing.assert_close(method(images), encoded)
    warmed(method)
    changes: list[dict[str, Any]] = [
        {"meta_test_weights": "learned"},
        {"meta_test_weights": "uniform"},
        {"meta_test_weights": "distance"},
        {"meta_test_weights": "distance", "meta_relevance_sign": "far"},
    ]
    found = []
    for change in changes:
        other = with_settings(method, **change)
        weights = other.test_weights([other.expert(images, j)[1] for j in range(3)])
        torch.testing.assert_close(weights.sum(1), torch.ones(6))
        found.append(weights)
    assert all(not torch.allclose(one, other) for n, one in enumerate(found) for other in found[:n])
    assert torch.equal(found[2].argsort(1), found[3].argsort(1).flip(1)), "far is near the other way round"


@torch.no_grad()
def test_distance_weights_by_hand_and_near_and_far_of_two() -> None:
    near = with_settings(warmed(meta((5, 7))), meta_test_weights="distance")
    far = with_settings(near, meta_test_weights="distance", meta_relevance_sign="far")
    distances = [torch.tensor([[0.1, 0.2, 0.3], [1.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.1, 0.2], [0.5, 0.5, 1.0]])]
    of_near, of_far = near.test_weights(distances), far.test_weights(distances)
    first = 1 / (1 + torch.tensor([0.6 - 0.4, 1.0 - 2.0]).exp())
    torch.testing.assert_close(of_near, torch.stack([first, 1 - first], dim=1))
    torch.testing.assert_close(of_near + of_far, torch.ones(2, 2))
    assert (near.inference, far.inference) == ("distance near", "distance far")


@torch.no_grad()
@pytest.mark.parametrize("weights", ["learned", "distance"])
def test_features_are_the_mixture_beside_the_global_branch(weights: str) -> None:
    """Eq. (M8) by hand from K passes; the lengths of both parts decide their share."""
    method = with_settings(warmed(meta()), meta_test_weights=weights)
    neck = method.head_global.necks[0]
    neck.running_mean.normal_(generator=torch.Generator().manual_seed(2))  # type: ignore[operator, union-attr]
    images = batch_of(0).images
    parts, logits = [], []
    for j in range(3):
        maps, entered = slowly(method, images, j)
        w = slow_distances(method, entered, j)
        logits.append(method.aggregators[j](w)[:, 0] if weights == "learned" else -w.sum(1))
        parts.append(maps)
    a = torch.stack(logits).softmax(0)
    mixed = gem(torch.einsum("kb,kbdhw->bdhw", a, torch.stack(parts)), 3.0)
    of_branch = neck(gem(slow_branch(method, images), 3.0))
    both = torch.cat([nn.BatchNorm1d(192).eval()(mixed), of_branch], dim=1)
    encoded = method(images)
    assert encoded.shape == (6, 2 * 192)
    torch.testing.assert_close(encoded, both / both.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded.norm(dim=1), torch.ones(6))
    assert method.inference.split()[0] == weights


def test_two_sources_mix_the_other_expert_and_train_no_aggregator() -> None:
    method = warmed(meta((5, 7)))
    losses = method.training_losses(batch_of(0), 0)
    assert float(losses["weights/largest"]) == 1.0
    losses["loss/total"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in method.aggregators[1].parameters())
    with pytest.raises(UsageError, match="set meta_aggregator_init=zero"):
        meta((5, 7), meta_aggregator_init="kaiming")
    meta((5, 7), meta_aggregator_init="kaiming", meta_test_weights="distance")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_relevance_sign": "far"}, "meta_relevance_sign: far .*; set meta_test_weights=distance"),
        ({"meta_consistency_weight": 0.0}, "meta_consistency_weight: at 0 .*; set meta_test_weights=uniform"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        meta(**changes)


def test_one_source_is_refused() -> None:
    with pytest.raises(UsageError, match="2 or more source domains"):
        meta((5,))


# --- what it consists of ---------------------------------------------------------------------------------------------


def test_nothing_shares_storage_but_what_is_shared_by_name() -> None:
    """The release's sets are one tensor on a CPU."""
    method = meta()
    where = [value.data_ptr() for value in method.state_dict().values()]
    assert len(where) == len(set(where))
    before = method.branch.own[0].state_dict()["conv1.weight"].clone()
    with torch.no_grad():
        method.backbone.get_parameter("layer4.0.conv1.weight").zero_()
    assert torch.equal(method.branch.own[0].state_dict()["conv1.weight"], before)


@pytest.mark.parametrize("stages", [1, 2])
def test_small_shares_stage_three_and_owns_stage_four(stages: int) -> None:
    backbone = build_backbone("small" if stages == 1 else "resnet18")
    branch = GlobalBranch(backbone)
    instance = [m for m in branch.modules() if isinstance(m, InstanceSite)]
    batch = [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(branch.own) == (1 if stages == 1 else 3)
    assert len(instance) == (3 if stages == 1 else 5)
    assert len(batch) == (0 if stages == 1 else 2)


@pytest.mark.parametrize(("num_domains", "millions"), [(3, 44.26), (4, 44.35)])
def test_parameters_of_a_resnet50(num_domains: int, millions: float) -> None:
    with torch.device("meta"):
        backbone = build_backbone("resnet50")
        branch = GlobalBranch(backbone)
        steps = dict(backbone.steps())
        use_domain_norm(backbone, num_domains, one_beside=[steps[name] for name in branch.shared])
        aggregators = nn.ModuleList(aggregator(53, "zero") for _ in range(num_domains))
    norms = [m for m in backbone.modules() if isinstance(m, DomainBatchNorm2d)]
    assert len(norms) == 53
    assert sum(len(norm.sets) == num_domains + 1 for norm in norms) == 28
    assert sum(p.numel() for p in branch.parameters()) == pytest.approx(20.55e6, abs=5e3)
    total = sum(p.numel() for part in (backbone, branch, aggregators) for p in part.parameters())
    assert total / 1e6 == pytest.approx(millions, abs=0.005)
    assert sum(isinstance(m, InstanceSite) for m in branch.modules()) == 10


def test_average_of_sets_leaves_the_branchs_out() -> None:
    layer = layers(warmed(meta()))[0]
    assert (len(layer.sets), layer.num_domains) == (4, 3)
    assert [len(one.sets) for one in layers(meta())] == [4] * 9 + [3] * 3
