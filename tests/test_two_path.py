"""Two paths of one network: every part against one-path networks with the same weights, and against LDA."""

from __future__ import annotations

import copy

import pytest
import torch
from mixed_batches import build, gradients, mixed_batch, shaken
from torch import Tensor
from torch.nn.functional import normalize

from lda.errors import UsageError
from lda.methods.base import Method
from lda.methods.baseline import Baseline
from lda.methods.two_path import TwoPath
from lda.parts.heads import gem


def two_path(**changes: object) -> TwoPath:
    method = shaken(build("two_path", **changes))
    assert isinstance(method, TwoPath)
    return method


def one_path(of: TwoPath, norm: str) -> Baseline:
    """The plain network, BN or IN, with the weights and the head that `of` has on that path."""
    method = build("baseline", baseline_norm=norm)
    assert isinstance(method, Baseline)
    state = of.backbone.state_dict()
    method.backbone.load_state_dict({key: state[key] for key in method.backbone.state_dict()})
    method.head.load_state_dict((of.head if norm == "batch" else of.head_in).state_dict())
    return method


def test_step_is_the_sum_of_two_one_path_networks() -> None:
    """Losses and gradients: those of shared weights add up, those of a head are its path's alone."""
    method = two_path(triplet_weight=0.7)
    plain = {norm: one_path(method, norm) for norm in ("batch", "instance")}
    for one in plain.values():
        object.__setattr__(one.settings, "triplet_weight", 0.7)
    data = mixed_batch()
    losses = method.training_losses(data, 0)
    expected = {norm: one.training_losses(data, 0) for norm, one in plain.items()}
    for path, norm in (("bn", "batch"), ("in", "instance")):
        assert torch.equal(losses[f"loss/id_{path}"], expected[norm]["loss/id"])
        assert torch.equal(losses[f"loss/triplet_{path}"], expected[norm]["loss/triplet"])
    total = expected["batch"]["loss/total"] + expected["instance"]["loss/total"]
    torch.testing.assert_close(losses["loss/total"], total)

    losses["loss/total"].backward()
    for one_path_losses in expected.values():
        one_path_losses["loss/total"].backward()
    ours, bn, instance = gradients(method), gradients(plain["batch"]), gradients(plain["instance"])
    assert len(ours) == len(bn) + len([key for key in instance if key.startswith("head.")])
    for key, gradient in ours.items():
        if key.startswith("backbone."):
            assert bn[key].abs().max() > 0
            assert instance[key].abs().max() > 0
            torch.testing.assert_close(gradient, bn[key] + instance[key], rtol=1e-3, atol=1e-5)
        elif key.startswith("head_in."):
            assert torch.equal(gradient, instance[key.replace("head_in.", "head.")])
        else:
            assert torch.equal(gradient, bn[key])


def test_equal_paths_and_heads_double_the_baseline() -> None:
    """With both passes on BN and one head for both, loss and gradient are twice the plain ones."""
    method = two_path()
    baseline = one_path(method, "batch")
    method.head_in = method.head
    maps = method.maps
    method.maps = lambda images, path: maps(images, "bn")  # type: ignore[method-assign, assignment]
    data = mixed_batch()
    losses, expected = method.training_losses(data, 0), baseline.training_losses(data, 0)
    torch.testing.assert_close(losses["loss/total"], 2 * expected["loss/total"])
    losses["loss/total"].backward()
    expected["loss/total"].backward()
    ours, plain = gradients(method), gradients(baseline)
    assert ours.keys() == plain.keys()
    for key in plain:
        torch.testing.assert_close(ours[key], 2 * plain[key], rtol=1e-3, atol=1e-6)


def test_running_statistics_are_those_of_one_plain_forward() -> None:
    method = two_path()
    baseline = one_path(method, "batch")
    data = mixed_batch()
    method.training_losses(data, 0)["loss/total"].backward()
    baseline.backbone(data.images)
    buffers = dict(baseline.backbone.named_buffers())
    assert dict(method.backbone.named_buffers()).keys() == buffers.keys()
    for key, value in method.backbone.named_buffers():
        assert torch.equal(value, buffers[key]), key
    assert method.backbone.get_submodule("layer3.0.bn2").num_batches_tracked == 1


def test_a_pass_of_the_instance_path_writes_nothing() -> None:
    method = two_path()
    before = copy.deepcopy(method.state_dict())
    method.maps(mixed_batch().images, "in").sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_each_path_alone_is_the_plain_network(training: bool) -> None:
    method = two_path()
    method.training_losses(mixed_batch(3), 0)
    images = mixed_batch().images
    for path, norm in (("bn", "batch"), ("in", "instance")):
        plain = one_path(method, norm)
        method.train(training)
        assert torch.equal(method.maps(images, path), plain.train(training).backbone(images))  # type: ignore[arg-type]


def settled(**changes: object) -> Method:
    method = two_path(**changes)
    for seed in range(3):
        method.training_losses(mixed_batch(seed), 0)
    return method.eval()


def test_fused_is_the_sum_of_both_normalised_features() -> None:
    images = mixed_batch(4).images
    with torch.no_grad():
        parts: dict[str, Tensor] = {path: settled(inference=path)(images) for path in ("fused", "bn", "in")}
        method = settled()
        assert isinstance(method, TwoPath)
        for path in ("bn", "in"):
            assert torch.equal(parts[path], normalize(gem(method.maps(images, path), 3.0)))  # type: ignore[arg-type]
    torch.testing.assert_close(parts["fused"], parts["bn"] + parts["in"])
    assert not torch.allclose(parts["bn"], parts["in"], atol=1e-2)


@pytest.mark.parametrize(("inference", "forwards"), [("fused", 2), ("bn", 1), ("in", 1)])
def test_test_setting_says_its_cost(inference: str, forwards: int) -> None:
    method = settled(inference=inference)
    passed: list[int] = []
    method.backbone.conv1.register_forward_hook(lambda m, i, y: passed.append(len(y)))
    method(mixed_batch().images)
    assert sum(passed) == 12 * forwards
    assert method.cost.test_forwards == forwards
    assert method.cost.train_passes == 2
    assert method.inference == inference


def test_it_is_lda_without_bank_and_latent_losses() -> None:
    """LDA whose second path is IN and whose latent losses weigh nothing, on one source: the same weights from the
    seed, the same losses."""
    lda = build(
        "lda",
        (5,),
        network_a="in",
        classifier="joint",
        consistency_weight=0.0,
        alignment_weight=0.0,
        bank_warmup_updates=0,
        warmup_epochs=0,
    )
    ours = build("two_path", (5,))
    data = mixed_batch()
    data = data._replace(domains=torch.zeros(12, dtype=torch.int64), labels=torch.arange(5).repeat(3)[:12])
    assert data.labels.unique(return_counts=True)[1].min() == 2
    losses, expected = ours.training_losses(data, 0), lda.training_losses(data, 0)
    for own, theirs in (("total", "total"), ("id_bn", "id_e"), ("triplet_bn", "triplet_e"), ("id_in", "id_a")):
        torch.testing.assert_close(losses[f"loss/{own}"], expected[f"loss/{theirs}"])
    torch.testing.assert_close(losses["loss/triplet_in"], expected["loss/triplet_a"])


def test_layers_begin_with_the_plain_networks_statistics() -> None:
    """Pretrained running statistics are not lost."""
    from lda.methods.two_path import use_two_paths
    from lda.parts.backbones import build_backbone

    torch.manual_seed(0)
    plain = build_backbone("small")
    plain(mixed_batch().images)
    ours = copy.deepcopy(plain)
    switch = use_two_paths(ours)
    with switch.on("bn"):
        assert torch.equal(ours.eval()(mixed_batch(1).images), plain.eval()(mixed_batch(1).images))


def test_a_pass_needs_a_path_and_a_map() -> None:
    method = two_path()
    with pytest.raises(RuntimeError, match="needs a route"):
        method.backbone(mixed_batch().images)
    with pytest.raises(UsageError, match="image_height, image_width"):
        method.maps(torch.randn(2, 3, 4, 4), "in")
