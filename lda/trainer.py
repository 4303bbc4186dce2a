"""Fit one configuration on the sources, select on held-out source identities, test once on the unseen target."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lda.bank_files import draw_banks, tabulate_banks, write_banks
from lda.checkpoint import Checkpoint, read_checkpoint
from lda.config import Config
from lda.data.batches import Batch, IdentityBatches, batch_loader
from lda.data.cache import cache_dir
from lda.data.packed import pack
from lda.data.sources import Task, build_task
from lda.data.standin.tree import ensure_standin
from lda.data.transforms import Augment
from lda.device import choose_device, forward_context
from lda.errors import UsageError
from lda.evaluate import Evaluation, Evaluator, chosen_splits, metrics
from lda.method import LDA, Losses, Method, build_method
from lda.runs import BUFFER_BANK, Content, Cost, Result, RunFolder, Selection, Split, UnitFolder
from lda.tracking import RunLabels, Tracker

_REMEDY = "try a lower learning_rate or a longer warmup_epochs"


class TrainingError(RuntimeError):
    """A run that cannot go on: the message names the term, the step and what to try."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: gradient steps done, of total_steps.
        epoch: epochs completed.
        images_per_second: training throughput so far in this process.
        score: the selection score of a validation just made, else None.
    """

    step: int
    total_steps: int
    epoch: int
    images_per_second: float
    score: float | None = None


def learning_rate(config: Config, step: int) -> float:
    """The rate of a step: linear warm-up from warmup_factor, then times gamma at every milestone (in epochs)."""
    warmup = config.warmup_epochs * config.steps_per_epoch
    factor = 1.0
    if step < warmup:
        factor = config.warmup_factor + (1.0 - config.warmup_factor) * step / warmup
    passed = sum(step >= milestone * config.steps_per_epoch for milestone in config.milestones)
    return config.learning_rate * factor * config.gamma**passed


def build_optimizer(config: Config, method: Method) -> torch.optim.Optimizer:
    """Adam, or SGD with Nesterov momentum 0.9; weight decay on every parameter."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )


class Trainer:
    """A method, its optimiser and its batches; knows how to go on from a checkpoint.

    Everything random is a pure function of (seed, step), so a run that goes on from step t equals one that never
    stopped.
    """

    def __init__(self, config: Config, task: Task, device: torch.device) -> None:
        self.config, self.task, self.device = config, task, device
        self.step = 0
        self.method = build_method(config, [source.num_ids for source in task.sources]).to(device).train()
        if device.type == "cuda":
            self.method.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config, self.method)
        packed = [pack(s.records, config.image_height, config.image_width, cache_dir()) for s in task.sources]
        augment = Augment(
            flip_probability=config.flip_probability,
            pad=config.pad,
            jitter_probability=config.jitter_probability,
            auto_augment_probability=config.auto_augment_probability,
        )
        # A GPU augments faster than the loader's processes, and a uint8 batch is a quarter of the copy.
        self.augment = augment if device.type == "cuda" else None
        self.batches = IdentityBatches(
            task.sources,
            packed,
            ids_per_batch=config.ids_per_batch,
            images_per_id=config.images_per_id,
            augment=augment if self.augment is None else None,
            seed=config.seed,
            pure=self.method.pure_batches,
        )

    def loader(self) -> Any:
        """The batches still to come."""
        pin = self.device.type == "cuda"
        return batch_loader(self.batches, self.step, self.config.total_steps, self.config.loader_workers, pin)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One gradient step. Returns the step's scalars; raises TrainingError when one is not finite."""
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = batch.images.to(self.device, non_blocking=True)
        if self.augment is not None:
            images = self.augment(images, self.batches.generator(self.step))
        on_device = Batch(images, batch.labels.to(self.device), batch.domains)
        with forward_context(self.device):
            losses = self.method.training_losses(on_device, self.step)
        scalars = self._checked(losses, batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss/total"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        return {**scalars, "lr": rate}

    def _checked(self, losses: Losses, batch: Batch) -> dict[str, float]:
        values = torch.stack([value.detach().float() for value in losses.values()]).tolist()  # one wait for the GPU
        scalars = dict(zip(losses, values, strict=True))
        wrong = [name for name, value in scalars.items() if not np.isfinite(value)]
        if wrong:
            name = next((name for name in wrong if name != "loss/total"), wrong[0])
            domain = self.task.sources[int(batch.domains[0])].name
            raise TrainingError(
                f"{name} is {scalars[name]} at step {self.step} (epoch {self.step // self.config.steps_per_epoch}, "
                f"domain {domain}, learning rate {learning_rate(self.config, self.step):.2g}); {_REMEDY}"
            )
        return scalars

    def check_weights(self) -> None:
        """Raises TrainingError when a step left weights or statistics that are not finite (its loss may have been)."""
        for name, values in self.method.state_dict().items():
            if not bool(values.isfinite().all()):
                raise TrainingError(f"{name} is not finite after step {self.step}; {_REMEDY}")

    def checkpoint(self, unit: str, seconds: float = 0.0) -> Checkpoint:
        """The state after the last step."""
        return Checkpoint(
            unit=unit,
            config=self.config,
            sources=tuple(source.name for source in self.task.sources),
            num_ids=tuple(source.num_ids for source in self.task.sources),
            step=self.step,
            seconds=seconds,
            method=self.method.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same unit."""
        self.method.load_state_dict(checkpoint.method)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.step = checkpoint.step


def run_unit(
    config: Config,
    folder: Path,
    *,
    data_root: Path | None = None,
    labels: RunLabels | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    siblings: Sequence[Path] = (),
) -> Result:
    """Run one unit to its end in `folder`, going on from its checkpoint, and return what result.json says.

    A finished unit is returned at once. Without `data_root` it runs on the stand-in, generated on first use. An
    exception raised by `on_progress` ends the run and passes through; the checkpoint stays.

    `siblings`: folders of other units on the same data. Where one of them is finished and differs in its target alone,
    as the targets of Protocol-1 do, which share their sources, its training is taken over instead of being repeated.

    Raises UsageError for bad data or settings, TrainingError for a loss that is not finite.
    """
    device = choose_device(config)
    task = build_task(
        config.protocol,
        config.target,
        data_root or ensure_standin(),
        validation_fraction=config.validation_fraction,
        cuhk03_boxes=config.cuhk03_boxes,
        cuhk03_protocol=config.cuhk03_protocol,
        msmt17_train=config.msmt17_train,
    )
    run = RunFolder(folder, config.unit_hash(task.data_hash), _training_hash(config, task), config.to_dict())
    finished = run.result()
    if finished is not None:
        return finished
    run.write_environment(str(device))
    _take_over(run, config, task, siblings)
    labels = labels or RunLabels(name=f"{config.method}-{config.target}-s{config.seed}")
    data = "stand-in" if task.standin else "real"
    details = {**config.to_dict(), "data": data, "sources": [s.name for s in task.sources], "versions": task.versions}
    tracker = Tracker(folder, run.unit, details, labels, config.wandb)
    try:
        result = _Unit(config, task, device, run, tracker, on_progress or (lambda progress: None)).finish()
    except BaseException:
        tracker.finish(failed=True)
        raise
    tracker.finish()
    return result


def _take_over(run: RunFolder, config: Config, task: Task, siblings: Sequence[Path]) -> None:
    """Copy checkpoint and metrics of a finished sibling whose training is this unit's."""
    if config.selection == "oracle" or run.checkpoint.exists():
        return  # oracle validates on its own target while it trains
    shapes = (tuple(source.name for source in task.sources), tuple(source.num_ids for source in task.sources))
    for sibling in siblings:
        theirs = UnitFolder(sibling)
        if not theirs.finished:
            continue
        try:
            saved = read_checkpoint(theirs.checkpoint)
            rows = theirs.rows()
        except (UsageError, OSError) as error:
            print(f"warning: {error}; training again", file=sys.stderr)
            continue
        same = saved.config.replace(target=config.target).unit_hash() == config.unit_hash()
        if same and (saved.sources, saved.num_ids) == shapes and saved.step == config.total_steps:
            run.replace_rows(rows)
            trained_in = saved.trained_in or sibling.name
            own = replace(saved, unit=run.unit, config=config, seconds=0.0, trained_in=trained_in)
            own.save(run.checkpoint)
            return


# What a method will say itself, once each has its own file and settings.


def _said_of(config: Config) -> dict[str, Any]:
    plain = "plain IN" if config.baseline_norm == "instance" else "plain BN"
    lda = config.method == "lda"
    return {
        "title": "LDA" if lda else plain,
        "reconstructed": "",
        "target_data": False,
        "inference": config.inference if lda else "",
        "cost": Cost(2.0 if lda and config.network_a != "none" else 1.0, 1.0, "vector"),
    }


def _training_hash(config: Config, task: Task) -> str:
    return config.replace(target="market1501").unit_hash(task.data_hash)


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
    ) -> None:
        self.config, self.task, self.run, self.tracker, self.on_progress = config, task, run, tracker, on_progress
        self.trainer = Trainer(config, task, device)
        self.validation = [Evaluator([images], config, device) for images in task.validation]
        self.test = Evaluator(chosen_splits(task.test_splits, config), config, device)
        self.started = time.monotonic()
        self.seconds_before = 0.0
        self.images_per_second = 0.0
        self.trained_in = ""

    def finish(self) -> Result:
        """Train what is left, select, test, and write the result."""
        self._resume()
        self._fit()
        per_source = self._validate() if self.config.selection == "source_validation" else {}
        test = self.test(self.trainer.method)
        score = float(np.mean(list(per_source.values()))) if per_source else test.mAP
        self._save_bank()
        result = self._result(test, Selection(self.config.selection, score, per_source))
        self.run.write_result(result)
        self.tracker.summarise({"test/mAP": result.mAP, "test/rank1": result.rank1, "test/mINP": result.mINP})
        self.tracker.summarise({"val/score": score, "feature/effective_rank": test.effective_rank})
        return result

    def _result(self, test: Evaluation, selection: Selection) -> Result:
        measured = metrics(test)
        splits = tuple(Split(**row) for row in measured.pop("splits", ()))
        return Result(
            unit=self.run.unit,
            training=self.run.training,
            protocol=self.config.protocol,
            target=self.config.target,
            seed=self.config.seed,
            method=self.config.method,
            **measured,
            splits=splits,
            flip_test=self.config.flip_test,
            average_precision=self.config.average_precision,
            cuhk03_boxes=self.config.cuhk03_boxes,
            cuhk03_protocol=self.config.cuhk03_protocol,
            selection=selection,
            data="stand-in" if self.task.standin else "real",
            content=Content({}, self.task.data_hash),
            versions=dict(self.task.versions),
            seconds=round(self._seconds(), 2),
            images_per_second=round(self.images_per_second, 1),
            steps=self.trainer.step,
            trained_in=self.trained_in,
            parameters=sum(parameter.numel() for parameter in self.trainer.method.parameters()),
            effective_rank=test.effective_rank,
            **_said_of(self.config),
        )

    def _resume(self) -> None:
        if not self.run.checkpoint.exists():
            self.run.rewind(0)
            return
        try:
            saved = read_checkpoint(self.run.checkpoint, self.trainer.device)
        except UsageError as error:  # a damaged disk: nothing of this unit is finished, so it starts again
            print(f"warning: {error}; starting the unit again", file=sys.stderr)
            self.run.rewind(0)
            return
        self.trainer.restore(saved)
        self.seconds_before = saved.seconds
        self.run.rewind(saved.step, last=saved.step == self.config.total_steps)
        self.trained_in = saved.trained_in
        if self.trained_in:
            rows = self.run.rows()
            self.images_per_second = rows[-1]["images_per_second"]
            for row in rows:  # W&B has not seen them in this run
                self.tracker.log(row)

    def _fit(self) -> None:
        config, trainer = self.config, self.trainer
        first_step, started = trainer.step, time.monotonic()
        for batch in trainer.loader():
            scalars = trainer.train_step(batch)
            step, epoch = trainer.step, trainer.step // config.steps_per_epoch
            images = (step - first_step) * config.ids_per_batch * config.images_per_id
            self.images_per_second = images / (time.monotonic() - started)
            if step % config.log_every == 0 or step == config.total_steps:
                self._log({"step": step, "epoch": epoch, **scalars, "images_per_second": self.images_per_second})
            score = None
            if step % config.steps_per_epoch == 0:
                trainer.check_weights()
                if config.evaluate_every and epoch % config.evaluate_every == 0 and epoch < config.epochs:
                    score = self._intermediate_score()
                if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
                    trainer.checkpoint(self.run.unit, self._seconds()).save(self.run.checkpoint)
            self.on_progress(Progress(step, config.total_steps, epoch, self.images_per_second, score))

    def _intermediate_score(self) -> float:
        if self.config.selection == "source_validation":
            return float(np.mean(list(self._validate().values())))
        score = self.test(self.trainer.method).mAP  # oracle looks at the target, under that name only
        self._log({"step": self.trainer.step, "epoch": self._epoch(), "val/oracle": score})
        return score

    def _validate(self) -> dict[str, float]:
        """mAP on the held-out identities of every source; logged."""
        evaluations = {validation.name: validation(self.trainer.method) for validation in self.validation}
        scores = {name: evaluation.mAP for name, evaluation in evaluations.items()}
        ranks = [evaluation.effective_rank for evaluation in evaluations.values()]
        row = {"step": self.trainer.step, "epoch": self._epoch(), "val/mAP": float(np.mean(list(scores.values())))}
        row |= {f"val/{name}/mAP": score for name, score in scores.items()}
        self._log({**row, "feature/effective_rank": float(np.mean(ranks))})
        return scores

    def _epoch(self) -> int:
        return self.trainer.step // self.config.steps_per_epoch

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _log(self, row: dict[str, Any]) -> None:
        self.run.log(row)
        self.tracker.log(row)

    def _save_bank(self) -> None:
        """Write buffer_bank.npz and show its picture and table; the plain baseline has no bank."""
        if not isinstance(self.trainer.method, LDA):
            return
        banks = dict(self.trainer.method.banks())
        domains = [source.name for source in self.task.sources]
        write_banks(self.run.kept(BUFFER_BANK), domains, banks)
        self.tracker.log_image("buffer_bank", draw_banks(banks), f"rows per layer: {', '.join(domains)}")
        self.tracker.log_table("buffer_bank_table", *tabulate_banks(domains, banks))
