"""Batch normalisation by the images of a camera, against what forward hooks see enter every layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mixed_batches import build, mixed_batch, shaken
from torch import Tensor, nn

from lda.config import preset
from lda.errors import UsageError
from lda.methods.base import Method, TargetImages
from lda.parts.anti_norm import BufferBankNorm2d
from lda.parts.backbones import build_backbone
from lda.parts.batch_instance_norm import gates_of, use_batch_instance_norm
from lda.parts.camera_statistics import images_of_camera, take_camera_statistics

IMAGES = torch.randn(9, 3, 32, 16, generator=torch.Generator().manual_seed(3)) * 2 + 1


class Network(nn.Module):
    """A backbone with a neck: layers of two and of one dimension."""

    def __init__(self, batch_instance: bool) -> None:
        super().__init__()
        self.backbone = build_backbone("small")
        if batch_instance:
            use_batch_instance_norm(self.backbone)
            for gate in gates_of(self.backbone).values():
                gate.uniform_(0.2, 0.9)
        self.neck = nn.BatchNorm1d(192)
        self.unused = nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.neck(self.backbone(images).mean((2, 3)))
        return features


def network_of(batch_instance: bool = False) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = Network(batch_instance)
        for _ in range(3):
            network.train()(torch.randn(4, 3, 32, 16))
    return network.eval()


@pytest.mark.parametrize("batch_instance", [False, True])
def test_statistics_are_those_of_what_enters_a_layer(batch_instance: bool) -> None:
    """Mean and unbiased variance, of inputs that the layers below normalised by their own."""
    network = network_of(batch_instance)
    oracle, entered = copy.deepcopy(network), {}
    for name, module in oracle.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda m, inputs, name=name: entered.update({name: inputs[0].detach()}))
    oracle.train()(IMAGES)
    before = copy.deepcopy(network.state_dict())
    assert take_camera_statistics(network, IMAGES, [network])
    assert len(entered) == 13
    for name, x in entered.items():
        norm = network.get_submodule(name)
        dims = [dim for dim in range(x.ndim) if dim != 1]
        torch.testing.assert_close(norm.running_mean, x.mean(dims), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, x.var(dims, correction=1), rtol=1e-5, atol=1e-6)
        assert not norm.training
        assert norm.momentum == 0.1
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    assert not any(name.startswith("unused") for name in changed)
    assert not any(p.requires_grad and p.grad is not None for p in network.parameters())


def test_only_the_layers_that_are_named() -> None:
    network = network_of()
    before = copy.deepcopy(network.state_dict())
    take_camera_statistics(network, IMAGES, [network.backbone])
    assert torch.equal(network.neck.running_mean, before["neck.running_mean"])
    assert not torch.equal(network.backbone.bn1.running_mean, before["backbone.bn1.running_mean"])


def test_one_image_changes_nothing() -> None:
    network = network_of()
    before = copy.deepcopy(network.state_dict())
    assert not take_camera_statistics(network, IMAGES[:1], [network])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_layers_are_put_back_after_a_fault() -> None:
    network = network_of()
    with pytest.raises(RuntimeError):
        take_camera_statistics(network, torch.zeros(2, 5, 32, 16), [network])
    assert not any(module.training for module in network.modules())
    assert network.neck.momentum == 0.1


def test_in_single_precision_under_autocast() -> None:
    plain, mixed = network_of(), network_of()
    take_camera_statistics(plain, IMAGES, [plain])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        take_camera_statistics(mixed, IMAGES, [mixed])
    assert torch.equal(plain.neck.running_var, mixed.neck.running_var)


@pytest.mark.parametrize("method", ["baseline", "ibn"])
def test_works_on_other_methods(method: str) -> None:
    """What `encode` passes through; the features of the camera's images then have no offset that all share."""
    network = build(method).eval()
    before = network.encode(mixed_batch().images)
    assert take_camera_statistics(network.encode, mixed_batch().images, [network])
    assert not torch.equal(network.encode(mixed_batch().images), before)


def batches(*groups: tuple[int, int, str]) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Batches of (number, camera, side), whose images are numbered."""
    start = 0
    for number, camera, side in groups:
        images = torch.arange(start, start + number)[:, None, None, None].expand(number, 3, 2, 1)
        start += number
        yield images, torch.full((number,), camera), side


@pytest.mark.parametrize(("number", "expected"), [(3, 3), (4, 4), (5, 5), (100, 12)])
def test_the_first_images_of_a_camera(number: int, expected: int) -> None:
    taken = images_of_camera(batches(*[(4, 1, "query")] * 3), number)
    assert taken[:, 0, 0, 0].tolist() == list(range(expected))


def test_no_more_batches_are_taken_than_are_needed() -> None:
    left = batches(*[(4, 1, "query")] * 3)
    images_of_camera(left, 4)
    assert next(left)[0][0, 0, 0, 0] == 4


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([(2, 1, "query"), (2, 2, "query")], ValueError, "one camera"),
        ([(2, 1, "query"), (2, 1, "gallery")], ValueError, "one camera"),
        ([], ValueError, "one camera"),
    ],
)
def test_what_is_no_camera_is_refused(groups: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        images_of_camera(batches(*groups), 10)


# --- the control of methods that look at the target ------------------------------------------------------------------


def camera() -> Iterator[TargetImages]:
    for part in mixed_batch(5).images.split(4):
        yield TargetImages(part, torch.ones(len(part), dtype=torch.int64), "gallery")


def trained(method: str, **changes: Any) -> Method:
    found = build(method, camera_statistics="on", **changes)
    for step in range(3):
        batch = mixed_batch(step)
        for domain in range(3):
            own = batch.domains == domain
            part = batch._replace(images=batch.images[own], labels=batch.labels[own], domains=batch.domains[own])
            found.training_losses(batch if method == "baseline" else part, step)
    return found.eval()


@pytest.mark.parametrize("method", ["baseline", "lda"])
@torch.no_grad()
def test_the_control_takes_the_statistics_of_a_camera(method: str) -> None:
    """At every layer that normalises by what was learnt: mean and variance of what its images send into it."""
    found = trained(method, **({"inference": "expert"} if method == "lda" else {}))
    assert found.looks_at_target
    assert "camera statistics" in found.inference
    before, weights = found.encode(mixed_batch(6).images), copy.deepcopy(found.state_dict())
    adapted = copy.deepcopy(found)
    adapted.adapt(camera())
    layers = {
        name: module.camera if isinstance(module, BufferBankNorm2d) else module
        for name, module in adapted.backbone.named_modules()
        if isinstance(module, BufferBankNorm2d) or (isinstance(module, nn.BatchNorm2d) and "camera" not in name)
    }
    assert len(layers) == 12
    entered: dict[str, Tensor] = {}
    oracle = copy.deepcopy(adapted)
    for name in layers:
        oracle.backbone.get_submodule(name).register_forward_pre_hook(
            lambda m, inputs, name=name: entered.update({name: inputs[0]})
        )
    for name in layers:  # normalise by the batch, as while the statistics were taken
        site = oracle.backbone.get_submodule(name)
        (site.camera if isinstance(site, BufferBankNorm2d) else site).train()
    oracle.encode(mixed_batch(5).images)
    for name, norm in layers.items():
        var, mean = torch.var_mean(entered[name], (0, 2, 3), correction=1)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)
    assert not torch.equal(adapted.encode(mixed_batch(6).images), before)
    assert all(torch.equal(value, weights[key]) for key, value in found.state_dict().items())


@torch.no_grad()
def test_before_it_has_seen_a_camera_the_control_of_lda_is_the_mean_bank() -> None:
    found = shaken(trained("lda", inference="expert"))
    before = found.encode(mixed_batch(6).images)
    for layer in found.modules():
        if isinstance(layer, BufferBankNorm2d):
            layer.watch_camera()
    torch.testing.assert_close(found.encode(mixed_batch(6).images), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "changes"), [("baseline", {"baseline_norm": "instance"}), ("lda", {"inference": "aligned"})]
)
def test_the_control_is_refused_where_it_would_change_nothing(method: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"camera_statistics: .*; set camera_statistics=off"):
        build(method, camera_statistics="on", **changes)


@pytest.mark.parametrize("method", ["baseline", "lda"])
def test_the_control_renames_no_run_that_does_not_use_it(method: str) -> None:
    """Its settings joined late: at their defaults they are in no hash, otherwise in that of the result alone."""
    plain, on = (preset("standin", method=method, camera_statistics=value) for value in ("off", "on"))
    sources = {"a": "1"}
    assert plain.training_hash(sources) == on.training_hash(sources)
    assert plain.unit_hash(sources, "t") != on.unit_hash(sources, "t")
