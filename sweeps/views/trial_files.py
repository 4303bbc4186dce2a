"""trial.json of every configuration: the study's database as files, so that analysis needs no Optuna.

{"number", "origin": default | search | baseline, "params", "state": running | complete | pruned | failed, "score",
 "reason", "attempts", "failures", "units": [folders of the search], "confirm_units": [folders on fresh seeds]}
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from optuna.trial import TrialState

from lda.files import write_json
from sweeps.list.jobs import Job, entry_job
from sweeps.list.ledger import Entry, fault
from sweeps.plan.spec import StudySpec
from sweeps.study_folder import BASELINE, StudyFolder, unit_name


class Mirror:
    """Writes the trial.json files that changed."""

    def __init__(self, folder: StudyFolder, spec: StudySpec) -> None:
        self._folder, self._spec = folder, spec
        self._written: dict[str, dict[str, Any]] = {}

    def update(self, search: list[Entry], confirm: list[Entry]) -> None:
        """Bring the files up to date. Configurations that nobody began have none."""
        confirmed: dict[str, list[str]] = defaultdict(list)
        for entry in confirm:
            job = entry_job(self._spec, entry)
            confirmed[job.trial] += self._units(job) if entry.begun else []
        for entry in search:
            if entry.begun:
                job = entry_job(self._spec, entry)
                self._write(job.trial, self._record(entry, job) | {"confirm_units": confirmed[job.trial]})
        baseline = [entry for entry in confirm if entry_job(self._spec, entry).trial == BASELINE and entry.begun]
        if baseline:
            self._write(BASELINE, self._baseline(baseline) | {"confirm_units": confirmed[BASELINE]})

    def _record(self, entry: Entry, job: Job) -> dict[str, Any]:
        return {
            "number": entry.number,
            "origin": job.origin,
            "params": job.changes,
            "state": self._state(entry),
            "score": entry.last.value if entry.last.state == TrialState.COMPLETE else None,
            "reason": self._reason(entry),
            "attempts": len(entry.attempts),
            "failures": entry.failures,
            "units": self._units(job),
        }

    def _baseline(self, entries: list[Entry]) -> dict[str, Any]:
        """The plain baseline is no trial of the search: it has jobs, one a seed, and no number."""
        states = {self._state(entry) for entry in entries}
        return {
            "number": None,
            "origin": "baseline",
            "params": {},
            "state": next(state for state in ("running", "failed", "complete") if state in states),
            "score": None,
            "reason": next((reason for entry in entries if (reason := self._reason(entry))), None),
            "attempts": sum(len(entry.attempts) for entry in entries),
            "failures": sum(entry.failures for entry in entries),
            "units": [],
        }

    def _units(self, job: Job) -> list[str]:
        names = [unit_name(target, job.seed) for target in self._spec.targets]
        return [name for name in names if (self._folder.path / job.trial / name).exists()]

    def _state(self, entry: Entry) -> str:
        if entry.given_up(self._spec.search.retries):
            return "failed"
        ends = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
        return ends.get(entry.last.state, "running")

    @staticmethod
    def _reason(entry: Entry) -> str | None:
        """Why the newest failed attempt failed; None for a configuration that got through."""
        if entry.last.state in (TrialState.COMPLETE, TrialState.PRUNED):
            return None
        failed = [attempt for attempt in entry.attempts if attempt.state == TrialState.FAIL]
        return fault(failed[-1])[1] if failed else None

    def _write(self, trial: str, record: dict[str, Any]) -> None:
        if self._written.get(trial) != record:
            write_json(self._folder.path / trial / "trial.json", record)
            self._written[trial] = record
