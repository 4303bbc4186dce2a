"""What an attempt has to run: a configuration in its folder, once per target. Search trials and confirmations alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import Trial, TrialState

from sweeps.list.ledger import Entry, Ledger, point_key
from sweeps.plan.spec import StudySpec
from sweeps.study_folder import BASELINE, trial_name


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
    origin = "default" if dict(params) == spec.defaults else "search"
    return Job(trial_name(number), origin, spec.seed, dict(params))


def job_of(spec: StudySpec, trial: Trial) -> Job:
    """The job of an attempt that runs, of the search or of the confirmation."""
    given = trial.user_attrs.get("job")
    return Job(**given) if given else search_job(spec, trial.user_attrs.get("root", trial.number), trial.params)


def entry_job(spec: StudySpec, entry: Entry) -> Job:
    """The job of a configuration, whatever its state."""
    given = entry.last.user_attrs.get("job")
    return Job(**given) if given else search_job(spec, entry.number, entry.params)


def confirm_study(name: str) -> str:
    """Name of the Optuna study that holds the confirmation's jobs."""
    return f"{name}-confirm"


def best_entries(spec: StudySpec, known: list[Entry], count: int) -> list[Entry]:
    """The complete configurations with the highest scores, the defaults apart; pruned ones never enter."""
    complete = [e for e in known if e.last.state == TrialState.COMPLETE and e.params != spec.defaults]
    return sorted(complete, key=lambda entry: (-(entry.last.value or 0.0), entry.number))[:count]


def confirm_jobs(spec: StudySpec, known: list[Entry]) -> list[Job]:
    """Every job of the confirmation: plain baseline, defaults and the best configurations, on each fresh seed.

    Seeds vary slowest, so that a confirmation cut short has compared everything on its first seeds.
    """
    defaults = [entry for entry in known if entry.params == spec.defaults]
    chosen = [search_job(spec, e.number, e.params) for e in defaults + best_entries(spec, known, spec.confirm.top)]
    if spec.base.get("method") != "baseline":
        chosen.insert(0, Job(BASELINE, "baseline", 0, {"method": "baseline"}))
    return [
        Job(job.trial, job.origin, seed, job.changes, confirms=True) for seed in spec.confirm_seeds for job in chosen
    ]


def enqueue_first_points(spec: StudySpec, ledger: Ledger) -> None:
    """Put the defaults and the given points on the list, those that are not there yet."""
    for point in spec.first_points:
        ledger.enqueue(point_key(point), point)


def enqueue_confirmation(spec: StudySpec, known: list[Entry], ledger: Ledger) -> None:
    """Put the confirmation's jobs on the list, those that are not there yet."""
    for job in confirm_jobs(spec, known):
        ledger.enqueue(f"{job.trial} s{job.seed}", {}, job=asdict(job))
