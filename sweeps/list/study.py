"""A study in its storage: opened once however many ask, its first points, its budget, and what is confirmed."""

from __future__ import annotations

import contextlib
import platform
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import TrialState

from lda.code import describe, this_code
from lda.config import METHOD
from lda.errors import UsageError
from lda.methods import CONTROL
from sweeps.list.addresses import elsewhere, file_of, masked
from sweeps.list.attempts import Configuration, configurations
from sweeps.list.jobs import Job, is_default, search_job
from sweeps.list.ledger import Budget, Distributions, Ledger, point_key
from sweeps.list.machines import excused
from sweeps.list.storage import EmptyStorageError, file_behind, opened, reached
from sweeps.plan.images import Data
from sweeps.plan.space import distributions
from sweeps.plan.spec import StudySpec, differences, from_dict, named_settings, same_study, to_dict
from sweeps.plan.study_files import CONFIRMS
from sweeps.study_folder import BASELINE, FORMAT, check_format

TOKEN = "id"
"""Attribute of a study, and key of study.json: random, so that no other study of the same name is taken for it."""

_HINT = ", or say where it runs by --storage"
_CREATION_SECONDS = 20.0  # a few dozen inserts; a creator that takes longer is dead


# --- opening ---------------------------------------------------------------------------------------------------------


def create_or_load(storage: BaseStorage, name: str, prepare: Callable[[Study], None]) -> tuple[Study, bool]:
    """(the study `name`, whether this call created it), prepared once however many processes ask at the same moment.

    Whoever creates it runs `prepare` and marks it ready; the others wait for the mark. A creator that died in between
    is replaced after a while: `prepare` must only add what is missing.
    """
    created = True
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError:
        study, created = optuna.load_study(storage=storage, study_name=name), False
        end = time.monotonic() + _CREATION_SECONDS
        while "ready" not in study.user_attrs and time.monotonic() < end:
            time.sleep(0.2)
    if "ready" not in study.user_attrs:
        prepare(study)
        study.set_user_attr("ready", True)
    return study, created


def open_search(
    storage: BaseStorage, name: str, spec: StudySpec, budget: Budget, data: Data, folder: Path, mixed_code: bool = False
) -> tuple[Ledger, bool]:
    """(the work list of the search, whether this call created the study).

    Creates the study, or checks that the one that exists is the same.

    Args:
        folder: where this machine keeps it.
        mixed_code: go on with other code than the study was begun with.

    Raises UsageError naming what differs from the study as it was begun.
    """
    code = this_code()

    def prepare(study: Study) -> None:
        study.set_metric_names(["selection score"])
        study.set_user_attr("format", FORMAT)
        study.set_user_attr("spec", to_dict(spec))
        study.set_user_attr("contents", data.contents)
        study.set_user_attr("title", spec.title)
        study.set_user_attr(TOKEN, uuid.uuid4().hex)
        study.set_user_attr("code", {"digest": code.digest, "commit": code.commit, "dirty": code.dirty})
        study.set_user_attr("place", [platform.node(), str(folder)])
        enqueue_first_points(spec, Ledger(storage, study, budget))

    study, created = create_or_load(storage, name, prepare)
    attributes = study.user_attrs
    check_format(attributes.get("format"), f"study {name!r} in its storage")
    instead = elsewhere(file_behind(storage), name)
    check_same(name, from_dict(attributes["spec"]), spec, instead)
    if attributes["contents"] != data.contents:
        raise UsageError(
            f"the images in {data.root} are not those that study {name!r} was begun with; restore them, or give "
            f"{instead}"
        )
    if not created:
        _check_code(name, attributes.get("code"), mixed_code, instead)
    study.set_user_attr("spec", to_dict(spec))  # budgets may have changed; --join and --status read them here
    ledger = Ledger(storage, study, budget)
    enqueue_first_points(spec, ledger)  # the budget or the list of points may have grown
    return ledger, created


def _check_code(name: str, begun: dict[str, Any] | None, mixed: bool, instead: str) -> None:
    """Raises UsageError when a study was begun by other code, unless results of both are wanted in one table."""
    now = this_code()
    if begun is None or begun["digest"] == now.digest or mixed:  # None: of before this was noted
        return
    raise UsageError(
        f"study {name!r} was begun with other code ({describe(begun['commit'], begun['dirty'])}; this is "
        f"{describe(now.commit, now.dirty)}). Go on with that code, or give --allow-mixed-code, which tables will say, "
        f"or {instead}"
    )


def token_of(study: Study) -> str:
    """What names this very study for ever, whatever others are called."""
    return str(study.user_attrs.get(TOKEN, study.study_name))


def check_same(name: str, before: StudySpec, now: StudySpec, instead: str = "another --output") -> None:
    """Raises UsageError naming what differs from the study as it was begun; `instead` is what begins another one."""
    found = differences(same_study(before), same_study(now))
    if found:
        raise UsageError(
            f"study {name!r} was begun with other settings: {'; '.join(found)}. Give the old ones, or {instead}"
        )


@dataclass(frozen=True)
class Found:
    """A study that exists: as its coordinator resolved it, and its search and confirmation so far."""

    spec: StudySpec
    budget: Budget
    search: list[Configuration]
    confirm: list[Configuration]


def running_study(study: str, url: str, folder: Path) -> Found:
    """Read a study from its storage. Raises UsageError when there is none."""
    if (file := file_of(url)) is not None and not file.exists():
        raise UsageError(f"no study {study!r} in {folder} yet; start it first{_HINT} (there is no {file})")
    with reached(url), opened(url, reads_only=True) as storage:
        return _read(study, storage, masked(url))


def _read(study: str, storage: BaseStorage, where: str) -> Found:
    try:
        loaded = optuna.load_study(study_name=study, storage=storage)
    except KeyError:
        names = [name for name in optuna.study.get_all_study_names(storage) if not name.endswith(confirm_study(""))]
        held = f"it holds {', '.join(sorted(names)[:10])}" if names else "it holds none"
        raise UsageError(f"no study {study!r} in {where} yet; start it first{_HINT} ({held})") from None
    if "format" not in loaded.user_attrs and "spec" not in loaded.user_attrs:
        raise UsageError(f"study {study!r} is still being set up, try again in a moment")
    check_format(loaded.user_attrs.get("format"), f"study {study!r} in {where}")
    if "spec" not in loaded.user_attrs:
        raise UsageError(f"study {study!r} is still being set up, try again in a moment")
    spec = from_dict(loaded.user_attrs["spec"])
    confirm: list[Configuration] = []
    with contextlib.suppress(KeyError):  # the search is not over
        confirm = _configurations(optuna.load_study(study_name=confirm_study(study), storage=storage))
    return Found(spec, search_budget(spec), _configurations(loaded), confirm)


def _configurations(study: Study) -> list[Configuration]:
    return configurations(study.get_trials(), excused(study.user_attrs))


def is_known(study: str, url: str) -> bool:
    """Whether a storage has a study of this name; makes no database."""
    if (file := file_of(url)) is not None and not file.exists():
        return False
    with reached(url), contextlib.suppress(EmptyStorageError), opened(url, reads_only=True) as storage:
        return study in optuna.study.get_all_study_names(storage)
    return False


# --- the search ------------------------------------------------------------------------------------------------------


def search_budget(spec: StudySpec, until: float | None = None) -> Budget:
    """The budget of a study's search; `until` is when its wall clock ends (seconds since the epoch), where known."""
    search = spec.search
    return Budget(spec.num_trials, search.retries, not spec.is_grid, search.device_hours, until)


def enqueue_first_points(spec: StudySpec, ledger: Ledger) -> None:
    """Put the defaults and the given points on the list, those that are not there yet."""
    same: Counter[str] = Counter()
    for point in spec.first_points:
        key = point_key(point)
        ledger.enqueue(f"{key} {same[key]}" if same[key] else key, point)  # of a method alone, there are several
        same[key] += 1


def distributions_of(spec: StudySpec) -> Distributions:
    """What the sampler chooses: a value for each setting that is swept, where methods are compared of each its own."""
    if not spec.compare:
        return distributions(spec.search.space, spec.method)

    return lambda method: named_settings(method, distributions(spec.space(method), method))


def best_configurations(
    spec: StudySpec, known: list[Configuration], count: int, method: str | None = None
) -> list[Configuration]:
    """The complete configurations with the highest scores, the defaults apart; pruned ones never enter.

    method: of several that are compared, the one to look at.
    """
    complete = [
        c
        for c in known
        if c.last.state == TrialState.COMPLETE
        and not is_default(spec, c.params)
        and method in (None, c.params.get(METHOD.name))
    ]
    return sorted(complete, key=lambda c: (-(c.last.value or 0.0), c.number))[:count]


def shortfall(budget: Budget, known: list[Configuration], at: float) -> str:
    """Why a search that is over began fewer configurations than planned, in words; empty where it did not."""
    begun = sum(configuration.begun for configuration in known)
    if not (limit := budget.limit(known, at)) or budget.trials is None or begun >= budget.trials:
        return ""
    return f"the search ends at its limit of {limit}: {budget.trials - begun} of {budget.trials} trials were not begun"


# --- the confirmation ------------------------------------------------------------------------------------------------


def confirm_study(name: str) -> str:
    """Name of the Optuna study that holds the confirmation's jobs."""
    return f"{name}{CONFIRMS}"


def confirm_jobs(spec: StudySpec, known: list[Configuration]) -> list[Job]:
    """Every job of the confirmation: `StudySpec.compared` on each fresh seed.

    A rank for which no configuration is complete is left out. Seeds vary slowest, so that a confirmation cut short has
    compared everything on its first seeds.
    """
    jobs = _jobs_of_all(spec, known) if spec.compare else _jobs_of_one(spec, known)
    return [Job(job.trial, job.origin, seed, job.changes, confirms=True) for seed in spec.confirm_seeds for job in jobs]


def _jobs_of_all(spec: StudySpec, known: list[Configuration]) -> list[Job]:
    """Of each method its defaults and its best; without a search the defaults have no trial, and the method's name."""
    jobs = []
    for method in spec.entrants:
        own = [c for c in known if c.params.get(METHOD.name) == method]
        defaults = [c for c in own if is_default(spec, c.params)]
        best = best_configurations(spec, own, spec.confirm.top)
        jobs += [search_job(spec, c.number, c.params) for c in (*defaults[:1], *best)]
        if not spec.search.trials:
            origin = "baseline" if method == CONTROL else "default"
            jobs.append(Job(f"trial-{method}", origin, 0, {METHOD.name: method}))
    return jobs


def _jobs_of_one(spec: StudySpec, known: list[Configuration]) -> list[Job]:
    defaults = [configuration for configuration in known if configuration.params == spec.defaults]
    best = best_configurations(spec, known, spec.confirm.top)
    named = [("defaults", defaults[0])] if defaults else []
    named += [(f"top {rank}", configuration) for rank, configuration in enumerate(best, start=1)]
    jobs = {name: search_job(spec, c.number, c.params) for name, c in named}
    jobs["baseline"] = Job(BASELINE, "baseline", 0, {"method": spec.control})
    return [jobs[name] for name in spec.compared(len(known)) if name in jobs]


def enqueue_confirmation(spec: StudySpec, known: list[Configuration], ledger: Ledger) -> None:
    """Put the confirmation's jobs on the list, those that are not there yet."""
    for job in confirm_jobs(spec, known):
        ledger.enqueue(f"{job.trial} s{job.seed}", {}, job=asdict(job))


def confirmation_budget(spec: StudySpec) -> Budget:
    """The budget of a study's confirmation: all that is on its list, whatever the limits of the search."""
    return Budget(None, spec.search.retries, proposes=False)


def open_confirmation(storage: BaseStorage, study: str, spec: StudySpec, known: list[Configuration]) -> Ledger:
    """The work list of the confirmation of a search that is over; `known` are the search's configurations."""
    budget = confirmation_budget(spec)

    def prepare(made: Study) -> None:
        enqueue_confirmation(spec, known, Ledger(storage, made, budget))

    ledger = Ledger(storage, create_or_load(storage, confirm_study(study), prepare)[0], budget)
    enqueue_confirmation(spec, known, ledger)  # the search or the number of seeds may have grown
    return ledger
