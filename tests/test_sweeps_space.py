"""The search space: axes and points against lda.config and against Optuna's own distributions."""

from __future__ import annotations

import optuna
import pytest

from lda import methods
from lda.config import preset
from lda.errors import UsageError
from sweeps.plan.space import Axis, checked_axis, checked_point, distributions, grid

METHOD = "lda"
SPACE = {
    "bank_momentum": Axis(low=0.5, high=0.99),
    "alignment_weight": Axis(low=0.01, high=5.0, log=True),
    "epochs": Axis(low=2, high=8, step=2),
    "donor": Axis(choices=("uniform", "round_robin")),
}


def checked() -> dict[str, Axis]:
    return {key: checked_axis(key, axis, METHOD) for key, axis in SPACE.items()}


def test_distributions_say_the_same() -> None:
    found = distributions(checked(), METHOD)
    assert list(found) == list(SPACE)
    assert found["bank_momentum"] == optuna.distributions.FloatDistribution(0.5, 0.99)
    assert found["alignment_weight"] == optuna.distributions.FloatDistribution(0.01, 5.0, log=True)
    assert found["epochs"] == optuna.distributions.IntDistribution(2, 8, step=2)
    assert found["donor"] == optuna.distributions.CategoricalDistribution(("uniform", "round_robin"))


def test_every_proposal_of_a_sampler_is_a_valid_point() -> None:
    space = checked()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        params = study.ask(distributions(space, METHOD)).params
        assert checked_point(space, params, METHOD) == params


def test_optuna_alone_would_accept_a_point_outside(recwarn: pytest.WarningsRecorder) -> None:
    """Why points are checked here: if Optuna refuses one day, this says so and the check may go."""
    study = optuna.create_study()
    study.enqueue_trial({"bank_momentum": 7.0})
    assert study.ask(distributions({"bank_momentum": SPACE["bank_momentum"]}, METHOD)).params == {"bank_momentum": 7.0}
    assert any("out of range" in str(w.message) for w in recwarn)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("bank_momentum", 0.49, "is outside the swept range 0.5 to 0.99"),
        ("bank_momentum", float("nan"), "out of range"),
        ("epochs", 3, "is not low 2 plus whole steps of 2"),
        ("donor", "other", "unknown value 'other'"),
        ("gem_p", 3.0, "unknown swept setting"),
    ],
)
def test_points_off_the_axes(key: str, value: object, expected: str) -> None:
    with pytest.raises(UsageError, match=f"^{key}: .*{expected}"):
        checked_point(checked(), {key: value}, METHOD)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(low=0.9, high=0.5), "low 0.9 must be below high 0.5"),
        (Axis(low=0.5, high=0.9, step=0.5), "step: expected a value in 0 to"),
        (Axis(low=0.5, high=0.9, choices=(0.5,)), "choices stand alone"),
        (Axis(choices=(0.5, 0.5)), "each value once"),
        (Axis(low=0.5), "expected low and high"),
    ],
)
def test_axes_that_make_no_sense(axis: Axis, expected: str) -> None:
    with pytest.raises(UsageError, match=f"^bank_momentum.*{expected}"):
        checked_axis("bank_momentum", axis, METHOD)


def test_grid() -> None:
    space = {"epochs": SPACE["epochs"], "donor": SPACE["donor"]}
    points = grid(space, seed=0)
    assert {(p["epochs"], p["donor"]) for p in points} == {
        (e, d) for e in (2, 4, 6, 8) for d in ("uniform", "round_robin")
    }
    assert len(points) == 8
    assert points == grid(space, seed=0) != grid(space, seed=1)
    decimal = grid({"alignment_weight": Axis(low=0.1, high=0.7, step=0.2)}, seed=0)
    assert sorted(p["alignment_weight"] for p in decimal) == pytest.approx([0.1, 0.3, 0.5, 0.7])


def test_an_axis_that_says_nothing_takes_what_the_settings_line_says() -> None:
    assert checked_axis("alignment_weight", Axis(), METHOD) == Axis(low=0.01, high=5.0, log=True)
    assert checked_axis("heads", Axis(), METHOD) == Axis(choices=("separate", "shared"))
    assert checked_axis("bank_warmup_updates", Axis(), METHOD) == Axis(low=0, high=100)
    with pytest.raises(UsageError, match="epochs: its line names no range to search"):
        checked_axis("epochs", Axis(), METHOD)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("average_precision", "trials that are tested in other ways do not compare"),
        ("test_split", "trials that are tested in other ways do not compare"),
        ("inference", "trials that are tested in other ways do not compare"),
        ("cuhk03_protocol", "trials that are tested in other ways do not compare"),
        ("selection", "trials that are ranked by other scores do not compare"),
        ("validation_fraction", "trials that are ranked by other scores do not compare"),
        ("cuhk03_boxes", "trials that read other images do not compare"),
        ("seed", "it is set for the whole study"),
        ("method", "a study has one method"),
        ("threads", "it cannot change what is learnt"),
        ("milestones", "it is no single value"),
    ],
)
def test_only_what_is_learnt_may_be_swept(key: str, why: str) -> None:
    """W8: everything else would rank trials on different rulers."""
    with pytest.raises(UsageError, match=f"^{key}: cannot be swept: {why}"):
        checked_axis(key, Axis(choices=(1, 2)), METHOD)


def test_a_setting_of_another_method_is_not_swept() -> None:
    with pytest.raises(UsageError, match="baseline_norm: is a setting of method baseline; this run's method is lda"):
        checked_axis("baseline_norm", Axis(), METHOD)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_says_how_it_is_searched(name: str) -> None:
    """What its file asks for makes a space, with the defaults in it."""
    space = {key: checked_axis(key, Axis(), name) for key in methods.find(name).searched}
    config = preset("standin", method=name)
    defaults = {key: config.value(key) for key in space}
    assert checked_point(space, defaults, name) == defaults
    assert list(distributions(space, name)) == list(space)
