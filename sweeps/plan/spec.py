"""What a study is: `StudySpec`, and what follows from it. Files, the command line and checks: `study_files.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, with_config

from lda import methods
from lda.arguments import HIGHEST_STUDY_SEED
from lda.config import METHOD, Config, preset
from lda.groups import Machine
from lda.settings import settings_of
from sweeps.plan.compute import at_equal_passes
from sweeps.plan.space import Axis, Point, Space, checked_axis, grid

T = TypeVar("T")
_strict_keys = with_config(ConfigDict(extra="forbid"))
Count = Annotated[int, Field(ge=0, le=10**6)]
Positive = Annotated[int, Field(ge=1, le=10**6)]
Seconds = Annotated[float, Field(gt=0, le=10**9, allow_inf_nan=False)]

MOST_TRIALS = 100_000
"""Configurations of a study: each is a row in its storage and a folder; methods that are compared multiply it."""

MOST_SEEDS = 10_000
"""Fresh seeds of a confirmation."""


@_strict_keys
@dataclass(frozen=True, kw_only=True)
class Pruning:
    """When a trial that trails the others is stopped early.

    A trial's value at a step is its running mean of (score - score of the defaults on the same target): targets differ
    in difficulty, so raw scores of different targets do not compare.

    Attributes:
        rule: percentile or none.
        percentile: a trial goes on while its best value so far is in this top share of the others' (50: median).
        startup_trials: finished trials before anything is pruned.
        warmup_units: units (targets) of a trial that always finish.
    """

    rule: Literal["percentile", "none"] = "percentile"
    percentile: Annotated[float, Field(gt=0, lt=100)] = 50.0
    startup_trials: Count = 4
    warmup_units: Count = 1


@_strict_keys
@dataclass(frozen=True, kw_only=True)
class Search:
    """How configurations are proposed, and when to stop.

    Attributes:
        space: swept setting -> axis; without it, what the method's file asks for.
        sampler: tpe, gp (up to about five continuous axes), random, or grid (choices and steps only).
        trials: configurations to try; trial 0 is the defaults. In a study that compares methods: configurations to try
            of each beside its defaults; 0 compares the defaults alone, without a search.
        hours: begin no configuration after this wall clock of one command.
        device_hours: begin no configuration after this much training time, summed over devices and commands.
        retries: how often a trial that failed is tried again.
        enqueue: points to try right after the defaults; a key left out takes its default.
    """

    space: dict[str, Axis] = field(default_factory=dict)
    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    trials: Annotated[int, Field(ge=0, le=MOST_TRIALS)] = 20
    hours: Seconds | None = None
    device_hours: Seconds | None = None
    retries: Count = 2
    enqueue: tuple[dict[str, Any], ...] = ()
    pruning: Pruning = field(default_factory=Pruning)


@_strict_keys
@dataclass(frozen=True, kw_only=True)
class Confirm:
    """After the search: the best trials, the defaults and the control method once more, on seeds it never saw.

    Attributes:
        top: how many of the best configurations.
        seeds: fresh seeds per configuration; 0 leaves confirmation out.
    """

    top: Positive = 1
    seeds: Annotated[int, Field(ge=0, le=MOST_SEEDS)] = 2


@_strict_keys
@dataclass(frozen=True, kw_only=True)
class Row:
    """A method with settings of its own, as one row of a comparison.

    Attributes:
        title: its name in print.
        method: by default the row's own name.
        set: settings that differ from the study's base, the method's own among them.
    """

    title: str
    method: str = ""
    set: dict[str, Any] = field(default_factory=dict)


@_strict_keys
@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """One study: what is swept, over which data, at what budget.

    Attributes:
        title: one line for people.
        cost: expected cost of the default budget, for `--list` and `--dry-run`.
        protocol: see lda/protocols.py.
        search, confirm: see there.
        targets: order in which a trial's units run; all of the protocol by default.
        preset: of `lda.config.PRESETS`, on the stand-in; "standin" by default. Real images take "real".
        standin: scale of the stand-in domains.
        base: settings that differ from the preset, for every trial; `method` is one of them.
        methods: method -> settings of its own that differ from the preset, whenever it runs.
        per_target: target -> settings that differ for it, such as its number of steps; `--set` is above them.
        compare: methods that run side by side, each searched by its own settings with the same number of trials;
            "all": every one there is. Empty: the study is of one method.
        rows: name -> row, in the place of `compare`: methods with settings, several of one method if need be; the row
            `baseline` is what the others' gains are measured against. They are not searched.
        compute: what a run's epochs x steps_per_epoch count: "steps", or "passes": training passes through the plain
            network, so that a method which takes two of them for an image makes half as many steps.
        seed: of the sampler and of the search's units; confirmation takes the seeds after it.
        heartbeat_seconds: how often a worker says that it lives.
        grace_seconds: a worker silent for this long has lost its trial.
        stall_seconds: a worker that lives and makes no step for this long gives its trial away; a sixth of it is said.
    """

    title: str
    cost: str
    protocol: str
    search: Search
    confirm: Confirm = field(default_factory=Confirm)
    targets: tuple[str, ...] = ()
    preset: Literal["standin", "standin_long", "real"] | None = None
    standin: Literal["tiny", "small", "full"] = "small"
    base: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_target: dict[str, dict[str, Any]] = field(default_factory=dict)
    compare: tuple[str, ...] | Literal["all"] = ()
    rows: dict[str, Row] = field(default_factory=dict)
    compute: Literal["steps", "passes"] = "steps"
    seed: Annotated[int, Field(ge=0, le=HIGHEST_STUDY_SEED)] = 0
    heartbeat_seconds: Positive = 20
    grace_seconds: Positive = 120
    stall_seconds: Positive = 3600

    def config(self, target: str, seed: int, changes: Mapping[str, Any]) -> Config:
        """The settings of one unit. Raises UsageError naming the setting at fault."""
        assert self.preset is not None, "resolve() fills the preset"
        where = {"protocol": self.protocol, "target": target, "seed": seed}
        name = changes.get(METHOD.name, self.method)
        row = {**self.rows[name].set, METHOD.name: self.method_of(name)} if name in self.rows else {}
        own = self.methods.get(self.method_of(name), {})
        config = preset(
            self.preset, **{**self.base, **own, **changes, **row, **self.per_target.get(target, {}), **where}
        )
        return config if self.compute == "steps" else at_equal_passes(config)

    @property
    def method(self) -> str:
        """The method whose settings are swept; where several are compared, the first."""
        return self.entrants[0] if self.compare else str(self.base.get(METHOD.name, METHOD.default))

    @property
    def entrants(self) -> tuple[str, ...]:
        """The methods, or rows, that are compared; none where the study is of one method."""
        assert self.compare != "all", "resolve() fills the names in"
        return self.compare

    def method_of(self, name: str) -> str:
        """The method of one that is compared."""
        return (self.rows[name].method or name) if name in self.rows else name

    @property
    def control(self) -> str | None:
        """The method that is confirmed beside it, None where the study runs that one itself."""
        return methods.CONTROL if not self.compare and self.method != methods.CONTROL else None

    @property
    def selection(self) -> str:
        """The rule that scores a unit."""
        return self.config(self.targets[0], 0, {}).selection.selection

    @property
    def defaults(self) -> Point:
        """Trial 0: the published or assumed value of every swept setting."""
        return self.defaults_of(self.method)

    def space(self, method: str) -> Space:
        """Where a method is searched: as the study says, or, where methods are compared, as the method's file does."""
        if not self.compare:
            return self.search.space
        if self.rows:
            return {}
        fixed = {**self.base, **self.methods.get(method, {})}
        swept = [key for key in methods.find(method).searched if key not in fixed]
        return {key: checked_axis(key, Axis(), method) for key in swept}

    def defaults_of(self, method: str) -> Point:
        """The value of every setting that is swept of a method, where nothing is changed."""
        if method not in self._defaults:  # asked for every configuration, once a second
            config = self.config(self.targets[0], 0, {METHOD.name: method})
            self._defaults[method] = {key: config.value(key) for key in self.space(method)}
        return dict(self._defaults[method])

    @functools.cached_property
    def _defaults(self) -> dict[str, Point]:
        return {}

    @property
    def first_points(self) -> list[Point]:
        """Points tried before the sampler proposes any: the defaults, then the enqueued ones, then a grid's.

        Where methods are compared, everything is on the list from the start (see `sweeps.list.jobs`): of each method
        its defaults, then points that name the method alone and leave its settings to the sampler.
        """
        if self.compare:
            return self._points_of_all()
        points = [self.defaults, *({**self.defaults, **point} for point in self.search.enqueue)]
        if self.is_grid:
            points += grid(self.search.space, self.seed)
        unique = [point for index, point in enumerate(points) if point not in points[:index]]
        return unique[: self.search.trials]

    def _points_of_all(self) -> list[Point]:
        if not self.search.trials:
            return []
        defaults = [named_point(method, self.defaults_of(method)) for method in self.entrants]
        searched = [method for method in self.entrants if self.space(method)]
        return defaults + [named_point(method, {}) for _ in range(self.search.trials) for method in searched]

    @property
    def is_grid(self) -> bool:
        """Whether every configuration is known in advance."""
        return self.search.sampler == "grid" or bool(self.compare)

    @property
    def num_trials(self) -> int:
        """Configurations the search tries if nothing ends it before; a grid may have fewer than `search.trials`."""
        return len(self.first_points) if self.is_grid else self.search.trials

    def compared(self, tried: int) -> list[str]:
        """What the confirmation runs on each of its seeds when `tried` configurations are complete.

        baseline (unless it is what the study is of), defaults, and top 1 to top N: the best of the others. Where
        methods are compared, that of each: "snr defaults", "snr top 1"; of rows, each.
        """
        if self.rows:
            return list(self.entrants)
        if self.compare:
            ranks = [f"top {rank + 1}" for rank in range(min(self.confirm.top, self.search.trials))]
            return [f"{m} {row}" for m in self.entrants for row in ["defaults", *(ranks if self.space(m) else [])]]
        baseline = ["baseline"] if self.control else []
        return [*baseline, "defaults", *(f"top {rank + 1}" for rank in range(min(self.confirm.top, tried - 1)))]

    def num_confirmations(self, tried: int) -> int:
        """Runs of the confirmation when `tried` configurations are complete."""
        return len(self.compared(tried)) * self.confirm.seeds

    @property
    def confirm_seeds(self) -> range:
        """Seeds of the confirmation: none of them is the search's."""
        return range(self.seed + 1, self.seed + 1 + self.confirm.seeds)


def named_point(method: str, point: Point) -> Point:
    """A point among those of several methods, whose settings may share names: {"method": "snr", "snr/gem_p": 3.0}."""
    return {METHOD.name: method, **named_settings(method, point)}


def named_settings(method: str, settings: Mapping[str, T]) -> dict[str, T]:
    """Settings of one of several methods, under names of its own."""
    return {f"{method}/{key}": value for key, value in settings.items()}


def unnamed_point(point: Point) -> Point:
    """The settings that a `named_point` changes, the method among them; other points as they are."""
    return {key.rpartition("/")[2]: value for key, value in point.items()}


_ADAPTER = TypeAdapter(StudySpec)


def to_dict(spec: StudySpec) -> dict[str, Any]:
    """Plain JSON types; `from_dict` reads them back."""
    plain: dict[str, Any] = _ADAPTER.dump_python(spec, mode="json")
    return plain


def from_dict(values: Mapping[str, Any]) -> StudySpec:
    """The StudySpec of `to_dict`."""
    return _ADAPTER.validate_python(values)


_BUDGET = ("trials", "hours", "device_hours", "retries")


def flat(spec: StudySpec) -> dict[str, Any]:
    """A spec as study.json holds it: the keys of the study file, those of `search` beside the others, budgets apart."""
    plain = to_dict(spec)
    search = plain.pop("search")
    budget = {key: search.pop(key) for key in _BUDGET}
    return {**plain, **search, "budget": budget}


def from_flat(content: Mapping[str, Any]) -> StudySpec:
    """The StudySpec in a study.json, whose further keys are left aside."""
    own = [f.name for f in dataclasses.fields(StudySpec) if f.name != "search"]
    searched = [f.name for f in dataclasses.fields(Search) if f.name not in _BUDGET]
    search = {**{key: content[key] for key in searched}, **content["budget"]}
    return from_dict({**{key: content[key] for key in own if key in content}, "search": search})


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Key paths at which two `to_dict` results differ, each with both values."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{path}{key}.")
        elif a != b:
            found.append(f"{path}{key} ({a!r} before, {b!r} now)")
    return found


def same_study(spec: StudySpec) -> dict[str, Any]:
    """The part of a spec that must not change while a study lasts: all but titles, budgets, retries, confirmation."""
    plain = to_dict(spec)
    for key in ("title", "cost", "confirm", "compare", "heartbeat_seconds", "grace_seconds", "stall_seconds"):
        del plain[key]
    if spec.compare:  # a method that joins brings its own, and so does a row
        del plain["methods"], plain["rows"]
    for key in ("trials", "hours", "device_hours", "retries", "enqueue"):
        del plain["search"][key]
    plain["base"] = {key: value for key, value in plain["base"].items() if key not in settings_of(Machine)}
    return plain
