"""What every method keeps to, whatever it does: one class, run over every file in lda/methods.

A method that is added is under test by being there. What is particular about a method is tested in tests/test_<method>.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from glossary import unexplained
from tasks import make_task

from lda import methods
from lda.config import COMMON, Config, known_settings, preset
from lda.data.sources import Task
from lda.errors import UsageError
from lda.settings import settings_of
from lda.step_cost import convolutions_counted
from lda.testing import Evaluator
from lda.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 48  # more than any warm-up of a method needs with the stand-in's settings
SOME = 6


def config_of(name: str, **changes: Any) -> Config:
    small = {
        "image_height": 32,
        "image_width": 16,
        "ids_per_batch": 6,
        "images_per_id": 2,
        "pad": 1,
        "warmup_epochs": 0,
    }
    return preset("standin", method=name, threads=1, **{**small, "warmup_epochs": 0, "learning_rate": 1e-3, **changes})


def trainer_of(name: str, task: Task, **changes: Any) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(config_of(name, **changes), task, CPU)


def run(trainer: Trainer, until: int) -> list[dict[str, float]]:
    """Train up to a step; the scalars of every step."""
    return [trainer.train_step(batch) for batch in itertools.islice(trainer.loader(), until - trainer.step)]


def state(trainer: Trainer) -> dict[str, Any]:
    """Everything that training changes, flat: weights, buffers, extra states, moments."""
    flat: dict[str, Any] = {f"method/{key}": value for key, value in trainer.method.state_dict().items()}
    for number, moments in trainer.optimizer.state_dict()["state"].items():
        flat |= {f"optimizer/{number}/{key}": value for key, value in moments.items()}
    return {key: value.clone() for key, value in flat.items()}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def refused_or(build: Callable[[], Trainer], why: str | None) -> Trainer | None:
    """What is built, or None when it is refused in one line that says `why`; why=None: nothing may be refused."""
    try:
        return build()
    except UsageError as error:
        if why is None or why not in str(error) or "\n" in str(error):
            raise
        return None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def task(root: Path) -> Task:
    return make_task(root, 3)


@pytest.fixture(scope="module")
def trained(task: Task) -> dict[str, Trainer]:
    """A trainer of every method after STEPS steps; read only, made when first asked for."""
    return _Trained(task)


class _Trained(dict[str, Trainer]):
    def __init__(self, task: Task) -> None:
        self.task = task

    def __missing__(self, name: str) -> Trainer:
        trainer = self[name] = trainer_of(name, self.task)
        trainer.gradients = set()  # type: ignore[attr-defined]
        for batch in itertools.islice(trainer.loader(), STEPS):
            scalars = trainer.train_step(batch)
            assert all(math.isfinite(value) for value in scalars.values()), scalars
            assert unexplained(scalars) == []
            trainer.gradients |= {n for n, p in trainer.method.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
        return trainer


class _Plain(NamedTuple):
    """Multiply-adds of the plain network's convolutions per image: of a training step, and of a forward pass."""

    step: float
    forward: float


@pytest.fixture(scope="module")
def plain(task: Task) -> _Plain:
    trainer = trainer_of(methods.CONTROL, task)
    batch = trainer.batches[0]
    with convolutions_counted() as training:
        trainer.train_step(batch)
    with convolutions_counted() as testing, torch.no_grad():
        trainer.method.eval()(batch.images)
    return _Plain(training() / len(batch.labels), testing() / len(batch.labels))


@pytest.mark.parametrize("name", methods.names())
class TestEveryMethod:
    def test_says_what_it_is(self, name: str) -> None:
        method = methods.find(name)
        assert method.title
        assert method.reference
        assert method.__module__.rpartition(".")[2] == name
        known = settings_of(method.Settings)
        assert set(method.searched) <= set(known)
        assert not set(known) & {*COMMON, "method"}, "keys are flat: a method may not use a common one"
        for key, setting in known.items():
            assert setting.help, key
            assert setting.search is not None or setting.kind not in (int, float), f"{key} says no range to search"
            if setting.search is not None:
                low, high = setting.search.low, setting.search.high
                assert setting.low is None or low >= setting.low, key
                assert setting.high is None or high <= setting.high, key
                assert low < high, key
        for key in method.searched:
            assert known[key].search is not None or known[key].choices, f"{key} is searched and has no range"
            assert not known[key].test, f"{key} is a test setting: it is not searched"

    def test_learns_with_finite_losses_and_a_gradient_for_every_parameter(
        self, name: str, trained: dict[str, Trainer]
    ) -> None:
        trainer = trained[name]
        groups = trainer.method.parameter_groups()
        listed = {id(parameter) for group in groups.values() for parameter in group.parameters}
        trainable = {key for key, p in trainer.method.named_parameters() if id(p) in listed}
        assert trainable - trainer.gradients == set()  # type: ignore[attr-defined]
        assert sum(len(group.parameters) for group in groups.values()) == len(listed), "a parameter is in two groups"

    def test_encodes_every_image_on_its_own(self, name: str, trained: dict[str, Trainer]) -> None:
        method = copy.deepcopy(trained[name].method).eval()
        images = torch.randn(7, 3, 32, 16, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            together = method(images)
            assert together.isfinite().all()
            alone = torch.cat([method(image[None]) for image in images])
            order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
            torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(method(images[order]), together[order], rtol=1e-3, atol=1e-4)
            method.train()
            assert torch.equal(method.eval()(images), together), "the mode before the call changes the encoding"

    def test_activation_maps_are_energies_of_every_image_on_its_own_or_none(
        self, name: str, trained: dict[str, Trainer]
    ) -> None:
        method = copy.deepcopy(trained[name].method).eval()
        images = torch.randn(3, 3, 32, 16, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            encodings = method(images)
            maps = method.activation_maps(images)
            for energy in maps.values():
                assert energy.ndim == 3
                assert len(energy) == 3
                assert (energy >= 0).all()
                assert energy.isfinite().all()
            for path, energy in method.activation_maps(images[1:2]).items():
                torch.testing.assert_close(energy, maps[path][1:2], rtol=1e-3, atol=1e-4)
            assert torch.equal(method(images), encodings), "looking at the maps changes the encoding"

    def test_evaluation_writes_nothing(self, name: str, trained: dict[str, Trainer], task: Task) -> None:
        trainer = trained[name]
        before = state(trainer)
        evaluation = Evaluator(task.test_splits, trainer.config, CPU)(trainer.method)
        assert 0 <= evaluation.mAP <= 1
        assert trainer.method.training
        assert_equal(before, state(trainer))

    def test_goes_on_from_a_checkpoint_to_the_bit(self, name: str, task: Task) -> None:
        straight, broken = trainer_of(name, task), trainer_of(name, task)
        logged = run(straight, SOME + 8)
        run(broken, SOME)
        file = io.BytesIO()
        torch.save(vars(broken.checkpoint("unit", "training")) | {"config": None}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        later = trainer_of(name, task)
        later.method.load_state_dict(saved["method"])
        later.optimizer.load_state_dict(saved["optimizer"])
        later.step = saved["step"]
        assert run(later, SOME + 8) == logged[SOME:]
        assert_equal(state(straight), state(later))

    def test_seed_fixes_everything_and_the_global_generator_is_left_alone(self, name: str, task: Task) -> None:
        def after(seed: int) -> dict[str, Any]:
            trainer = trainer_of(name, task, seed=seed)
            run(trainer, SOME)
            return state(trainer)

        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        first = after(3)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(2)
        assert_equal(first, after(3))
        other = after(4)
        assert any(not torch.equal(first[key], other[key]) for key in first)

    @pytest.mark.parametrize("num_domains", [1, 2, 4, 5])
    def test_any_number_of_sources_or_a_clear_refusal(self, name: str, num_domains: int, root: Path) -> None:
        small = make_task(root, num_domains)
        trainer = refused_or(lambda: trainer_of(name, small), "source domain" if num_domains <= 2 else None)
        if trainer is None:
            return
        for scalars in run(trainer, 3):
            assert all(math.isfinite(value) for value in scalars.values())

    def test_two_steps_on_mobilenet_or_a_clear_refusal(self, name: str, task: Task) -> None:
        trainer = refused_or(lambda: trainer_of(name, task, backbone="mobilenet_v2"), "; set backbone to one of: ")
        if trainer is None:
            return
        for scalars in run(trainer, 2):
            assert all(math.isfinite(value) for value in scalars.values())
        with torch.no_grad():
            assert trainer.method.eval()(torch.zeros(2, 3, 32, 16)).isfinite().all()

    def test_declared_cost_is_what_is_counted(self, name: str, trained: dict[str, Trainer], plain: _Plain) -> None:
        """A training pass is three forward passes: the plain network's stem has no gradient of images to compute, and
        that is too small to be seen here."""
        trainer = copy.deepcopy(trained[name])
        batches = list(itertools.islice(trainer.loader(), 12))
        with convolutions_counted() as training:
            for batch in batches:
                trainer.train_step(batch)
        passes = training() / sum(plain.step * len(batch.labels) for batch in batches)
        cost = trainer.method.cost
        assert passes == pytest.approx(cost.train_passes, rel=0.03)
        with convolutions_counted() as testing, torch.no_grad():
            trainer.method.eval()(torch.zeros(5, 3, 32, 16))
        assert testing() / (5 * plain.forward) == pytest.approx(cost.test_forwards, rel=0.03)
        assert (cost.test == "vector") == (trainer.method.scorer().pair_cost is None)

    def test_recomputed_activations_change_nothing_or_are_refused(self, name: str, task: Task) -> None:
        plain = trainer_of(name, task)
        changed = {"activation_checkpointing": True}
        recomputing = refused_or(lambda: trainer_of(name, task, **changed), "activation_checkpointing")
        if recomputing is None:
            return
        run(plain, SOME)
        run(recomputing, SOME)
        assert_equal(state(plain), state(recomputing))

    def test_a_loss_that_is_not_finite_is_named(self, name: str, task: Task) -> None:
        trainer = trainer_of(name, task)
        batch = next(iter(trainer.loader()))
        poisoned = batch._replace(images=torch.full_like(batch.images, torch.nan))
        with pytest.raises(Exception, match=r"loss/\S+ is nan at step 0"):
            trainer.train_step(poisoned)

    def test_what_is_kept_can_be_written(self, name: str, trained: dict[str, Trainer], tmp_path: Path) -> None:
        trainer = trained[name]
        for kept_name, kept in trainer.method.kept(["a", "b", "c"]).items():
            np.savez(tmp_path / kept_name, **kept.arrays)
            read = np.load(tmp_path / f"{kept_name}.npz", allow_pickle=False)
            assert set(read) == set(kept.arrays)

    @pytest.mark.slow
    def test_every_choice_trains(self, name: str, task: Task) -> None:
        """One run per value of every setting that has a list of them: finite, and no setting is without effect."""
        known = {key: s for key, s in settings_of(methods.find(name).Settings).items() if s.choices}
        for key, setting in known.items():
            for choice in setting.choices:
                changed = {key: choice}
                trainer = refused_or(lambda changed=changed: trainer_of(name, task, **changed), "; set ")
                if trainer is None:
                    continue  # it contradicts another setting's default
                for scalars in run(trainer, 3):
                    assert all(math.isfinite(value) for value in scalars.values()), (key, choice)
                with torch.no_grad():
                    assert trainer.method.eval()(torch.zeros(2, 3, 32, 16)).isfinite().all(), (key, choice)


def test_known_settings_of_a_method_are_the_common_ones_and_its_own() -> None:
    for name in methods.names():
        own = settings_of(methods.find(name).Settings)
        assert set(known_settings(name)) == {*COMMON, "method", *own}
