"""What a study would run, in words: `--dry-run`. Counts are those of `StudySpec`, which everything else uses too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lda import methods
from lda.config import METHOD
from lda.data.catalogue import title
from lda.protocols import get_protocol
from sweeps.plan.compute import train_passes
from sweeps.plan.spec import StudySpec


def preview(name: str, spec: StudySpec, data: str, fixed: Sequence[str], where: Iterable[tuple[str, str]]) -> str:
    """The study in lines of a name and a text.

    Args:
        data: what it runs on, for people.
        fixed: settings of the command line, KEY=VALUE.
        where: further lines, (name, text).
    """
    protocol, search = get_protocol(spec.protocol), spec.search
    config = spec.config(spec.targets[0], spec.seed, {METHOD.name: spec.method})
    lines = [
        ("study", f"{name}: {spec.title}"),
        ("data", f"{data}; preset {spec.preset}"),
        (
            "training",
            f"{_named(spec, spec.method)}, {_steps(spec, spec.method)}, {config.network.backbone}, "
            f"{config.batches.image_height} x {config.batches.image_width} pixels",
        ),
        *(("", f"{_named(spec, method)}, {_steps(spec, method)}") for method in spec.entrants[1:]),
        *(
            ("target", f"{title(target)} from {', '.join(title(s) for s in protocol.sources(target))}")
            for target in spec.targets
        ),
        *(
            ("", f"for {title(target)} {_settings(settings)}")
            for target, settings in spec.per_target.items()
            if settings
        ),
        ("selection", spec.selection),
        ("search", _search(spec)),
        *(("", f"{key}: {_axis(spec, key)}") for key in search.space),
        *(("fixed", pair) for pair in fixed),
        *(("limit", text) for text in _limits(spec)),
        ("confirm", _confirmation(spec)),
        ("units", _units(spec)),
        ("cost", f"{spec.cost} (of the study as its file has it)"),
        *where,
    ]
    return "\n".join(f"{name:11}{text}" for name, text in lines)


def _named(spec: StudySpec, name: str) -> str:
    from lda.runs import print_method  # late: --list answers without numpy

    method = spec.method_of(name)
    return print_method(name, methods.find(method).reconstructed, False)


def _steps(spec: StudySpec, method: str) -> str:
    """How long a method trains: at equal compute, what that costs is said beside it."""
    config = spec.config(spec.targets[0], spec.seed, {METHOD.name: method})
    schedule = config.schedule
    text = f"{schedule.epochs} epochs of {schedule.steps_per_epoch} steps"
    if spec.compute == "steps":
        return text
    passes = train_passes(config)
    return f"{text} of {passes:.3g} passes: {schedule.total_steps * passes:.0f} passes"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _search(spec: StudySpec) -> str:
    trials, search = spec.num_trials, spec.search
    if not trials:
        return f"none: the {'rows' if spec.rows else 'defaults'} are compared"
    each = f" ({search.trials} of each method beside its defaults)" if spec.compare else ""
    first = "" if spec.compare else "; trial 0 is the defaults"
    return f"{trials} trial{'' if trials == 1 else 's'}{each} by {search.sampler}, seed {spec.seed}{first}"


def _axis(spec: StudySpec, key: str) -> str:
    axis, default = spec.search.space[key], spec.defaults[key]
    if axis.choices:
        values = f"one of {list(axis.choices)}"
    else:
        step = f", step {axis.step:g}" if axis.step else ""
        values = f"{axis.low:g} to {axis.high:g}{', log' if axis.log else ''}{step}"
    return f"{values}; default {default}"


def _limits(spec: StudySpec) -> list[str]:
    limits = {"hours": spec.search.hours, "device_hours": spec.search.device_hours}
    after = {"hours": "hours of the command", "device_hours": "hours of training, summed over devices"}
    return [f"no trial is begun after {value:g} {after[key]}" for key, value in limits.items() if value is not None]


def _confirmation(spec: StudySpec) -> str:
    runs = spec.num_confirmations(spec.num_trials)
    if not runs:
        return "none"
    return f"{runs} runs: {', '.join(spec.compared(spec.num_trials))}; seeds {list(spec.confirm_seeds)}"


def _units(spec: StudySpec) -> str:
    """Exactly, unless trials may be stopped early or left out."""
    units = (spec.num_trials + spec.num_confirmations(spec.num_trials)) * len(spec.targets)
    pruned = spec.search.pruning.rule != "none" and spec.num_trials > spec.search.pruning.startup_trials
    return f"{units}{' at most' if pruned or _limits(spec) else ''} (one per target)"
