"""Study files: found by name, read, and resolved: what the command line changes, what is left to defaults, every check.

Every mistake is one line: the file, the path of the key, the value, and the nearest valid key where one is near.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from pydantic import ValidationError

from lda import methods
from lda.arguments import checked, existing_file, shown
from lda.config import COMMON, METHOD, check_keys, known_settings, preset
from lda.errors import UsageError, unknown
from lda.groups import LEFT_OUT
from lda.protocols import get_protocol
from lda.settings import explained, settings_of
from sweeps.plan.space import Axis, checked_axis, checked_point, grid
from sweeps.plan.spec import Search, StudySpec, from_dict, to_dict

STUDIES = Path(__file__).parent.parent / "studies"
"""Folder of the studies that `--study NAME` finds by name."""

CONFIRMS = "-confirm"
"""End of the name under which a storage keeps the confirmation of a study, see `sweeps.list.study`."""

_LONGEST_NAME = 200  # bytes; files are written under longer ones first


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML in which a key stands once: PyYAML itself lets the last one win."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Raises ComposerError at a key's second place."""
        mapping = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                problem = f"the key {key.value!r} stands twice, first in line {lines[key.tag, key.value]}; keep one"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            lines[key.tag, key.value] = line
        return mapping


def study_file(study: str) -> Path:
    """The file of `--study`: a name in sweeps/studies, or the path of a YAML file. Raises UsageError."""
    if study.endswith((".yaml", ".yml")):
        return checked("--study", existing_file, study)
    names = study_names()
    if study not in names:
        a_file = "; a file's name ends with .yaml or .yml" if "/" in study or "." in study else ""
        raise UsageError(f"--study: {unknown('study', study, names)}{a_file}")
    return STUDIES / f"{study}.yaml"


def study_name(file: Path) -> str:
    """The name that a study has of its file: of its folder, in its storage, on dashboards. Raises UsageError."""
    name = file.stem
    if not name.isprintable() or len(name.encode(errors="replace")) > _LONGEST_NAME:
        wanted = f"printable characters, {_LONGEST_NAME} bytes at most"
        raise UsageError(f"--study {shown(str(file))}: a study has the name of its file: {wanted}")
    if name.startswith(".") or name.endswith(CONFIRMS):
        wrong = "begins with a dot" if name.startswith(".") else f"ends with {CONFIRMS}, as only confirmations do"
        raise UsageError(f"--study {file}: a study has the name of its file, and this one {wrong}; rename it")
    return name


def study_names() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load(path: Path) -> StudySpec:
    """Read a study file and check types and keys. Raises UsageError in one line; see `resolve` for the rest."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{path}:{line} not valid YAML: {problem}") from None
    except RecursionError:
        raise UsageError(f"{path}: not a study: lists or keys inside each other without end") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a date that is none
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected keys and values, got {shown(str(values))}")
    return _validated(values, str(path))


def _validated(values: Mapping[str, Any], where: str) -> StudySpec:
    try:
        return from_dict(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {_first_mistake(error)}") from None
    except RecursionError:
        raise UsageError(f"{where}: not a study: lists or keys inside each other without end") from None


def _first_mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = ".".join(location)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: {unknown('key', location[-1], _keys_at(location[:-1]))}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}: this key is required"
    return f"{where}: {explained(first)}"


def _keys_at(location: Sequence[str]) -> list[str]:
    """Valid keys of the section at `location` (a walk through the dataclasses; one step into a mapping or list)."""
    section: Any = StudySpec
    for part in location:
        section = get_type_hints(section)[part] if dataclasses.is_dataclass(section) else get_args(section)[-1]
    return [f.name for f in dataclasses.fields(section)]


def resolve(
    spec: StudySpec,
    file: Path,
    *,
    real_data: bool = False,
    overrides: Mapping[str, Any] | None = None,
    seed: int | None = None,
    trials: int | None = None,
    confirm_seeds: int | None = None,
    compare: Sequence[str] | None = None,
    compute: Literal["steps", "passes"] | None = None,
    preset: Literal["standin", "standin_long", "real"] | None = None,
) -> StudySpec:
    """Apply the command line, fill what was left to defaults, and check every value against lda.config.

    `overrides` are typed settings (lda.config.parse_overrides); one that the study sweeps is fixed instead. `compare`
    picks among the methods of a study that compares them; `preset` counts for any images. Raises UsageError naming the
    file and the key.
    """
    overrides = dict(overrides or {})
    _refuse_study_keys(overrides, "--set ")
    try:
        spec = _with_entrants(spec, compare, overrides)
        protocol = get_protocol(spec.protocol)
        for target in spec.targets:
            protocol.sources(target)
        if len(set(spec.targets)) < len(spec.targets):
            raise UsageError(f"targets: each once, got {list(spec.targets)}")
        _refuse_study_keys(spec.base, "base.")
        for target, settings in spec.per_target.items():
            protocol.sources(target)
            _refuse_study_keys(settings, f"per_target.{target}.")
        base = {**spec.base, **overrides}
        run = tuple(dict.fromkeys(map(spec.method_of, spec.entrants))) or (str(base.get(METHOD.name, METHOD.default)),)
        own = {key: value for key, value in base.items() if key not in COMMON and key != METHOD.name}
        for key in own:
            if not any(key in known_settings(method) for method in run):
                check_keys([key], run[0])
        spec = dataclasses.replace(
            spec,
            search=_search(spec, run[0], overrides, trials),
            confirm=spec.confirm if confirm_seeds is None else dataclasses.replace(spec.confirm, seeds=confirm_seeds),
            compute=compute or spec.compute,
            seed=spec.seed if seed is None else seed,
            targets=spec.targets or protocol.targets,
            preset=preset or ("real" if real_data else spec.preset or "standin"),
            base={key: value for key, value in base.items() if key not in own},
            per_target={
                target: {key: value for key, value in settings.items() if key not in overrides}
                for target, settings in spec.per_target.items()
            },
            methods={**spec.methods, **{method: _with_own(spec, method, own) for method in run}},
        )
        for key in spec.search.space:
            if key in {**spec.base, **spec.methods[run[0]]}:
                raise UsageError(f"search.space.{key}: is set for every trial as well; keep one of the two")
        spec = _checked(spec)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return _validated(to_dict(spec), str(file))  # as workers and later commands will read it


def _with_entrants(spec: StudySpec, picked: Sequence[str] | None, overrides: Mapping[str, Any]) -> StudySpec:
    """The study with the names of the methods, or rows, that it compares, the control first; those that are picked,
    where any are."""
    if spec.rows and spec.compare and set(spec.compare) - set(spec.rows):
        raise UsageError("compare: a study has either methods or rows; leave one of the two out")
    if not spec.compare and not spec.rows:
        if picked is not None:
            raise UsageError("--methods: this study is of one method; choose it by --set method=NAME")
        return spec
    if METHOD.name in (*overrides, *spec.base):
        raise UsageError("method: this study compares methods; choose among them by --methods A,B")
    known = list(spec.rows or (methods.names() if spec.compare == "all" else spec.compare))
    for name in (*known, *(picked or ())):
        if not spec.rows:
            methods.find(name)
        if name not in known:
            raise UsageError(f"--methods: {unknown('method of this study', name, known)}")
        methods.find(spec.method_of(name))
    chosen = [name for name in known if picked is None or name in picked]
    if not spec.rows:
        chosen.sort()
    return dataclasses.replace(spec, compare=tuple(sorted(chosen, key=lambda name: name != methods.CONTROL)))


def _with_own(spec: StudySpec, method: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of its own that a method runs with: the file's for it, and of `own` what it has."""
    known = known_settings(method)
    return {**spec.methods.get(method, {}), **{key: value for key, value in own.items() if key in known}}


def _search(spec: StudySpec, method: str, overrides: Mapping[str, Any], trials: int | None) -> Search:
    """The search as the command line changes it: what is fixed is not swept, and no space means one trial."""
    search = spec.search if trials is None else dataclasses.replace(spec.search, trials=trials)
    if spec.compare:
        return search
    if search.trials < 1:
        raise UsageError(f"search.trials: expected 1 or more, got {search.trials}")
    space = search.space or {key: Axis() for key in methods.find(method).searched}
    space = {key: axis for key, axis in space.items() if key not in overrides}
    enqueue = tuple({k: v for k, v in point.items() if k not in overrides} for point in search.enqueue)
    return dataclasses.replace(search, space=space, enqueue=enqueue, trials=search.trials if space else 1)


def _refuse_study_keys(settings: Mapping[str, Any], where: str) -> None:
    for key in settings:
        if key in ("protocol", "target", "seed"):
            instead = {"protocol": "--study", "target": "targets of the study file", "seed": "--seed"}[key]
            raise UsageError(f"{where}{key}: is set for the whole study, use {instead}")
        if key == "held_out":
            raise UsageError(f"{where}held_out: a study holds sources out itself, set selection={LEFT_OUT}")


def _checked(spec: StudySpec) -> StudySpec:
    if spec.grace_seconds < 3 * spec.heartbeat_seconds:
        raise UsageError(f"grace_seconds: {spec.grace_seconds} is below three heartbeats of {spec.heartbeat_seconds} s")
    spec = _checked_rows(_typed(spec))
    if spec.selection == LEFT_OUT and spec.search.pruning.rule != "none":
        raise UsageError(f"search.pruning: {LEFT_OUT} has no score before a unit ends; set rule: none")
    if spec.compare:
        return _checked_comparison(spec)
    space = {}
    for key, axis in spec.search.space.items():
        try:
            space[key] = checked_axis(key, axis, spec.method)
        except UsageError as error:
            raise UsageError(f"search.space.{error}") from None
    if spec.search.pruning.rule != "none" and (several := {"epochs", "steps_per_epoch"} & space.keys()):
        raise UsageError(
            f"search.space.{min(several)}: trials are pruned by comparing them at equal epochs; "
            "set search.pruning.rule to none"
        )
    try:
        checked_point(space, spec.defaults, spec.method)
    except UsageError as error:
        raise UsageError(f"search.space.{error} (the default; trial 0 is always the defaults)") from None
    points = []
    for index, point in enumerate(spec.search.enqueue):
        try:
            points.append(checked_point(space, point, spec.method))
        except UsageError as error:
            raise UsageError(f"search.enqueue.{index}.{error}") from None
    spec = dataclasses.replace(spec, search=dataclasses.replace(spec.search, space=space, enqueue=tuple(points)))
    if spec.search.sampler == "grid":
        try:
            grid(space, spec.seed)
        except UsageError as error:
            raise UsageError(f"search.space.{error}") from None
    return spec


def _checked_comparison(spec: StudySpec) -> StudySpec:
    search = spec.search
    if search.space or search.enqueue:
        key = "space" if search.space else "enqueue"
        raise UsageError(f"search.{key}: a study that compares methods sweeps what each method's file names")
    if search.sampler not in ("tpe", "random"):
        raise UsageError(f"search.sampler: {search.sampler} takes one space for all trials; use tpe or random")
    if search.trials and search.pruning.rule != "none":
        raise UsageError("search.pruning.rule: trials of different methods do not compare; set it to none")
    if not search.trials and not spec.confirm.seeds:
        raise UsageError("confirm.seeds: with search.trials 0 nothing would run; give one seed or more")
    for method in () if spec.rows else spec.entrants:
        space, defaults = spec.space(method), spec.defaults_of(method)
        try:
            checked_point(space, defaults, method)
        except UsageError as error:
            raise UsageError(f"{method}: {error} (the default; trial 0 is always the defaults)") from None
    return spec


def _checked_rows(spec: StudySpec) -> StudySpec:
    """The rows with their settings in the types of their lines."""
    if spec.rows and spec.search.trials:
        raise UsageError("search.trials: rows are compared as they are, without a search; set it to 0")
    rows = {}
    for name, row in spec.rows.items():
        try:
            _refuse_study_keys(row.set, "set.")
            if METHOD.name in row.set:
                raise UsageError("set.method: is a key of the row itself, beside set")
            check_keys(row.set, spec.method_of(name))
            values = dataclasses.replace(spec, compute="steps").config(spec.targets[0], spec.seed, {METHOD.name: name})
        except UsageError as error:
            raise UsageError(f"rows.{name}: {error}") from None
        rows[name] = dataclasses.replace(row, set={key: values.value(key) for key in row.set})
    return dataclasses.replace(spec, rows=rows)


def _typed(spec: StudySpec) -> StudySpec:
    """The settings in the types of their lines; raises UsageError for one that a method does not have."""
    for target, given in spec.per_target.items():
        if swept := given.keys() & {*spec.search.space, METHOD.name}:
            raise UsageError(f"per_target.{target}.{min(swept)}: is set for every target alike; leave it out here")
        try:
            preset(spec.preset or "standin", **{**spec.base, **given})
        except UsageError as error:
            raise UsageError(f"per_target.{target}.{error}") from None
    values = preset(spec.preset or "standin", **spec.base).to_dict()
    own = {}
    for method, given in spec.methods.items():
        for key in given:
            if key in COMMON or key not in known_settings(method):
                raise UsageError(f"methods.{method}.{key}: {unknown('setting of its own', key, _own_keys(method))}")
        settings = preset(spec.preset or "standin", **{**spec.base, **given, METHOD.name: method}).to_dict()
        own[method] = {key: settings[key] for key in given}
    return dataclasses.replace(spec, base={key: values[key] for key in spec.base}, methods=own)


def _own_keys(method: str) -> list[str]:
    return list(settings_of(methods.find(method).Settings))
