"""META against plain networks with one expert's weights each, against slow loops, and by what trains what."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import NUM_IDS, build, gradients
from torch import Tensor, nn
from torchvision.models import resnet18

from lda.batch import Batch
from lda.errors import UsageError
from lda.groups import Schedule
from lda.methods import meta as meta_file
from lda.methods.base import Losses
from lda.methods.meta import META, aggregator, mixture
from lda.parts.backbones import Backbone, build_backbone, convert_norm
from lda.parts.domain_norm import DomainBatchNorm2d, OneSet, site_distances
from lda.parts.heads import gem
from lda.parts.instance_sites import InstanceSite, as_instance_site
from lda.parts.losses import batch_hard_triplet_loss, identity_loss, relation_loss
from lda.parts.routes import statistics_held
from lda.trainer import build_optimizer

OFFSETS = (0, 5, 12)
SITES = 12  # layers of batch normalisation in the small network
BRANCH = 3  # the set beside those of three domains


def pure_batch(domain: int, seed: int = 0) -> Batch:
    """Six images of one domain, two of every identity."""
    images = torch.randn(6, 3, 32, 16, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.4 * domain
    return Batch(images, torch.tensor([0, 0, 3, 3, 2, 2]), torch.full((6,), domain))


def meta(num_ids: tuple[int, ...] = NUM_IDS, **changes: Any) -> META:
    """META whose sets all differ, in gamma, beta and running statistics, and the necks too."""
    method = build("meta", num_ids, warmup_epochs=0, **changes)
    assert isinstance(method, META)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                shift = 0.3 * torch.rand(4, module.num_features, generator=random)
                module.weight.add_(shift[0])
                module.running_mean.add_(shift[1])  # type: ignore[union-attr]
                module.running_var.add_(shift[2])  # type: ignore[union-attr]
                if module.bias.requires_grad:
                    module.bias.add_(shift[3])
    return method


def uneven(method: META) -> META:
    """The method with aggregators that say something."""
    random = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in method.aggregators.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return method


def with_settings(method: META, **changes: Any) -> META:
    """The same weights, tested by other settings."""
    other = meta(method.setup.num_ids, **changes)
    other.load_state_dict(method.state_dict())
    return other.train(method.training)


class Step:
    """The trainer's update: one step of its optimiser on the named groups."""

    def __init__(self, method: META, **schedule: Any) -> None:
        self.optimizer = build_optimizer(Schedule(**schedule), method.parameter_groups())

    def __call__(
        self, losses: Losses, groups: tuple[str, ...] = ("main",), rule: Literal["optimiser", "plain_sgd"] = "optimiser"
    ) -> None:
        chosen = [p for group in self.optimizer.param_groups if group["name"] in groups for p in group["params"]]
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses["loss/total"], inputs=chosen)
        self.optimizer.step()


def plain_network(method: META, number: int) -> Backbone:
    """The plain backbone with set `number` in it: expert j, or the trunk's part of the branch."""
    plain, state = build_backbone("small"), method.backbone.state_dict()
    own = {key: value for key, value in state.items() if ".sets." not in key}
    for key, value in state.items():
        if f".sets.{number}." in key:
            own[key.replace(f".sets.{number}.", ".")] = value
    missing, unexpected = plain.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(key.startswith("layer4.0") for key in missing), missing
    return plain


def plain_branch(method: META) -> Backbone:
    """The branch as a plain backbone whose stage 4 has instance normalisation."""
    plain = plain_network(method, method.num_domains)
    stage = plain.get_submodule("layer4")
    convert_norm(stage, as_instance_site)
    stage.load_state_dict(method.branch.own.state_dict())
    return plain


def foreign_to(domain: int, method: META) -> list[int]:
    return [j for j in range(method.num_domains) if j != domain]


def slow_distances(method: META, images: Tensor, number: int, raw: bool) -> Tensor:
    """(M3) by loops, (B, S), from what enters the layers of the plain network of an expert."""
    plain, found = plain_network(method, number).eval(), []

    def measure(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        column = []
        for image in inputs[0]:
            total = 0.0
            for c, values in enumerate(image):
                total += float(values.mean() - norm.running_mean[c]) ** 2  # type: ignore[index]
                total += float(values.var().sqrt() - norm.running_var[c].sqrt()) ** 2  # type: ignore[index]
            column.append((total if raw else total / len(image)) ** 0.5)
        found.append(torch.tensor(column))

    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(measure)
    with torch.no_grad():
        plain(images)
    return torch.stack(found, dim=1)


def slow_consistency(mixed: Tensor, own: Tensor, labels: Tensor) -> float:
    """(M6) by loops."""
    total, count = 0.0, len(labels)
    for i in range(count):
        gaps = [[float((e[i] - e[n]).norm()) for n in range(count)] for e in (mixed, own)]
        positive = [max(gap[n] for n in range(count) if labels[n] == labels[i] and n != i) for gap in gaps]
        negative = [min(gap[n] for n in range(count) if labels[n] != labels[i]) for gap in gaps]
        total += max(0.0, positive[0] - positive[1]) + max(0.0, negative[1] - negative[0])
    return total / count


# --- routes and their mixture ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_equal_sets_make_every_route_and_every_mixture_the_same() -> None:
    method = meta().eval()
    for module in method.backbone.modules():
        if isinstance(module, DomainBatchNorm2d):
            for norm in module.sets[1:]:
                norm.load_state_dict(module.norm(0).state_dict())
    images = pure_batch(0).images
    maps = [method.expert(images, j)[0] for j in range(3)]
    routes = [OneSet(1), OneSet(2), OneSet(0, running=True)]
    assert all(torch.equal(method._maps(images, route), maps[0]) for route in routes)
    assert torch.equal(maps[1], maps[0])
    assert torch.equal(maps[2], maps[0])
    weights = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    torch.testing.assert_close(mixture(weights, maps), maps[0])
    learned = method(images)
    uneven(method)
    for choice in ("learned", "uniform", "distance"):
        torch.testing.assert_close(with_settings(method, meta_test_weights=choice)(images), learned)


@torch.no_grad()
@pytest.mark.parametrize("number", range(3))
def test_an_expert_is_the_plain_network_of_its_set_and_leaves_no_trace(number: int) -> None:
    method, images = meta(), pure_batch(0).images
    before = copy.deepcopy(method.state_dict())
    expected = plain_network(method, number).eval()(images)
    assert torch.equal(method.expert(images, number)[0], expected), "by running statistics in training too"
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert torch.equal(method.eval().expert(images, number)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("scale", ["raw", "sqrt_c"])
def test_relevance_equals_a_slow_loop(scale: str) -> None:
    method, images = meta(meta_relevance_scale=scale), pure_batch(1).images[:2]
    for number in range(3):
        distances = method.expert(images, number)[1]
        assert distances.shape == (2, SITES)
        assert not distances.requires_grad
        torch.testing.assert_close(distances, slow_distances(method, images, number, scale == "raw"))


@torch.no_grad()
@pytest.mark.parametrize("scale", ["raw", "sqrt_c"])
def test_relevance_is_zero_where_an_image_has_the_sets_statistics(scale: str) -> None:
    method, image = meta(meta_relevance_scale=scale), pure_batch(1).images[:1]

    def take_over(layer: DomainBatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=1)
        layer.norm(1).running_mean.copy_(mean)  # type: ignore[union-attr]
        layer.norm(1).running_var.copy_(var)  # type: ignore[union-attr]

    for module in method.backbone.modules():
        if isinstance(module, DomainBatchNorm2d):
            module.register_forward_pre_hook(take_over)
    assert method.expert(image, 1)[1].max() < 1e-5
    assert method.expert(image, 0)[1].min() > 1e-2


def test_mixture_equals_a_loop() -> None:
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, generator=random)
    maps = [torch.randn(2, 4, 3, 2, generator=random) for _ in range(3)]
    expected = torch.zeros(2, 4, 3, 2)
    for i in range(2):
        for j in range(3):
            expected[i] += float(weights[i, j]) * maps[j][i]
    torch.testing.assert_close(mixture(weights, maps), expected)


# --- weights ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("choice", "sign"), [("distance", 1), ("distance", -1), ("learned", 1), ("uniform", 1)])
def test_test_weights_are_what_they_say_and_sum_to_one(choice: str, sign: int) -> None:
    relevance = "far" if sign < 0 else "near"
    method = uneven(meta(meta_test_weights=choice, meta_relevance_sign=relevance))
    distances = [torch.rand(5, SITES, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    weights = method.test_weights(distances)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert method.inference == (f"distance {relevance}" if choice == "distance" else choice)
    for i in range(5):
        logits = [0.0, 0.0, 0.0]
        for j in range(3):
            if choice == "distance":
                logits[j] = -sign * float(distances[j][i].sum())
            elif choice == "learned":
                first, last = method.aggregators[j]  # type: ignore[misc]
                logits[j] = float(last.weight @ (first.weight @ distances[j][i] + first.bias) + last.bias)
        torch.testing.assert_close(weights[i], torch.tensor(logits).softmax(0))


@torch.no_grad()
def test_of_two_experts_near_and_far_are_mirror_images() -> None:
    near, far = (meta((5, 7), meta_test_weights="distance", meta_relevance_sign=sign) for sign in ("near", "far"))
    distances = [near.expert(pure_batch(0).images, j)[1] for j in range(2)]
    one, other = near.test_weights(distances), far.test_weights(distances)
    torch.testing.assert_close(one + other, torch.ones(6, 2))
    torch.testing.assert_close(one, other.flip(1))
    assert (one - 0.5).abs().min() > 1e-3
    closer = torch.stack([w.sum(1) for w in distances], dim=1).argmin(1)
    assert torch.equal(one.argmax(1), closer)


@torch.no_grad()
def test_zero_start_is_the_plain_average_of_maps() -> None:
    method, images = meta().eval(), pure_batch(1).images
    experts = [method.expert(images, j) for j in range(3)]
    weights = method.learned_weights([0, 2], [experts[0][1], experts[2][1]])
    assert torch.equal(weights, torch.full((6, 2), 0.5))
    maps = [maps for maps, _ in experts]
    torch.testing.assert_close(mixture(method.test_weights([w for _, w in experts]), maps), sum(maps) / 3)
    torch.testing.assert_close(method(images), with_settings(method, meta_test_weights="uniform")(images))
    kaiming = meta(meta_aggregator_init="kaiming").learned_weights([0, 1], [w for _, w in experts[:2]])
    assert (kaiming - 0.5).abs().min() > 1e-3


def test_an_aggregator_is_linear_of_the_size_of_the_release() -> None:
    for init in ("zero", "kaiming"):
        layers = aggregator(53, init)
        assert sum(p.numel() for p in layers.parameters()) == 28_161
        assert float(layers[0].weight.detach().std()) == pytest.approx((2 / 512) ** 0.5, rel=0.05), "fan-out"
        assert bool(layers[1].weight.any()) == (init == "kaiming")
        assert not any(p.any() for name, p in layers.named_parameters() if name.endswith("bias"))
    one, other = torch.randn(2, 4, 53, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layers(one - 3 * other), layers(one) - 3 * layers(other), rtol=1e-4, atol=1e-4)


# --- the step --------------------------------------------------------------------------------------------------------


def hand_worked(method: META, batch: Batch, weights: Tensor) -> tuple[Losses, dict[str, Backbone]]:
    """(M7) from plain networks, with the weights of the foreign experts as given, and the two that have a gradient."""
    domain, settings = int(batch.domains[0]), method.settings
    head, head_global = copy.deepcopy(method.head), copy.deepcopy(method.head_global)
    own, branch = plain_network(method, domain).train(), plain_branch(method).train()
    e, e_g = gem(own(batch.images), 3.0), gem(branch(batch.images), 3.0)
    losses = {
        "loss/id": identity_loss(head(e, domain), batch.labels, settings.label_smoothing),
        "loss/triplet": batch_hard_triplet_loss(e, batch.labels, settings.triplet_margin),
        "loss/id_global": identity_loss(head_global(e_g, 0), batch.labels + OFFSETS[domain], settings.label_smoothing),
        "loss/triplet_global": batch_hard_triplet_loss(e_g, batch.labels, settings.triplet_margin),
    }
    with torch.no_grad():
        mixed = torch.zeros(())
        for column, j in enumerate(foreign_to(domain, method)):
            mixed = mixed + weights[:, column, None, None, None] * plain_network(method, j).eval()(batch.images)
    losses["loss/consistency"] = torch.tensor(slow_consistency(gem(mixed, 3.0), e.detach(), batch.labels))
    triplets = losses["loss/triplet"] + losses["loss/triplet_global"]
    total = losses["loss/id"] + losses["loss/id_global"] + settings.triplet_weight * triplets
    losses["loss/total"] = total + settings.meta_consistency_weight * losses["loss/consistency"]
    return losses, {"own": own, "branch": branch}


@pytest.mark.parametrize("domain", [0, 1])
def test_a_step_equals_plain_networks(domain: int) -> None:
    """Losses; gradients of the trunk, of set k and of the branch; running statistics."""
    method = uneven(meta(meta_consistency_weight=2.0, triplet_weight=0.6, label_smoothing=0.2))
    batch = pure_batch(domain)
    others = foreign_to(domain, method)
    weights = method.learned_weights(others, [method.expert(batch.images, j)[1] for j in others]).detach()
    expected, networks = hand_worked(method, batch, weights)
    losses = method.training_losses(batch, 0)
    assert losses["loss/consistency"] > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert float(losses["weights/largest"]) == pytest.approx(float(weights.amax(1).mean()))

    losses["loss/total"].backward()
    expected["loss/total"].backward()
    found = gradients(method)
    of = {key: {n: p.grad for n, p in network.named_parameters()} for key, network in networks.items()}
    for name, gradient in of["own"].items():
        here = f"backbone.{name}"
        if here in found:  # a convolution
            both = gradient if name.startswith("layer4") else gradient + of["branch"][name]
            torch.testing.assert_close(found[here], both, rtol=1e-3, atol=1e-5, msg=name)
        else:
            layer, kind = here.rsplit(".", 1)
            of_set = found[f"{layer}.sets.{domain}.{kind}"]
            torch.testing.assert_close(of_set, gradient, rtol=1e-3, atol=1e-5, msg=name)
            if not name.startswith("layer4"):
                of_set, gradient = found[f"{layer}.sets.{BRANCH}.{kind}"], of["branch"][name]
                torch.testing.assert_close(of_set, gradient, rtol=1e-3, atol=1e-5, msg=name)
    for name, gradient in of["branch"].items():
        if name.startswith("layer4.0."):
            here = name.replace("layer4.0.", "branch.own.0.")
            torch.testing.assert_close(found[here], gradient, rtol=1e-3, atol=1e-5, msg=name)
    for number, network in ((domain, networks["own"]), (BRANCH, networks["branch"])):
        after = plain_network(method, number).state_dict()
        for name, value in network.named_buffers():
            torch.testing.assert_close(after[name], value, msg=name)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_foreign_sets_and_heads_stay_to_the_bit(optimizer: str) -> None:
    """Weights, buffers and moments, by the trainer's optimiser with weight decay, when all have moments already."""
    method = uneven(meta())
    update = Step(method, optimizer=optimizer, learning_rate=1e-3, weight_decay=0.1)

    def state(*marks: str) -> dict[str, Tensor]:
        found = {key: v.clone() for key, v in method.state_dict().items() if any(mark in key for mark in marks)}
        for name, parameter in method.named_parameters():
            if name in found:
                moments = update.optimizer.state[parameter]
                found |= {f"{name}/{key}": v.clone() for key, v in moments.items() if isinstance(v, Tensor)}
        return found

    def of(j: int) -> tuple[str, ...]:
        return (f".sets.{j}.", f"head.necks.{j}.", f"head.classifiers.{j}.")

    def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
        assert before.keys() == after.keys()
        return [key for key in after if not torch.equal(before[key], after[key])]

    for step in range(3):
        method.train_step(pure_batch(step, step), step, update)
    foreign, aggregator_k = state(*of(0), *of(2)), state("aggregators.1.")
    rest = {j: state(mark) for j, mark in enumerate((".sets.1.", "head.classifiers.1.", ".sets.3.", "branch.own"))}
    others = state("aggregators.0.", "aggregators.2.")
    assert any("/" in key for key in foreign)
    for step in range(3, 6):
        method.train_step(pure_batch(1, step), step, update)
    assert moved(foreign, state(*of(0), *of(2))) == []
    assert moved(aggregator_k, state("aggregators.1.")) == [], "a batch of domain k does not ask A_k"
    for j, mark in enumerate((".sets.1.", "head.classifiers.1.", ".sets.3.", "branch.own")):
        assert len(moved(rest[j], state(mark))) == len(rest[j]) > 0, mark
    assert moved(others, state("aggregators.0.", "aggregators.2."))


def test_the_consistency_loss_reaches_the_aggregators_and_nothing_else() -> None:
    method = uneven(meta())
    without = with_settings(method, meta_consistency_weight=0.0, meta_test_weights="uniform")
    batch = pure_batch(1)
    losses = method.training_losses(batch, 0)
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    parameters = [method.get_parameter(name) for name in names]
    found = torch.autograd.grad(losses["loss/consistency"], parameters, retain_graph=True, allow_unused=True)
    reached = {name for name, gradient in zip(names, found, strict=True) if gradient is not None}
    assert reached == {name for name in names if name.startswith(("aggregators.0.", "aggregators.2."))}
    assert all(gradient.abs().max() > 0 for gradient in found if gradient is not None)

    losses["loss/total"].backward()
    expected = without.training_losses(batch, 0)
    assert "loss/consistency" not in expected
    expected["loss/total"].backward()
    total, rest = gradients(method), gradients(without)
    assert total.keys() == rest.keys() | reached
    assert all(torch.equal(total[name], rest[name]) for name in rest)
    assert not any(f".sets.{j}." in name for name in total for j in (0, 2))


def test_the_zero_start_lets_the_last_layer_learn() -> None:
    method = meta()
    method.training_losses(pure_batch(1), 0)["loss/consistency"].backward()
    found = gradients(method)
    assert found["aggregators.0.1.weight"].abs().max() > 0
    assert not found["aggregators.0.0.weight"].any()


def test_foreign_experts_without_gradient_equal_detached_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    method = uneven(meta())
    detached = copy.deepcopy(method)

    def expert(images: Tensor, domain: int) -> tuple[Tensor, Tensor]:
        with site_distances(detached.backbone) as distances:
            maps = detached._maps(images, OneSet(domain, running=True))
        assert maps.requires_grad
        return maps.detach(), torch.stack(distances, dim=1)

    monkeypatch.setattr(detached, "expert", expert)
    results = []
    for one in (method, detached):
        one.training_losses(pure_batch(2), 0)["loss/total"].backward()
        results.append({**gradients(one), **one.state_dict()})
    assert results[0].keys() == results[1].keys()
    assert [key for key in results[0] if not torch.equal(results[0][key], results[1][key])] == []


def test_consistency_is_zero_when_the_mixture_is_the_own_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = uneven(meta()), pure_batch(0)

    @torch.no_grad()
    def own(images: Tensor, domain: int) -> tuple[Tensor, Tensor]:
        with statistics_held(method):
            return method._maps(images, OneSet(0)), torch.full((6, SITES), float(domain))

    assert method.training_losses(batch, 0)["loss/consistency"] > 1e-3
    monkeypatch.setattr(method, "expert", own)
    assert method.training_losses(batch, 0)["loss/consistency"] < 1e-5


def test_of_two_domains_the_mixture_is_the_other_expert() -> None:
    method, batch = uneven(meta((5, 7))), pure_batch(1)
    other = method.pooled(method.expert(batch.images, 0)[0])
    with torch.no_grad(), statistics_held(method):
        own = method.pooled(method._maps(batch.images, OneSet(1)))
    losses = method.training_losses(batch, 0)
    torch.testing.assert_close(losses["loss/consistency"], relation_loss(other, own, batch.labels))
    assert losses["weights/largest"] == 1


def test_the_trunk_has_its_gradient_inside_autocast() -> None:
    """Foreign passes come first and without gradient; autocast must not keep their weights for the own pass."""
    found = []
    for enabled in (False, True):
        method = meta()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = method.training_losses(pure_batch(0), 0)
        losses["loss/total"].backward()
        assert losses["loss/consistency"].dtype == torch.float32
        found.append(gradients(method))
    assert found[0].keys() == found[1].keys()


def test_frozen_steps_leave_the_trunks_convolutions_to_the_bit() -> None:
    method = meta(meta_freeze_steps=2)
    update = Step(method, learning_rate=1e-3, weight_decay=0.1)
    groups = method.parameter_groups()
    trunk = {n for n, p in method.named_parameters() if n.startswith("backbone.") and p.ndim == 4}
    assert {id(p) for p in groups["trunk"].parameters} == {id(method.get_parameter(name)) for name in trunk}
    trained = [id(p) for group in groups.values() for p in group.parameters]
    assert sorted(trained) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    for step in range(4):
        before = {name: p.detach().clone() for name, p in method.named_parameters()}
        method.train_step(pure_batch(0, step), step, update)
        moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
        assert moved & trunk == (trunk if step >= 2 else set()), step
        assert {"backbone.bn1.sets.0.weight", "backbone.bn1.sets.3.weight", "branch.own.0.conv1.weight"} <= moved
        if step < 2:
            assert not any(method.get_parameter(name) in update.optimizer.state for name in trunk)


# --- the global branch -----------------------------------------------------------------------------------------------


def test_no_two_tensors_share_storage() -> None:
    """Sets and branches are copies, where the release's are one tensor on the CPU."""
    method = build("meta")
    tensors = dict(method.named_parameters(remove_duplicate=False)) | dict(method.named_buffers(remove_duplicate=False))
    where = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    assert len(set(where)) == len(where)


def test_the_branch_shares_the_trunks_convolutions_and_nothing_else() -> None:
    method, batch = meta(), pure_batch(1)
    method.branch(batch.images, method.backbone, method.switch, BRANCH).square().mean().backward()
    found = set(gradients(method))
    shared = {n for n, p in method.backbone.named_parameters() if p.ndim == 4 and not n.startswith("layer4")}
    sets = {n for n, _ in method.backbone.named_parameters() if f".sets.{BRANCH}." in n}
    assert len(sets) == 2 * 9, "no set of the branch in stage 4"
    assert found == {f"backbone.{n}" for n in shared | sets} | {
        n for n, _ in method.named_parameters() if n.startswith("branch.own.")
    }
    assert method.branch.shared == ["conv1", "bn1", "relu", "layer1.0", "layer2.0", "layer3.0"]
    assert method.branch.names == ["layer4.0"]


def test_the_branch_writes_its_own_set_alone() -> None:
    method = meta()
    before = copy.deepcopy(method.state_dict())
    method.branch(pure_batch(1).images, method.backbone, method.switch, BRANCH)
    moved = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    buffers = {key for key, _ in method.named_buffers() if f".sets.{BRANCH}." in key}
    assert moved == buffers
    assert len(buffers) == 3 * 9


def test_stage_4_of_the_branch_normalises_every_image_alone() -> None:
    method = meta()
    stage = method.branch.own
    assert sum(isinstance(m, InstanceSite) for m in stage.modules()) == 3
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm | DomainBatchNorm2d) for m in stage.modules())
    x = torch.rand(4, 96, 4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stage[0](x)[:1], stage[0](x[:1]))


def test_blocks_of_a_deeper_network_and_where_everything_starts(tmp_path: Path) -> None:
    """ResNet-18: layer3.0 is shared, layer3.1 the branch's own; every set and copy starts as the file's weights."""
    random, state = torch.Generator().manual_seed(3), resnet18().state_dict()
    for value in state.values():
        if value.ndim == 1 and value.is_floating_point():
            value.copy_(0.5 + torch.rand(value.shape, generator=random))
    torch.save(state, tmp_path / "weights.pth")
    method = build("meta", backbone="resnet18", pretrained=str(tmp_path / "weights.pth"))
    assert isinstance(method, META)
    assert method.branch.shared[:5] == ["conv1", "bn1", "relu", "maxpool", "layer1.0"]
    assert method.branch.shared[-1] == "layer3.0"
    assert method.branch.names == ["layer3.1", "layer4.0", "layer4.1"]
    assert method.aggregators[0][0].in_features == 20  # type: ignore[index]
    for name, layer in method.backbone.named_modules():
        if isinstance(layer, DomainBatchNorm2d):
            own = name.startswith(("layer3.1", "layer4"))
            assert len(layer.sets) == (3 if own else 4), name
            for norm in layer.sets:
                assert all(torch.equal(v, state[f"{name}.{key}"]) for key, v in norm.state_dict().items()), name
    for name, block in zip(method.branch.names, method.branch.own, strict=True):
        for key, value in block.state_dict().items():
            assert torch.equal(value, state[f"{name}.{key}"]), key
        kind = nn.BatchNorm2d if name == "layer3.1" else InstanceSite
        assert sum(type(m) is kind for m in block.modules()) == (3 if name == "layer4.0" else 2), name


# --- test ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{"meta_test_weights": "distance", "meta_relevance_sign": "far", "meta_relevance_scale": "raw"}, {}],
    ids=["release", "ours"],
)
def test_features_are_the_mixture_beside_the_branch(changes: dict[str, str]) -> None:
    """(M8) from plain networks: 2 D values, normalised as a whole, the norms of the parts as they come."""
    method, images = uneven(meta(**changes)).eval(), pure_batch(2).images[:2]
    maps = torch.stack([plain_network(method, j).eval()(images) for j in range(3)], dim=1)
    distances = [slow_distances(method, images, j, raw=bool(changes)) for j in range(3)]
    if changes:
        weights = torch.stack([w.sum(1) for w in distances], dim=1).softmax(1)
    else:
        weights = torch.cat([A(w) for A, w in zip(method.aggregators, distances, strict=True)], dim=1).softmax(1)
    mixed = gem((weights[:, :, None, None, None] * maps).sum(1), 3.0)
    untouched = nn.BatchNorm1d(192).eval()
    of_branch = method.head_global.necks[0](gem(plain_branch(method).eval()(images), 3.0))
    features = method(images)
    assert features.shape == (2, 2 * 192)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(features, F.normalize(torch.cat([untouched(mixed), of_branch], dim=1)))
    ratio = features[:, :192].norm(dim=1) / features[:, 192:].norm(dim=1)
    torch.testing.assert_close(ratio, untouched(mixed).norm(dim=1) / of_branch.norm(dim=1))


@torch.no_grad()
def test_the_untouched_neck_scales_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its factor is too near 1 to be seen in features of fp32, so it is made larger."""
    assert pytest.approx((1 + 1e-5) ** -0.5, rel=1e-9) == meta_file._FRESH_NECK
    method, images = meta().eval(), pure_batch(2).images
    ratios = []
    for factor in (1.0, 3.0):
        monkeypatch.setattr(meta_file, "_FRESH_NECK", factor)
        mixed, of_branch = method(images).split(192, dim=1)
        ratios.append(mixed.norm(dim=1) / of_branch.norm(dim=1))
    torch.testing.assert_close(ratios[1], 3 * ratios[0])


@torch.no_grad()
@pytest.mark.parametrize("choice", ["learned", "distance"])
def test_features_do_not_depend_on_the_batch(choice: str) -> None:
    method, images = uneven(meta(meta_test_weights=choice)).eval(), pure_batch(0).images
    together = method(images)
    assert (together[0] - together[1]).norm() > 1e-2
    torch.testing.assert_close(torch.cat([method(image[None]) for image in images]), together)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(method(images[order]), together[order])


def test_cost_and_layout() -> None:
    assert meta().layout.domains == "one"
    assert (meta().cost.train_passes, meta().cost.test_forwards) == (pytest.approx(2 + 2 / 3), 4)
    assert meta((5, 7, 6, 4)).cost.train_passes == pytest.approx(3)
    free = meta(meta_consistency_weight=0.0, meta_test_weights="distance")
    assert free.cost.train_passes == 2


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"meta_relevance_sign": "far"}, r"meta_relevance_sign: far .*; set meta_test_weights=distance"),
        (
            {"meta_relevance_sign": "far", "meta_test_weights": "uniform"},
            r"meta_relevance_sign: far .*=uniform; set meta_test_weights=distance",
        ),
        ({"meta_consistency_weight": 0.0}, r"meta_consistency_weight: at 0 .*; set meta_test_weights=uniform"),
        ({"meta_freeze_steps": -1}, "meta_freeze_steps"),
    ],
)
def test_settings_that_say_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build("meta", **changes)


def test_one_source_is_refused() -> None:
    with pytest.raises(UsageError, match=r"META trains on 2 or more source domains, this protocol has 1; set method"):
        build("meta", (5,))


def test_maps_of_one_place_are_refused() -> None:
    method, batch = meta(), pure_batch(0)
    with pytest.raises(UsageError, match=r"image_height, image_width: .*1 x 1"):
        method.training_losses(batch._replace(images=batch.images[:, :, :8, :8]), 0)
