"""What an attempt has to run: a configuration in its folder, once per target. Search trials and confirmations alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import Trial

from lda.config import METHOD
from sweeps.list.attempts import Configuration, given_method
from sweeps.plan.spec import StudySpec, named_point, unnamed_point
from sweeps.study_folder import trial_name, unit_name


@dataclass(frozen=True)
class Job:
    """One configuration with one seed.

    Attributes:
        trial: folder of the configuration in the study's folder.
        origin: default, search or baseline.
        seed: of weights, batches and augmentation.
        changes: settings that differ from the study's base.
        confirms: whether this is a confirmation, on a fresh seed.
    """

    trial: str
    origin: str
    seed: int
    changes: dict[str, Any]
    confirms: bool = False

    def place(self, target: str) -> str:
        """Of a unit's folder below the study's: trial-0003/market1501-s0."""
        return f"{self.trial}/{unit_name(target, self.seed)}"

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.trial} seed {self.seed}" if self.confirms else self.trial

    @property
    def settings(self) -> str:
        """What is particular about it, for people."""
        if self.confirms:
            return "confirmation"
        values = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.changes.items())
        return ("defaults: " if self.origin == "default" else "") + ", ".join(values)

    @property
    def job_type(self) -> str:
        """Its kind on a dashboard."""
        if self.origin == "baseline":
            return "baseline"
        return "rerun" if self.confirms else "search"


def search_job(spec: StudySpec, number: int, params: Mapping[str, Any]) -> Job:
    """The job of a search trial; `number` is that of its first attempt."""
    changes = unnamed_point(dict(params))
    return Job(trial_name(number), "default" if is_default(spec, params) else "search", spec.seed, changes)


def is_default(spec: StudySpec, params: Mapping[str, Any]) -> bool:
    """Whether the parameters of a configuration change nothing: of the study's method, or of the one they name."""
    if not spec.compare:
        return dict(params) == spec.defaults
    method = params[METHOD.name]
    return dict(params) == named_point(method, spec.defaults_of(method))


def job_of(spec: StudySpec, trial: Trial) -> Job:
    """The job of an attempt that runs, of the search or of the confirmation."""
    given = trial.user_attrs.get("job")
    params = given_method(trial.user_attrs) | trial.params
    return Job(**given) if given else search_job(spec, trial.user_attrs.get("root", trial.number), params)


def configuration_job(spec: StudySpec, configuration: Configuration) -> Job:
    """The job of a configuration, whatever its state."""
    given = configuration.last.user_attrs.get("job")
    return Job(**given) if given else search_job(spec, configuration.number, configuration.params)
