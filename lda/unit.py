"""One unit from its settings to result.json: train on the sources, select, test once on the unseen target."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lda.checkpoint import Checkpoint, read_checkpoint
from lda.config import Config
from lda.data.sources import Task, build_task
from lda.data.standin.tree import ensure_standin
from lda.device import choose_device, memory_errors
from lda.errors import DamagedError, UsageError, warn
from lda.groups import LEFT_OUT
from lda.kept import Kept
from lda.methods.base import Method
from lda.parts.backbones import Backbone
from lda.runs import METRICS, QUERIES, Content, Cost, DataSet, Result, RunFolder, Selection, Split, UnitFolder, Weights
from lda.testing import Evaluation, Evaluator, check_target, chosen_splits, metrics
from lda.tracking import RunLabels, Tracker
from lda.trainer import Trainer

SPEED = "images_per_second"
"""Training throughput in a row of metrics."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: training steps done, of total_steps.
        epoch: epochs completed.
        images_per_second: training throughput so far in this process.
        score: the selection score of a validation just made, else None.
    """

    step: int
    total_steps: int
    epoch: int
    images_per_second: float
    score: float | None = None


def run_unit(
    config: Config,
    folder: Path,
    *,
    data_root: Path | None = None,
    labels: RunLabels | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    check: Callable[[], None] = lambda: None,
    trained: Callable[[str], Sequence[Path]] = lambda training: (),
) -> Result:
    """Run one unit to its end in `folder`, going on from its checkpoint, and return what result.json says.

    A finished unit is returned at once. Without `data_root` it runs on the stand-in, generated on first use. Files that
    are damaged are warned of and made again; it may mean that the unit starts again.

    `on_progress` is called after every training step, `check` more often: also before every batch of an evaluation and
    before a checkpoint or result is written. An exception raised by either ends the run and passes through; the
    checkpoint stays. That of an epoch is written before its validation, which a run that goes on makes again.

    `trained`: folders of other units with a training hash. Where one holds the finished training, as the targets of
    Protocol-1 do, which share their sources, it is taken over instead of being repeated.

    With the rule leave_one_source_out the unit first trains once without each of its sources, in folders of its own
    below `folder`, and tests on it.

    Raises UsageError for bad data or settings and for a folder that is another unit's, FolderInUseError (a UsageError)
    while another process works there, TrainingError for a loss that is not finite, OSError for a disk that refuses.
    """
    device = choose_device(config.machine)
    data_root = data_root or ensure_standin()
    task = task_of(config, data_root)
    training = config.training_hash(task.content.sources)
    unit = config.unit_hash(task.content.sources, task.content.target, task.content.proxy)
    run = RunFolder(folder, unit, training, config.to_dict())
    result = run.known_result()
    if result is not None and not run.damaged_kept(result.kept):
        return result
    with run.owned():
        result = run.own_result()
        saved = _saved(run, device) if result is None else None
        run.write_config()
        if result is not None:
            _mend_kept(run, result.kept, config, task, device)
            return result
        run.write_environment(str(device))
        left_out = {
            source: run_unit(
                _without(config, source),
                folder / f"without-{source}",
                data_root=data_root,
                on_progress=lambda progress: on_progress(replace(progress, score=None)),
                check=check,
                trained=trained,
            )
            for source in _to_leave_out(config, task)
        }
        saved = saved or _take_over(run, config, device, trained(training))
        labels = labels or RunLabels(name=f"{config.method.name}-{config.run.target}-s{config.run.seed}")
        details = {
            **config.to_dict(),
            "data": task.content.kind,
            "sources": [source.name for source in task.sources],
            "versions": task.versions,
        }
        tracker = Tracker(folder, unit, details, labels, config.machine.wandb)
        try:
            with memory_errors(device):
                result = _Unit(config, task, device, run, tracker, on_progress, check, left_out).complete(saved)
        except BaseException:
            tracker.finish(failed=True)
            raise
        tracker.finish()
        return result


def task_of(config: Config, data_root: Path) -> Task:
    """The images of a unit. Raises UsageError as `build_task`."""
    run, selection = config.run, config.selection
    return build_task(
        run.protocol,
        run.target,
        data_root,
        config.data,
        validation_fraction=selection.validation_fraction,
        held_out=run.without,
        proxy=selection.proxy,
    )


def _to_leave_out(config: Config, task: Task) -> list[str]:
    """The sources of which a unit needs a training without each."""
    asked = config.selection.selection == LEFT_OUT and not config.run.without
    return [source.name for source in task.sources] if asked else []


def _without(config: Config, source: str) -> Config:
    """A unit that trains without a source, and is tested on it in the target's place."""
    return config.replace(held_out=source, proxy_domain="none", evaluate_every=0, wandb="disabled")


def _saved(run: RunFolder, device: torch.device) -> Checkpoint | None:
    """The unit's checkpoint, None where it starts anew. Raises UsageError where the folder is another's."""
    if not os.path.lexists(run.checkpoint):
        return None
    try:
        saved = read_checkpoint(run.checkpoint, device)
        if run.anonymous:
            run.check_hash(saved.unit)
        elif saved.unit != run.unit:
            raise UsageError(f"{run.checkpoint} is of another unit, {saved.unit}")
        _rows_before(run, saved)
    except UsageError as error:
        if run.anonymous and not isinstance(error, DamagedError):
            raise
        warn(f"{error}; starting the unit again")
        return None
    return saved


def _rows_before(folder: UnitFolder, saved: Checkpoint) -> list[dict[str, Any]]:
    """The rows of metrics before a checkpoint. Raises DamagedError where not all of them are there, for they hold every
    step once or the training is not what it says."""
    if saved.rows is None:
        raise DamagedError(f"{folder.checkpoint} was written by an older version, which did not count its metrics")
    rows = folder.first_rows(saved.rows)
    if rows is None:
        raise DamagedError(f"{folder.path / METRICS} lacks some of its {saved.rows} rows before step {saved.step}")
    return rows


def _take_over(run: RunFolder, config: Config, device: torch.device, trained: Sequence[Path]) -> Checkpoint | None:
    """Copy checkpoint and metrics of a finished training that is this unit's."""
    if config.selection.selection == "oracle":
        return None  # it validates on its own target while it trains
    for folder in trained:
        theirs = UnitFolder(folder)
        if folder == run.path or not theirs.checkpoint.exists():
            continue
        try:
            saved = read_checkpoint(theirs.checkpoint, device)
            if saved.training != run.training or not saved.complete:
                continue
            rows = _rows_before(theirs, saved)
        except (UsageError, OSError) as error:
            warn(f"{error}; its training is not taken over")
            continue
        run.replace_rows(rows)
        trained_in = saved.trained_in or "/".join(folder.resolve().parts[-3:])
        own = replace(saved, unit=run.unit, config=config, seconds=0.0, trained_in=trained_in)
        own.save(run.checkpoint)
        return own
    return None


def _mend_kept(run: RunFolder, names: Sequence[str], config: Config, task: Task, device: torch.device) -> None:
    """Make again, from the checkpoint, what a finished unit keeps and a damaged disk does not."""
    damages = "; ".join(run.damaged_kept(names))
    if not damages:
        return
    try:
        saved = read_checkpoint(run.checkpoint, device)
        if saved.unit != run.unit or not saved.complete:
            raise UsageError(f"{run.checkpoint} is not what its training ended with")
    except UsageError as error:
        warn(f"{damages}; it cannot be made again: {error}")
        return
    trainer = Trainer(config, task, device)
    trainer.restore(saved)
    test = Evaluator(chosen_splits(task.test_splits, config.test), config, device)(trainer.method)
    for name, kept in _kept(trainer.method, task, test).items():
        if name in names or run.kept(name).exists():
            run.keep(name, kept.arrays)
    warn(f"{damages}; made again from the checkpoint")


def _kept(method: Method, task: Task, test: Evaluation) -> dict[str, Kept]:
    """What a unit keeps beside its result."""
    arrays = {
        "average_precisions": np.concatenate([ranking.average_precisions for ranking in test.rankings]),
        "cmc": np.array([ranking.cmc for ranking in test.rankings]),
    }
    return {QUERIES: Kept(arrays), **method.kept([source.name for source in task.sources])}


def _average(scores: Mapping[str, float]) -> float:
    return float(np.mean(list(scores.values())))


def _metrics(test: Evaluation) -> dict[str, Any]:
    found = metrics(test)
    return {**found, "splits": tuple(Split(**split) for split in found.get("splits", ()))}


def _weights(method: Method) -> Weights | None:
    """The file that the method's network began with."""
    loaded = [module.weights for module in method.modules() if isinstance(module, Backbone)]
    return next((Weights(**vars(file)) for file in loaded if file is not None), None)


class _Unit:
    """One pass from wherever the folder stands to result.json."""

    def __init__(
        self,
        config: Config,
        task: Task,
        device: torch.device,
        run: RunFolder,
        tracker: Tracker,
        on_progress: Callable[[Progress], None],
        check: Callable[[], None],
        left_out: Mapping[str, Result],
    ) -> None:
        self.config, self.task, self.run, self.tracker = config, task, run, tracker
        self.on_progress, self.check, self.left_out = on_progress, check, left_out
        self.trainer = Trainer(config, task, device, check)
        self.validation = [Evaluator([images], config, device, check) for images in task.validation]
        check_target(self.trainer.method, task.test_splits)
        self.test = Evaluator(chosen_splits(task.test_splits, config.test), config, device, check)
        self.proxy = Evaluator(task.proxy_splits, config, device, check) if task.proxy_splits else None
        self.started = time.monotonic()
        self.seconds_before = 0.0
        self.images_per_second = 0.0
        self.trained_in = ""

    def complete(self, saved: Checkpoint | None) -> Result:
        """Train what is left after a checkpoint, select, test, and write the result."""
        self._resume(saved)
        self._fit()
        per_source = self._validate()
        test = self.test(self.trainer.method)
        selection = self._selection(per_source, test.mAP)
        score = selection.score
        kept = self._keep(test)
        result = self._result(test, selection, kept)
        self.check()
        self.run.write_result(result)
        self.tracker.summarise({"test/mAP": result.mAP, "test/rank1": result.rank1, "test/mINP": result.mINP})
        self.tracker.summarise(
            {"val/score": score, "target_data": result.target_data, "reconstructed": bool(result.reconstructed)}
        )
        if test.effective_rank is not None:
            self.tracker.summarise({"feature/effective_rank": test.effective_rank})
        return result

    def _selection(self, per_source: dict[str, float], tested: float) -> Selection:
        """What every rule says whose number is known, and the one that counts."""
        left_out = {source: result.mAP for source, result in self.left_out.items()}
        scores = {"source_validation": _average(per_source)} if per_source else {}
        scores |= {LEFT_OUT: _average(left_out)} if left_out else {}
        scores |= {"proxy_domain": self.proxy(self.trainer.method).mAP} if self.proxy else {}
        scores["oracle"] = tested
        rule = self.config.selection.selection
        # A training without a source counts by its test on that source: that is what it is made for.
        counted = "oracle" if self.config.run.without else rule
        return Selection(rule, scores[counted], per_source, scores, left_out)

    def _result(self, test: Evaluation, selection: Selection, kept: tuple[str, ...]) -> Result:
        config, method, content = self.config, self.trainer.method, self.task.content
        cost = method.cost
        return Result(
            unit=self.run.unit,
            training=self.run.training,
            protocol=config.run.protocol,
            target=config.run.target,
            seed=config.run.seed,
            method=config.method.name,
            title=method.label,
            reconstructed=method.reconstructed,
            reference=method.reference,
            target_data=method.looks_at_target,
            **_metrics(test),
            inference=method.inference,
            flip_test=config.test.flip_test,
            average_precision=config.test.average_precision,
            reranking=config.test.reranked,
            cuhk03_boxes=config.data.cuhk03_boxes,
            cuhk03_protocol=config.data.cuhk03_protocol,
            selection=selection,
            data=self.task.content.kind,
            content=Content(dict(content.sources), content.target, content.proxy),
            versions=dict(self.task.versions),
            data_sets={name: DataSet(**known._asdict()) for name, known in self.task.terms.items()},
            seconds=round(self._seconds() + sum(result.seconds for result in self.left_out.values()), 2),
            images_per_second=round(self.images_per_second, 1),
            steps=self.trainer.step,
            trained_in=self.trained_in,
            cost=Cost(cost.train_passes, cost.test_forwards, cost.test, method.scorer().pair_cost),
            parameters=sum(parameter.numel() for parameter in method.parameters()),
            effective_rank=test.effective_rank,
            kept=kept,
            weights=_weights(method),
        )

    def _resume(self, saved: Checkpoint | None) -> None:
        if saved is None:
            self.run.replace_rows([])
            return
        rows = _rows_before(self.run, saved)
        self.run.replace_rows(rows)
        self.trainer.restore(saved)
        self.seconds_before = saved.seconds
        self.trained_in = saved.trained_in
        if self.trained_in:
            self.images_per_second = next(row[SPEED] for row in reversed(rows) if SPEED in row)
            for row in rows:  # W&B has not seen them in this run
                self.tracker.log(row)
        elif (score := self._score_of_epoch()) is not None:
            self._tell(score)

    def _fit(self) -> None:
        schedule, machine, trainer = self.config.schedule, self.config.machine, self.trainer
        images, seconds, began = 0, 0.0, time.monotonic()
        for batch in trainer.loader():
            self.check()
            scalars = trainer.train_step(batch)
            seconds += time.monotonic() - began  # waiting for the batch and the step; not validation and checkpoints
            images += len(batch.labels)
            self.images_per_second = images / seconds
            step = trainer.step
            if step % machine.log_every == 0 or step == schedule.total_steps:
                self._log({"step": step, "epoch": self._epoch(), **scalars, SPEED: self.images_per_second})
            score = self._end_of_epoch() if step % schedule.steps_per_epoch == 0 else None
            self._tell(score)
            began = time.monotonic()

    def _tell(self, score: float | None) -> None:
        total = self.config.schedule.total_steps
        self.on_progress(Progress(self.trainer.step, total, self._epoch(), self.images_per_second, score))

    def _end_of_epoch(self) -> float | None:
        """Check, save and validate where it is time for it. Returns the score of a validation."""
        epoch = self._epoch()
        self.trainer.check_weights()
        if course := self.trainer.method.course([source.name for source in self.task.sources]):
            self._log({"step": self.trainer.step, "epoch": epoch, **course})
        if epoch % self.config.machine.checkpoint_every == 0 or epoch == self.config.schedule.epochs:
            self.check()
            rows = self.run.sync_rows()
            saved = self.trainer.checkpoint(self.run.unit, self.run.training, self._seconds(), rows)
            saved.save(self.run.checkpoint)
        return self._score_of_epoch()

    def _score_of_epoch(self) -> float | None:
        """The score of the validation that is due after this epoch; None where none is. The last one's comes later."""
        epoch, every = self._epoch(), self.config.machine.evaluate_every
        due = every and epoch % every == 0 and epoch < self.config.schedule.epochs
        return self._intermediate_score() if due else None

    def _intermediate_score(self) -> float | None:
        """What the rule says before the end; a training without a source says nothing of this one's."""
        per_source = self._validate()
        rule = self.config.selection.selection
        if rule == "source_validation":
            return _average(per_source)
        if rule == LEFT_OUT:
            return None
        evaluator = self.test if rule == "oracle" else self.proxy  # the target is looked at under that name only
        assert evaluator is not None, "Selection refuses the rule without a proxy domain"
        score = evaluator(self.trainer.method).mAP
        self._log({"step": self.trainer.step, "epoch": self._epoch(), f"val/{rule}": score})
        return score

    def _validate(self) -> dict[str, float]:
        """mAP on the held-out identities of every source; logged. Empty where none are held out."""
        if not self.validation:
            return {}
        evaluations = {validation.name: validation(self.trainer.method) for validation in self.validation}
        scores = {name: evaluation.mAP for name, evaluation in evaluations.items()}
        row = {"step": self.trainer.step, "epoch": self._epoch(), "val/mAP": float(np.mean(list(scores.values())))}
        row |= {f"val/{name}/mAP": score for name, score in scores.items()}
        ranks = [e.effective_rank for e in evaluations.values() if e.effective_rank is not None]
        self._log({**row, **({"feature/effective_rank": float(np.mean(ranks))} if ranks else {})})
        return scores

    def _epoch(self) -> int:
        return self.trainer.step // self.config.schedule.steps_per_epoch

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _log(self, row: dict[str, Any]) -> None:
        self.run.log(row)
        self.tracker.log(row)

    def _keep(self, test: Evaluation) -> tuple[str, ...]:
        """Write what the test says query by query and what the method keeps, and show that. Returns the names."""
        found = _kept(self.trainer.method, self.task, test)
        for name, kept in found.items():
            self.run.keep(name, kept.arrays)
            if kept.picture is not None:
                self.tracker.log_image(name, kept.picture, kept.caption)
            if kept.table is not None:
                self.tracker.log_table(f"{name}_table", *kept.table)
        return tuple(found)
