"""The search space: which settings a study sweeps, and between which values.

A setting's own line (in `lda/groups.py`, or the method's file) says what a search should try; a study file may say
otherwise. An axis is checked against the setting's type and bounds, and so is every point that is enqueued: Optuna
itself accepts an enqueued value outside its range with no more than a warning (seen with 5.0).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lda.config import GROUPS, check_keys, known_settings
from lda.errors import UsageError, unknown
from lda.settings import Setting, checked, settings_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_MOST_POINTS = 10**6  # of a grid: they are all listed before any is tried

Point = dict[str, Any]
"""One value per swept setting."""

_WHY_NOT = {
    "run": "it is set for the whole study",
    "data": "trials that read other images do not compare",
    "selection": "trials that are ranked by other scores do not compare",
    "test": "trials that are tested in other ways do not compare",
    "machine": "it cannot change what is learnt",
}
"""Group -> why its settings are not swept."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values of one setting: `low` to `high` (inclusive; `log` scale or in whole `step`s), or a list of `choices`.

    With nothing given, what the setting's own line says.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[str | bool | int | float, ...] = ()

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of an axis without choices."""
        assert self.low is not None, "checked_axis refuses a range without low"
        assert self.high is not None, "checked_axis refuses a range without high"
        return self.low, self.high


Space = Mapping[str, Axis]


def swept_setting(key: str, method: str) -> Setting:
    """The setting of this name. Raises UsageError for one that `method` does not have, or that may not be swept."""
    check_keys([key], method)
    known = known_settings(method)[key]
    group = next((name for name, kind in GROUPS.items() if key in settings_of(kind)), "")
    why = "a study has one method" if key == "method" else _WHY_NOT.get("test" if known.test else group)
    if why is None and not (known.choices or known.kind in (int, float, bool)):
        why = "it is no single value"
    if why is not None:
        raise UsageError(f"{key}: cannot be swept: {why}")
    return known


def checked_axis(key: str, axis: Axis, method: str) -> Axis:
    """`axis` with its values in the setting's type. Raises UsageError that starts with the key at fault."""
    known = swept_setting(key, method)
    if axis == Axis():
        axis = _own_axis(known)
    if axis.choices:
        if (axis.low, axis.high, axis.step, axis.log) != (None, None, None, False):
            raise UsageError(f"{key}: choices stand alone, without low, high, log or step")
        choices = tuple(checked(known, value) for value in axis.choices)
        if len(set(choices)) != len(choices):
            raise UsageError(f"{key}.choices: each value once, got {list(choices)}")
        return Axis(choices=choices)
    if known.kind not in (int, float):
        raise UsageError(f"{key}: expected choices, a list of values")
    if axis.low is None or axis.high is None:
        raise UsageError(f"{key}: expected low and high, or choices")
    low, high = checked(known, _whole(known, axis.low)), checked(known, _whole(known, axis.high))
    if not low < high:
        raise UsageError(f"{key}: low {low!r} must be below high {high!r}")
    if axis.log and low <= 0:
        raise UsageError(f"{key}.low: {low!r} on a log scale, expected a value above 0")
    if axis.step is not None and (axis.log or not 0 < axis.step <= high - low):
        raise UsageError(f"{key}.step: expected a value in 0 to {high - low!r} and no log scale, got {axis.step!r}")
    step = None if axis.step is None else _whole(known, axis.step)
    return Axis(low=low, high=high, log=axis.log, step=step)


def _own_axis(known: Setting) -> Axis:
    if known.choices:
        return Axis(choices=known.choices)
    if known.kind is bool:
        return Axis(choices=(False, True))
    if known.search is None:
        raise UsageError(f"{known.name}: its line names no range to search; expected low and high, or choices")
    return Axis(low=known.search.low, high=known.search.high, log=known.search.log, step=known.search.step)


def _whole(known: Setting, value: float) -> float:
    """Bounds of a whole-number setting arrive as float: 3.0 becomes 3, 3.5 is left for the setting to refuse."""
    return int(value) if known.kind is int and float(value).is_integer() else value


def checked_point(space: Space, point: Mapping[str, Any], method: str) -> Point:
    """`point` in the settings' types. Raises UsageError when a key is not swept or a value lies off its axis."""
    for key in point:
        if key not in space:
            raise UsageError(f"{key}: {unknown('swept setting', key, space)}")
    known = known_settings(method)
    return {key: _on_axis(key, space[key], checked(known[key], value)) for key, value in point.items()}


def _on_axis(key: str, axis: Axis, value: Any) -> Any:
    if axis.choices:
        if value not in axis.choices:
            raise UsageError(f"{key}: {value!r} is not one of the choices {list(axis.choices)}")
        return value
    low, high = axis.bounds
    if not low <= value <= high:
        raise UsageError(f"{key}: {value!r} is outside the swept range {low!r} to {high!r}")
    if axis.step is not None and not math.isclose(steps := (value - low) / axis.step, round(steps), abs_tol=1e-6):
        raise UsageError(f"{key}: {value!r} is not low {low!r} plus whole steps of {axis.step!r}")
    return value


def grid(space: Space, seed: int) -> list[Point]:
    """Every point of a space of choices and steps, in an order shuffled by `seed` (a cut-off grid is not lopsided).

    Raises UsageError for an axis without a finite list of values, and for more points than a study can have.
    """
    counts = {key: _num_values(key, axis) for key, axis in space.items()}
    if (points_in_all := math.prod(counts.values())) > _MOST_POINTS:
        finest = max(counts, key=counts.__getitem__)
        raise UsageError(
            f"{finest}: a grid of {points_in_all} points, expected {_MOST_POINTS} at most; give longer steps"
        )
    points = [
        dict(zip(space, values, strict=True)) for values in itertools.product(*map(_values, space, space.values()))
    ]
    random.Random(seed).shuffle(points)
    return points


def _num_values(key: str, axis: Axis) -> int:
    if axis.choices:
        return len(axis.choices)
    if axis.step is None:
        raise UsageError(f"{key}: the grid sampler needs choices, or a step")
    low, high = axis.bounds
    return int((high - low) / axis.step + 1e-6) + 1


def _values(key: str, axis: Axis) -> list[Any]:
    if axis.choices:
        return list(axis.choices)
    (low, _), step = axis.bounds, axis.step or 0.0
    return [type(low)(low + i * step) for i in range(_num_values(key, axis))]


def distributions(space: Space, method: str) -> dict[str, BaseDistribution]:
    """The axes as Optuna distributions, in the study's order; whole numbers where the method's setting is one."""
    from optuna import distributions as optuna  # late: the command line starts without optuna

    found: dict[str, BaseDistribution] = {}
    for key, axis in space.items():
        if axis.choices:
            found[key] = optuna.CategoricalDistribution(axis.choices)
            continue
        low, high = axis.bounds
        if known_settings(method)[key].kind is int:
            found[key] = optuna.IntDistribution(int(low), int(high), log=axis.log, step=int(axis.step or 1))
        else:
            found[key] = optuna.FloatDistribution(low, high, log=axis.log, step=axis.step)
    return found
