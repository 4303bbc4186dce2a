"""What is confirmed, and what trial.json says of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sweeps.list.attempts import Configuration, configurations
from sweeps.list.jobs import search_job
from sweeps.list.ledger import Budget, Ledger
from sweeps.list.storage import open_storage, storage_url
from sweeps.list.study import (
    best_configurations,
    confirm_jobs,
    create_or_load,
    enqueue_confirmation,
    enqueue_first_points,
)
from sweeps.plan.space import distributions
from sweeps.plan.spec import Confirm, StudySpec
from sweeps.plan.study_files import load, resolve, study_file
from sweeps.study_folder import StudyFolder
from sweeps.views.trial_files import Mirror


@pytest.fixture
def spec() -> StudySpec:
    return resolve(load(study_file("protocol3")), study_file("protocol3"), confirm_seeds=2)


def ledger(tmp_path: Path, name: str, trials: int | None, proposes: bool = True) -> Ledger:
    storage = open_storage(storage_url(None, tmp_path), 20, 60)
    return Ledger(storage, create_or_load(storage, name, lambda study: None)[0], Budget(trials, 2, proposes))


def searched(spec: StudySpec, tmp_path: Path) -> Ledger:
    """Defaults 0.5, then 0.4, one pruned that looked like 0.9, 0.7, and one that failed three times."""
    work = ledger(tmp_path, "s", trials=5)
    enqueue_first_points(spec, work)
    space = distributions(spec.search.space, spec.method)
    for score in (0.5, 0.4, 0.9, 0.7):
        trial = work.ask(space, "w")
        assert trial is not None
        if score == 0.9:
            trial.report(score, 1)
            work.study.tell(trial, state=TrialState.PRUNED)
        else:
            work.study.tell(trial, score)
    for _ in range(3):
        trial = work.ask(space, "w")
        assert trial is not None
        work.release(trial.number, "error", "ValueError: bad luck")
        work.requeue()
    return work


def test_the_best_are_confirmed_and_pruned_trials_never(spec: StudySpec, tmp_path: Path) -> None:
    known = searched(spec, tmp_path).configurations()
    assert [configuration.number for configuration in best_configurations(spec, known, 5)] == [3, 1]
    jobs = confirm_jobs(spec, known)
    assert [(job.seed, job.origin, job.trial) for job in jobs] == [
        (seed, origin, trial)
        for seed in (1, 2)
        for origin, trial in (("baseline", "trial-baseline"), ("default", "trial-0000"), ("search", "trial-0003"))
    ]
    assert jobs[0].changes == {"method": "baseline"}
    assert jobs[1].changes == spec.defaults
    assert jobs[2].changes == known[3].params
    assert {job.job_type for job in jobs} == {"baseline", "rerun"}


def test_a_study_of_the_baseline_needs_no_other() -> None:
    spec = resolve(load(study_file("protocol3")), study_file("protocol3"), overrides={"method": "baseline"})
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(spec.defaults)
    study.tell(study.ask(), 0.5)
    jobs = confirm_jobs(spec, configurations(study.get_trials()))
    assert [job.origin for job in jobs] == ["default", "default"]  # nothing is swept: one trial, on two seeds
    assert len(jobs) == spec.num_confirmations(spec.num_trials) == 2


@pytest.mark.parametrize("top", [1, 2, 9])
@pytest.mark.parametrize("tried", [1, 2, 4])
def test_as_many_are_confirmed_as_were_announced(spec: StudySpec, top: int, tried: int) -> None:
    """With fewer trials than the best to confirm, there are fewer runs."""
    spec = dataclasses.replace(spec, confirm=Confirm(top=top, seeds=2))
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(spec.defaults)
    for score in range(tried):
        study.tell(study.ask(distributions(spec.search.space, spec.method)), score)
    jobs = confirm_jobs(spec, configurations(study.get_trials()))
    assert len(jobs) == spec.num_confirmations(tried) == 2 * (2 + min(top, tried - 1))


def test_confirmations_are_enqueued_once(spec: StudySpec, tmp_path: Path) -> None:
    known = searched(spec, tmp_path).configurations()
    work = ledger(tmp_path, "s-confirm", trials=None, proposes=False)
    for _ in range(2):
        enqueue_confirmation(spec, known, work)
    assert len(work.configurations()) == 6


def test_trial_files(spec: StudySpec, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    work, confirm = searched(spec, tmp_path), ledger(tmp_path, "s-confirm", trials=None, proposes=False)
    enqueue_confirmation(spec, work.configurations(), confirm)
    trial = confirm.ask({}, "w")  # the baseline's first seed
    assert trial is not None
    for name in ("trial-0000/cuhk03-s0", "trial-0000/msmt17-s0", "trial-baseline/cuhk03-s1"):
        (tmp_path / name).mkdir(parents=True)
    Mirror(folder, spec).update(work.configurations(), confirm.configurations())

    def read(name: str) -> dict[str, object]:
        return json.loads((tmp_path / name / "trial.json").read_text())  # type: ignore[no-any-return]

    assert {path.parent.name for path in tmp_path.glob("*/trial.json")} == {
        *(f"trial-000{number}" for number in range(5)),
        "trial-baseline",
    }
    assert read("trial-0000") == {
        "number": 0,
        "origin": "default",
        "params": spec.defaults,
        "state": "complete",
        "score": 0.5,
        "reason": None,
        "attempts": 1,
        "failures": 0,
        "units": ["cuhk03-s0", "msmt17-s0"],
        "confirm_units": [],
    }
    assert (read("trial-0002")["state"], read("trial-0002")["score"]) == ("pruned", None)
    failed = read("trial-0004")
    assert (failed["state"], failed["attempts"], failed["reason"]) == ("failed", 3, "ValueError: bad luck")
    baseline = read("trial-baseline")
    assert (baseline["number"], baseline["state"], baseline["confirm_units"]) == (None, "running", ["cuhk03-s1"])


def test_a_retry_that_waits_is_still_the_default(spec: StudySpec, tmp_path: Path) -> None:
    """A waiting attempt has no parameters of its own yet, only those given to it."""
    work = ledger(tmp_path, "s", trials=1)
    enqueue_first_points(spec, work)
    trial = work.ask(distributions(spec.search.space, spec.method), "w")
    assert trial is not None
    work.release(trial.number, "lost", "gone")
    work.requeue()
    (configuration,) = work.configurations()
    assert configuration.last.state == TrialState.WAITING
    assert search_job(spec, configuration.number, configuration.params).origin == "default"


def test_ties_go_to_the_earlier_trial(spec: StudySpec) -> None:
    study = optuna.create_study(direction="maximize")
    for _ in range(3):
        study.tell(study.ask(distributions(spec.search.space, spec.method)), 0.5)
    known = [Configuration((trial,)) for trial in study.get_trials()]
    assert [configuration.number for configuration in best_configurations(spec, known, 2)] == [0, 1]


def test_what_is_put_on_the_list_is_known_before_it_is_begun(spec: StudySpec) -> None:
    """Optuna keeps the parameters of a waiting trial under a private name: another one, and this fails."""
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(spec.defaults)
    (waiting,) = study.get_trials()
    assert waiting.params == {}
    assert Configuration((waiting,)).params == spec.defaults
