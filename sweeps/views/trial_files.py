"""trial.json of every configuration: the study's database as files, so that analysis needs no Optuna.

{"number", "origin": default | search | baseline, "params", "state": running | complete | pruned | failed, "score",
 "reason", "attempts", "failures", "units": [folders of the search], "confirm_units": [folders on fresh seeds]}
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from optuna.trial import TrialState

from lda.files import write_json
from sweeps.list.attempts import Configuration, fault
from sweeps.list.jobs import Job, configuration_job
from sweeps.plan.spec import StudySpec
from sweeps.study_folder import StudyFolder, is_numbered, unit_name


class Mirror:
    """Writes the trial.json files that changed."""

    def __init__(self, folder: StudyFolder, spec: StudySpec) -> None:
        self._folder, self._spec = folder, spec
        self._written: dict[str, dict[str, Any]] = {}

    def update(self, search: list[Configuration], confirm: list[Configuration]) -> None:
        """Bring the files up to date. Configurations that nobody began have none."""
        confirmed: dict[str, list[str]] = defaultdict(list)
        for configuration in confirm:
            job = configuration_job(self._spec, configuration)
            confirmed[job.trial] += self._units(job) if configuration.begun else []
        for configuration in search:
            if configuration.begun:
                job = configuration_job(self._spec, configuration)
                self._write(job.trial, self._record(configuration, job) | {"confirm_units": confirmed[job.trial]})
        for trial, jobs in self._never_searched(confirm).items():
            self._write(trial, self._confirmed_only(jobs) | {"confirm_units": confirmed[trial]})

    def _record(self, configuration: Configuration, job: Job) -> dict[str, Any]:
        return {
            "number": configuration.number,
            "origin": job.origin,
            "params": job.changes,
            "state": self._state(configuration),
            "score": configuration.last.value if configuration.last.state == TrialState.COMPLETE else None,
            "reason": self._reason(configuration),
            "attempts": len(configuration.attempts),
            "failures": configuration.failures,
            "units": self._units(job),
        }

    def _never_searched(self, confirm: list[Configuration]) -> dict[str, list[Configuration]]:
        """Trial -> its jobs, one a seed, where it is none of the search: the baseline, or a method whose defaults are
        compared without a search. Such a trial has no number."""
        found: dict[str, list[Configuration]] = defaultdict(list)
        for configuration in confirm:
            trial = configuration_job(self._spec, configuration).trial
            if configuration.begun and not is_numbered(trial):
                found[trial].append(configuration)
        return found

    def _confirmed_only(self, jobs: list[Configuration]) -> dict[str, Any]:
        job = configuration_job(self._spec, jobs[0])
        states = {self._state(job) for job in jobs}
        return {
            "number": None,
            "origin": job.origin,
            "params": {} if job.origin == "baseline" else job.changes,
            "state": next(state for state in ("running", "failed", "complete") if state in states),
            "score": None,
            "reason": next((reason for job in jobs if (reason := self._reason(job))), None),
            "attempts": sum(len(job.attempts) for job in jobs),
            "failures": sum(job.failures for job in jobs),
            "units": [],
        }

    def _units(self, job: Job) -> list[str]:
        names = [unit_name(target, job.seed) for target in self._spec.targets]
        return [name for name in names if (self._folder.path / job.trial / name).exists()]

    def _state(self, configuration: Configuration) -> str:
        if configuration.given_up(self._spec.search.retries):
            return "failed"
        ends = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
        return ends.get(configuration.last.state, "running")

    @staticmethod
    def _reason(configuration: Configuration) -> str | None:
        """Why the newest failed attempt failed; None for a configuration that got through."""
        if configuration.last.state in (TrialState.COMPLETE, TrialState.PRUNED):
            return None
        failed = [attempt for attempt in configuration.attempts if attempt.state == TrialState.FAIL]
        return fault(failed[-1])[1] if failed else None

    def _write(self, trial: str, record: dict[str, Any]) -> None:
        if self._written.get(trial) != record:
            write_json(self._folder.path / trial / "trial.json", record)
            self._written[trial] = record
