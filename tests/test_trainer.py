"""The trainer's part of a step: what `update` promises, augmentation on the device, the check of weights."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tasks import make_task
from torch import Tensor, nn

from lda import methods
from lda.batch import Batch, Layout
from lda.config import preset
from lda.data.sources import Task
from lda.groups import Setup
from lda.methods.base import Losses, Method, ParameterGroup, Update
from lda.settings import Settings
from lda.trainer import Trainer, TrainingError

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Nothing(Settings):
    pass


class TwoParts(Method):
    """A linear map and a gate; tests give it the step they want."""

    title = "two parts"
    reference = "this test"
    Settings = Nothing
    LAYOUT = Layout(views=2)

    def __init__(self, settings: Any, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.map = nn.Conv2d(3, 4, 1)
        self.gate = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(1))
        self.seen: list[Batch] = []
        self.prepared = 0

    @property
    def layout(self) -> Layout:
        return self.LAYOUT

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        return {
            "main": ParameterGroup(list(self.map.parameters())),
            "gates": ParameterGroup([self.gate], rate=10.0, decay=False),
        }

    def prepare(self, sources: Any) -> None:
        self.prepared = sum(len(batch.labels) for batch in sources)

    def features(self, images: Tensor) -> Tensor:
        return self.map(images).mean((2, 3)) * self.gate

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        self.seen.append(batch)
        return self.behave(batch, step, update)

    behave: Any = None


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("tasks"), 2)


def trainer_of(task: Task, monkeypatch: pytest.MonkeyPatch, behave: Any, **changes: Any) -> Trainer:
    def build(chosen: object, setup: Setup) -> Method:
        torch.manual_seed(setup.seed)
        return TwoParts(Nothing(), setup)

    monkeypatch.setattr(methods, "build", build)
    settings = {"image_height": 32, "image_width": 16, "ids_per_batch": 4, "images_per_id": 2, "warmup_epochs": 0}
    trainer = Trainer(preset("standin", threads=1, **{**settings, **changes}), task, CPU)
    if behave is not None:
        trainer.method.behave = behave.__get__(trainer.method)
    return trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in trainer.method.state_dict().items()}


def test_only_the_named_groups_move_and_keep_their_moments(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(self: TwoParts, batch: Batch, step: int, update: Update) -> Losses:
        losses = {"loss/total": self.features(batch.images).square().mean()}
        update(losses, groups=("main",) if step < 2 else ("gates",))
        return losses

    trainer = trainer_of(task, monkeypatch, behave)
    for step in range(2):
        trainer.train_step(trainer.batches[step])
    before, moments = state(trainer), copy.deepcopy(trainer.optimizer.state_dict()["state"])
    assert torch.equal(before["gate"], torch.ones(4))
    trainer.train_step(trainer.batches[2])
    after = state(trainer)
    assert torch.equal(after["map.weight"], before["map.weight"])
    assert torch.equal(after["frozen"], torch.ones(1))
    assert not torch.equal(after["gate"], before["gate"])
    for number, values in moments.items():
        for key, value in values.items():
            assert torch.equal(value, trainer.optimizer.state_dict()["state"][number][key])


def test_groups_have_their_own_rate_and_decay(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD without momentum history: the first step is rate x (gradient + decay x weight)."""

    def behave(self: TwoParts, batch: Batch, step: int, update: Update) -> Losses:
        losses = {"loss/total": self.gate.sum() + self.map.weight.sum() + self.map.bias.sum()}
        update(losses, groups=("main", "gates"), rule="plain_sgd")
        return losses

    trainer = trainer_of(task, monkeypatch, behave, learning_rate=0.01, weight_decay=0.5)
    before = state(trainer)
    row = trainer.train_step(trainer.batches[0])
    after = state(trainer)
    assert row["lr"] == pytest.approx(0.01)
    torch.testing.assert_close(after["gate"], before["gate"] - 0.1)
    torch.testing.assert_close(after["map.weight"], before["map.weight"] - 0.01 * (1 + 0.5 * before["map.weight"]))
    assert trainer.optimizer.state_dict()["state"] == {}, "plain_sgd leaves the optimiser alone"


def test_several_updates_are_one_step_and_none_is_an_error(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(self: TwoParts, batch: Batch, step: int, update: Update) -> Losses:
        for name in ("main", "gates") if step == 0 else ():
            update({"loss/total": self.features(batch.images).mean(), f"loss/{name}": self.gate.sum()}, groups=(name,))
        return {"feature/watched": self.gate.mean()}

    trainer = trainer_of(task, monkeypatch, behave)
    row = trainer.train_step(trainer.batches[0])
    assert trainer.step == 1
    assert {"loss/total", "loss/main", "loss/gates", "feature/watched", "lr"} == set(row)
    with pytest.raises(TrainingError, match="train_step ended without an update"):
        trainer.train_step(trainer.batches[1])
    assert trainer.step == 1


def test_a_term_that_is_not_finite_is_named_before_anything_moves(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(self: TwoParts, batch: Batch, step: int, update: Update) -> Losses:
        bad = self.gate.sum() * torch.nan
        losses = {"loss/total": bad + self.gate.sum(), "loss/bad": bad, "loss/good": self.gate.sum()}
        update(losses, groups=("gates",))
        return losses

    trainer = trainer_of(task, monkeypatch, behave)
    before = state(trainer)
    message = r"loss/bad is nan at step 0 \(epoch 0, domains source0, source1, learning rate 0.002\); try a lower"
    with pytest.raises(TrainingError, match=message):
        trainer.train_step(trainer.batches[0])
    assert all(torch.equal(before[key], value) for key, value in state(trainer).items())


def test_an_unknown_group_is_told(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(self: TwoParts, batch: Batch, step: int, update: Update) -> Losses:
        update({"loss/total": self.gate.sum()}, groups=("gate",))
        return {}

    trainer = trainer_of(task, monkeypatch, behave)
    with pytest.raises(ValueError, match="the method's parameter groups are main, gates"):
        trainer.train_step(trainer.batches[0])


def test_a_layout_of_two_views_shows_two_augmentations(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the trainer augments uint8 batches itself, from the generator of step and view; here on the CPU."""

    def behave(self: TwoParts, batch: Batch, step: int, update: Update) -> Losses:
        losses = {"loss/total": self.features(batch.images).mean()}
        update(losses)
        return losses

    usual, deferred = (trainer_of(task, monkeypatch, behave, auto_augment_probability=0.3) for _ in range(2))
    deferred.batches.augmented = False
    for step in range(3):
        rows = [trainer.train_step(trainer.batches[step]) for trainer in (usual, deferred)]
        assert rows[0] == rows[1]
        ours, theirs = usual.method.seen[step], deferred.method.seen[step]
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.second, theirs.second)
        assert not torch.equal(ours.images, ours.second)
    assert deferred.batches[0].images.dtype == torch.uint8


def test_a_second_view_may_be_strong(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first view is what it was; of probability 0 nothing is left but flip and crop."""
    plain = trainer_of(task, monkeypatch, None).batches[3]
    monkeypatch.setattr(TwoParts, "LAYOUT", Layout(views=2, strong=1.0))
    strong = trainer_of(task, monkeypatch, None).batches[3]
    assert torch.equal(plain.images, strong.images)
    assert (strong.second - plain.second).abs().mean() > 0.1
    again = trainer_of(task, monkeypatch, None).batches[3]
    assert torch.equal(strong.second, again.second)


def test_a_layout_of_two_batches_adds_other_images(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step t shows batches 2t and 2t + 1 of the sequence that one batch a step shows one by one."""

    def behave(self: TwoParts, batch: Batch, step: int, update: Update) -> Losses:
        losses = {"loss/total": self.features(batch.images).mean()}
        update(losses)
        return losses

    monkeypatch.setattr(TwoParts, "LAYOUT", Layout())
    single = trainer_of(task, monkeypatch, behave)
    monkeypatch.setattr(TwoParts, "LAYOUT", Layout(batches=2))
    double, deferred = (trainer_of(task, monkeypatch, behave) for _ in range(2))
    deferred.batches.augmented = False
    for step in range(3):
        for trainer in (double, deferred):
            trainer.train_step(trainer.batches[step])
            shown = trainer.method.seen[step]
            for batch, number in ((shown, 2 * step), (shown.extra, 2 * step + 1)):
                expected = single.batches[number]
                assert torch.equal(batch.images, expected.images)
                assert torch.equal(batch.labels, expected.labels)
                assert torch.equal(batch.domains, expected.domains)
            assert shown.extra.extra is None


def test_a_method_may_deal_identities_and_look_at_sources_again(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its look comes before the batch is made, every time it asks for one, on resume too."""
    order: list[str] = []

    def identities(self: TwoParts, step: int) -> list[tuple[int, Any]]:
        order.append(f"deal {step}")
        return [(step % 2, np.array([step, step + 1]))]

    def behave(self: TwoParts, batch: Batch, step: int, update: Update) -> Losses:
        order.append(f"step {step}")
        assert batch.labels.tolist() == [step, step, step + 1, step + 1]
        assert set(batch.domains.tolist()) == {step % 2}
        losses = {"loss/total": self.features(batch.images).mean()}
        update(losses)
        return losses

    monkeypatch.setattr(TwoParts, "LAYOUT", Layout(dealt="method"))
    monkeypatch.setattr(TwoParts, "identities", identities)
    monkeypatch.setattr(TwoParts, "looks_at_sources", lambda self, step: step % 2 == 0)
    monkeypatch.setattr(TwoParts, "prepare", lambda self, sources: order.append("look"))
    trainer = trainer_of(task, monkeypatch, behave, loader_workers=2)
    for batch in itertools.islice(trainer.loader(), 3):
        trainer.train_step(batch)
    assert order == ["look", "deal 0", "step 0", "deal 1", "step 1", "look", "deal 2", "step 2"]
    order.clear()
    trainer.train_step(next(trainer.loader()))
    assert order == ["deal 3", "step 3"]


def test_prepare_sees_every_source_image_once(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(task, monkeypatch, lambda self, batch, step, update: {})
    trainer.prepare()
    assert trainer.method.prepared == sum(len(source.records) for source in task.sources)


def test_weights_that_are_not_finite_are_told(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(task, monkeypatch, lambda self, batch, step, update: {})
    trainer.check_weights()
    with torch.no_grad():
        trainer.method.gate[0] = torch.inf
    with pytest.raises(TrainingError, match="gate is not finite after step 0"):
        trainer.check_weights()
