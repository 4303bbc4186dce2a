"""Everything one run can be told: groups of settings with flat names, and the two hashes that name its results.

The groups are declared where they belong: `lda/groups.py`, `lda/data/options.py`, and for a method its own file in
`lda/methods/`. Keys are flat everywhere (command line, study files, config.json): no two groups share one.

`training_hash` names what is learnt: sources and their images, seed, method, network, batches, schedule. `unit_hash`
names a result: that, the target and its images, selection and test settings. A method enters with the common settings
and its own, so that another method, or a new setting of it, renames nobody's runs. A file of weights enters with the
SHA-256 of its bytes, wherever it lies.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lda import arguments, methods
from lda.data.options import BatchSettings, DataOptions
from lda.errors import UsageError, unknown
from lda.files import sha256_of
from lda.groups import NO_FILES, Chosen, Machine, Network, Run, Schedule, Selection, Setup, Test
from lda.protocols import get_protocol
from lda.settings import Setting, Settings, checked, settings_of

GROUPS: dict[str, type[Settings]] = {
    "run": Run,
    "data": DataOptions,
    "network": Network,
    "batches": BatchSettings,
    "schedule": Schedule,
    "selection": Selection,
    "test": Test,
    "machine": Machine,
}
"""Group -> its class, all but the method's."""

COMMON: dict[str, Setting] = {name: known for group in GROUPS.values() for name, known in settings_of(group).items()}
"""Every setting that all methods share."""

METHOD = Setting(
    name="method",
    kind=str,
    default=methods.DEFAULT,
    help="file in lda/methods; python -m lda.train --help lists them",
    source="poster",
    low=None,
    high=None,
    standin=None,
    search=None,
    test=False,
)

PRESETS = ("real", "standin", "standin_long")
"""Named starting points: the ResNet-50 recipe for real data; a quick look at the stand-in; a longer one."""

_LONG = {"steps_per_epoch": 160, "log_every": 40}
"""What `standin_long` changes of `standin`: eight times the steps. Twice as many would still help plain BN (study
`budget`, reports/LOG.md); so many are what a dozen rows on five seeds can have in a night on two cores."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run; made by `preset` or `from_mapping`."""

    run: Run
    method: Chosen
    data: DataOptions
    network: Network
    batches: BatchSettings
    schedule: Schedule
    selection: Selection
    test: Test
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """Flat keys, plain JSON types, group by group."""
        flat: dict[str, Any] = {}
        for group in fields(self):
            part = getattr(self, group.name)
            if isinstance(part, Chosen):
                flat |= {METHOD.name: part.name, **part.settings.to_dict()}
            else:
                flat |= part.to_dict()
        return flat

    def value(self, key: str) -> Any:
        """One setting by its flat name. Raises UsageError for a key that this run does not have."""
        known = known_settings(self.method.name)
        if key not in known:
            raise UsageError(_unknown_key(key, self.method.name))
        if key == METHOD.name:
            return self.method.name
        groups = (self.method.settings, *(getattr(self, name) for name in GROUPS))
        return next(getattr(group, key) for group in groups if hasattr(group, key))

    def replace(self, **changes: Any) -> Config:
        """A copy with some settings changed. Raises UsageError for a key that this run does not have."""
        return from_mapping({**self.to_dict(), **changes})

    def setup(self, num_ids: Sequence[int]) -> Setup:
        """What the method is built from; `num_ids`: identities of each source."""
        return Setup(
            tuple(num_ids),
            self.network,
            self.schedule,
            self.run.seed,
            self.machine.activation_checkpointing,
            (self.batches.image_height, self.batches.image_width),
            self.batches.ids_per_batch,
        )

    def training_hash(self, sources: Mapping[str, str]) -> str:
        """12 hex digits that name what is learnt. `sources`: source -> content hash of its images, in order.

        Raises UsageError where the file of `pretrained` cannot be read.
        """
        names = ("data", "network", "batches", "schedule")
        parts = {name: _hashed(getattr(self, name), test=False) for name in names}
        if (weights := _weights_file(self)) is not None:
            parts["network"]["pretrained"] = sha256_of(weights)
        return _digest(
            {
                "sources": list(sources.items()),
                "source_part": get_protocol(self.run.protocol).source_part,
                "validation_fraction": self.selection.validation_fraction,
                "seed": self.run.seed,
                "method": [self.method.name, _hashed(self.method.settings, test=False)],
                **parts,
            }
        )

    def unit_hash(self, sources: Mapping[str, str], target: str, proxy: str = "") -> str:
        """12 hex digits that name a result: `training_hash`, the target, its content hash, selection and test.

        target, proxy: content hashes of what is tested, the latter where there is a proxy domain.
        """
        tests: dict[str, Any] = {}
        for part in (self.data, self.method.settings, self.test):
            tests |= _hashed(part, test=True)
        return _digest(
            {
                "training": self.training_hash(sources),
                "protocol": self.run.protocol,
                "target": [self.run.target, target],
                "selection": self.selection.selection,
                "test": tests,
                **({"held out": self.run.held_out} if self.run.without else {}),
                **({"proxy": [self.selection.proxy_domain, proxy]} if proxy else {}),
            }
        )


def _hashed(group: Settings, test: bool) -> dict[str, Any]:
    """What of a group enters a hash: its settings of the test, or those of training."""
    known = settings_of(type(group))
    values = {key: value for key, value in group.to_dict().items() if known[key].test == test}
    return {key: value for key, value in values.items() if not (known[key].later and value == known[key].default)}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def known_settings(method: str) -> Mapping[str, Setting]:
    """Every setting of a run of `method`, by its flat name. Raises UsageError for a method that is not there."""
    return {METHOD.name: METHOD, **COMMON, **settings_of(methods.find(method).Settings)}


def preset(name: str, **changes: Any) -> Config:
    """The configuration of a preset, with changes. Raises UsageError for an unknown preset or key."""
    if name not in PRESETS:
        raise UsageError(unknown("preset", name, PRESETS))
    if name == "real":
        return from_mapping(changes)
    known = known_settings(changes.get(METHOD.name, METHOD.default))
    standin = {key: setting.standin for key, setting in known.items() if setting.standin is not None}
    long = _LONG if name == "standin_long" else {}
    return from_mapping({**standin, **long, **changes})


def from_mapping(values: Mapping[str, Any]) -> Config:
    """A Config from flat values (a JSON file, a study file). Raises UsageError for an unknown key or a bad value."""
    name = checked(METHOD, values.get(METHOD.name, METHOD.default))
    check_keys(values, name)
    own = methods.find(name).Settings
    parts: dict[str, Any] = {group: kind(**_own(kind, values)) for group, kind in GROUPS.items()}
    return Config(method=Chosen(name, own(**_own(own, values))), **parts)


def check_files(config: Config) -> None:
    """Raises UsageError where a file that a setting names cannot be read."""
    _weights_file(config)


def _weights_file(config: Config) -> Path | None:
    if config.network.pretrained in NO_FILES:
        return None
    return arguments.checked("pretrained", arguments.existing_file, config.network.pretrained)


def _own(group: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in settings_of(group) if key in values}


def check_keys(keys: Iterable[str], method: str) -> None:
    """Raises UsageError for a key that a run of `method` does not have, naming whose it is or the nearest valid one."""
    for key in keys:
        if key not in known_settings(method):
            raise UsageError(_unknown_key(key, method))


def _unknown_key(key: str, method: str) -> str:
    owners = methods.owners(key)
    if owners:
        return f"{key}: is a setting of {_listed(owners)}; this run's method is {method}"
    return unknown("setting", key, known_settings(method))


def _listed(names: Sequence[str]) -> str:
    return f"method {names[0]}" if len(names) == 1 else f"methods {', '.join(names)}"


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["bank_momentum=0.95", ...]` from the command line -> typed values. Raises UsageError naming the pair.

    A key may be any method's here; whether it is this run's is told where the run's method is known.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {arguments.shown(pair)}: expected KEY=VALUE, for example learning_rate=0.001")
        if key in values:
            raise UsageError(f"--set {arguments.shown(pair)}: {key} is given twice; keep one")
        kinds = _settings_named(key)
        # Two methods may use one name for different things: which is meant is known when the run's method is.
        values[key] = checked(kinds[0], text) if len({kind.kind for kind in kinds}) == 1 else text
    return values


def _settings_named(key: str) -> list[Setting]:
    """The settings of this flat name: a common one, or those of every method that has it.

    Raises UsageError with the nearest valid name.
    """
    if key == METHOD.name:
        return [METHOD]
    if key in COMMON:
        return [COMMON[key]]
    owners = methods.owners(key)
    if not owners:
        every = {name for method in methods.names() for name in known_settings(method)}
        raise UsageError(unknown("setting", key, sorted(every)))
    return [settings_of(methods.find(owner).Settings)[key] for owner in owners]
