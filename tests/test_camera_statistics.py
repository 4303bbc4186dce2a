"""Batch normalisation by the images of a camera, against what forward hooks see enter every layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mixed_batches import build, mixed_batch
from torch import Tensor, nn

from lda.errors import UsageError
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
    taken = images_of_camera(batches(*[(4, 1, "query")] * 3), number, "x")
    assert taken[:, 0, 0, 0].tolist() == list(range(expected))


def test_no_more_batches_are_taken_than_are_needed() -> None:
    left = batches(*[(4, 1, "query")] * 3)
    images_of_camera(left, 4, "x")
    assert next(left)[0][0, 0, 0, 0] == 4


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([(2, -1, "query")], UsageError, "some_setting: .*; set some_setting"),
        ([(2, 1, "query"), (2, 2, "query")], ValueError, "one camera"),
        ([(2, 1, "query"), (2, 1, "gallery")], ValueError, "one camera"),
        ([], ValueError, "one camera"),
    ],
)
def test_what_is_no_camera_is_refused(groups: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        images_of_camera(batches(*groups), 10, "some_setting")
