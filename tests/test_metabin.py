"""MetaBIN's two updates: which of them moves what, on which images; the layers and the step are tested in
tests/test_batch_instance_norm.py."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import build, mixed_batch
from tasks import make_task
from torch import Tensor, nn

from lda.batch import Batch
from lda.config import preset
from lda.methods.base import Losses
from lda.methods.metabin import MetaBIN
from lda.parts.batch_instance_norm import gate_step, gates_of
from lda.trainer import Trainer, build_optimizer

FAST = {"metabin_warmup": 0, "metabin_gate_rate": 5.0, "metabin_inner_low": 0.1, "metabin_inner_high": 0.1}


def method_of(**changes: Any) -> MetaBIN:
    method = build("metabin", **{**FAST, **changes})
    assert isinstance(method, MetaBIN)
    return method


def two_batches() -> Batch:
    return mixed_batch(0)._replace(extra=mixed_batch(1))


class Adam:
    """An `Update` as the trainer's, in short."""

    def __init__(self, method: MetaBIN, rate: float = 1e-3) -> None:
        self.optimizer = build_optimizer(method.setup.schedule, method.parameter_groups())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.groups: list[tuple[str, ...]] = []

    def __call__(self, losses: Losses, groups: tuple[str, ...] = ("main",), rule: str = "optimiser") -> None:
        parameters = [p for g in self.optimizer.param_groups if g["name"] in groups for p in g["params"]]
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses["loss/total"], inputs=parameters)
        self.optimizer.step()
        self.groups.append(groups)


def no_update(losses: Losses, groups: tuple[str, ...] = ("main",), rule: str = "optimiser") -> None:
    pass


def changed(method: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}


def gate_names(method: MetaBIN) -> set[str]:
    return {f"backbone.{name}" for name in gates_of(method.backbone)}


def test_begins_as_the_plain_baseline_to_the_bit() -> None:
    """Maps, losses, gradients and running statistics of the first step."""
    method, plain = method_of(), build("baseline")
    batch = mixed_batch()
    ours, theirs = method.training_losses(batch, 0), plain.training_losses(batch, 0)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert torch.equal(method.backbone.bn1.batch.running_var, plain.backbone.bn1.running_var)
    ours["loss/total"].backward()
    theirs["loss/total"].backward()
    assert torch.equal(method.backbone.conv1.weight.grad, plain.backbone.conv1.weight.grad)
    with torch.no_grad():
        assert torch.equal(method.eval().backbone(batch.images), plain.eval().backbone(batch.images))


def test_every_layer_of_the_backbone_has_gates_and_the_neck_has_none() -> None:
    method = method_of()
    assert sum(gate.numel() for gate in gates_of(method.backbone).values()) == 1080
    assert len(gates_of(method.backbone)) == 12
    assert gates_of(method.head) == {}
    assert isinstance(method.head.necks[0], nn.BatchNorm1d)


def test_no_optimiser_sees_a_gate() -> None:
    method = method_of()
    listed = {id(p) for group in method.parameter_groups().values() for p in group.parameters}
    assert not any(id(gate) in listed for gate in gates_of(method.backbone).values())
    assert gate_names(method) <= set(method.state_dict())
    assert listed == {id(p) for p in method.parameters() if p.requires_grad}


def test_base_step_moves_weights_and_gate_step_moves_gates() -> None:
    method = method_of()
    update = Adam(method)
    before = copy.deepcopy(method.state_dict())
    method.train_step(two_batches(), 0, update)
    assert gate_names(method) & changed(method, before)
    assert {"backbone.conv1.weight", "head.classifiers.0.weight"} <= changed(method, before)
    assert update.groups == [("main", "undecayed")]

    before = copy.deepcopy(method.state_dict())
    moments = copy.deepcopy(update.optimizer.state_dict())
    gate_step(method.backbone, mixed_batch(1), method.settings, method.setup, 1)
    assert changed(method, before) <= gate_names(method)
    for number, state in update.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments["state"][number][key]) for key, value in state.items())


def test_gates_stay_in_bounds() -> None:
    method = method_of(metabin_gate_rate=10.0)
    update = Adam(method)
    seen = []
    for step in range(6):
        method.train_step(two_batches(), step, update)
        seen.append(torch.cat(list(gates_of(method.backbone).values())))
        assert 0 <= float(seen[-1].min()) <= float(seen[-1].max()) <= 1
    assert float(seen[-1].min()) < 1
    assert float((seen[-1] == 1).float().mean()) > 0


@pytest.mark.parametrize("which", ["second", "same"])
def test_gates_learn_from_the_batch_that_is_set(which: str) -> None:
    method, oracle = method_of(metabin_batch=which), method_of()
    assert method.layout.batches == (2 if which == "second" else 1)
    batch = two_batches() if which == "second" else mixed_batch(0)
    before = copy.deepcopy(method.state_dict())
    losses = method.train_step(batch, 0, no_update)
    oracle.training_losses(mixed_batch(0), 0)  # running statistics
    gate_step(oracle.backbone, mixed_batch(1 if which == "second" else 0), oracle.settings, oracle.setup, 0)
    for name, value in oracle.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name
    assert changed(method, before) & gate_names(method)
    assert {"loss/total", "loss/gate_held_out", "loss/gate_shuffle", "gate/mean"} <= set(losses)


def test_warm_up_has_no_gate_step() -> None:
    method = method_of(metabin_warmup=2)
    before = {name: gate.clone() for name, gate in gates_of(method.backbone).items()}
    for step in range(2):
        assert "gate/mean" not in method.train_step(two_batches(), step, no_update)
    assert all(torch.equal(gate, before[name]) for name, gate in gates_of(method.backbone).items())
    assert "gate/mean" in method.train_step(two_batches(), 2, no_update)


@pytest.mark.parametrize("which", ["second", "same"])
def test_goes_on_from_a_checkpoint_among_gate_steps(which: str, tmp_path: Path) -> None:
    """Gates, weights and moments to the bit; the split is drawn from (seed, step)."""
    small = {"image_height": 32, "image_width": 16, "ids_per_batch": 6, "images_per_id": 2, "threads": 1}
    config = preset("standin", method="metabin", metabin_batch=which, warmup_epochs=0, **FAST, **small)
    task = make_task(tmp_path, 3)
    straight, later = (Trainer(config, task, torch.device("cpu")) for _ in range(2))
    for batch in itertools.islice(straight.loader(), 3):
        straight.train_step(batch)
    later.restore(copy.deepcopy(straight.checkpoint("unit", "training")))
    logged = [[t.train_step(batch) for batch in itertools.islice(t.loader(), 3)] for t in (straight, later)]
    assert logged[0] == logged[1]
    assert logged[0][0]["gate/mean"] < 1, "gates have moved: there is something to go on from"
    assert changed(straight.method, later.method.state_dict()) == set()
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (straight, later)]
    for number, state in moments[0].items():
        assert all(torch.equal(value, moments[1][number][key]) for key, value in state.items())


def test_instance_affines_are_not_decayed() -> None:
    """100 steps of Adam with gradients of zero: everything else shrinks, these stay."""
    method = method_of()
    optimizer = build_optimizer(method.setup.schedule, method.parameter_groups())
    start = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    for name, parameter in method.named_parameters():
        if ".instance." in name:
            assert torch.equal(parameter, start[name]), name
        elif parameter.requires_grad and bool((start[name] != 0).any()):
            assert parameter.detach().norm() < start[name].norm(), name


def test_without_episodes_gates_are_learnt_by_the_main_optimiser_and_clamped() -> None:
    method = method_of(metabin_meta="off")
    assert method.label == "BIN"
    assert method.layout.batches == 1
    assert method.cost.train_passes == 1
    groups = method.parameter_groups()
    gates = gates_of(method.backbone)
    assert {id(gate) for gate in gates.values()} <= {id(p) for p in groups["undecayed"].parameters}
    assert not groups["undecayed"].decay
    update = Adam(method, rate=0.1)
    method.train_step(mixed_batch(), 0, update)
    values = torch.cat(list(gates.values())).detach()
    assert 0 <= float(values.min()) < 1
    assert float(values.max()) <= 1
    assert set(method.state_dict()) == set(method_of().state_dict())


def test_without_episodes_activations_may_be_recomputed() -> None:
    found = []
    for recompute in (False, True):
        method = method_of(metabin_meta="off", activation_checkpointing=recompute)
        update = Adam(method)
        for step in range(3):
            method.train_step(mixed_batch(step), step, update)
        found.append(method.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_tested_behind_the_neck() -> None:
    method = method_of()
    method.train_step(two_batches(), 0, Adam(method))
    images = mixed_batch(5).images
    with torch.no_grad():
        features = method.pooled(method.eval().backbone(images))
        neck = method.head.necks[0]
        behind = neck.weight * (features - neck.running_mean) / (neck.running_var + neck.eps).sqrt() + neck.bias
        torch.testing.assert_close(method.encode(images), F.normalize(behind), rtol=1e-4, atol=1e-5)
