"""Fit one method on the sources: batches, optimiser, rate, backward pass, the check that all is finite, resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lda import methods
from lda.batch import Batch
from lda.checkpoint import Checkpoint
from lda.config import Config
from lda.data.batches import CleanImages, IdentityBatches, batch_loader
from lda.data.cache import cache_dir
from lda.data.packed import pack
from lda.data.sources import Task
from lda.device import forward_context
from lda.errors import FailedError
from lda.groups import Schedule
from lda.methods.base import Losses, ParameterGroup

_REMEDY = "try a lower learning_rate or a longer warmup_epochs"


class TrainingError(FailedError):
    """A run that cannot go on: the message names the term, the step and what to try."""


def build_optimizer(schedule: Schedule, groups: Mapping[str, ParameterGroup]) -> torch.optim.Optimizer:
    """Adam, or SGD with Nesterov momentum 0.9, over named parameter groups."""
    parameters = [
        {
            "params": group.parameters,
            "name": name,
            "rate": group.rate,
            "weight_decay": schedule.weight_decay if group.decay else 0.0,
        }
        for name, group in groups.items()
    ]
    if schedule.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=schedule.learning_rate)
    return torch.optim.SGD(parameters, lr=schedule.learning_rate, momentum=0.9, nesterov=True)


class Trainer:
    """A method, its optimiser and its batches; knows how to go on from a checkpoint.

    Everything random is a pure function of (seed, step), so a run that goes on from step t equals one that never
    stopped. `check` is called before every batch of a look at the sources; what it raises ends the run.
    """

    def __init__(
        self, config: Config, task: Task, device: torch.device, check: Callable[[], None] = lambda: None
    ) -> None:
        self.config, self.task, self.device, self._check = config, task, device, check
        self.step = 0
        num_ids = [source.num_ids for source in task.sources]
        self.method = methods.build(config.method, config.setup(num_ids)).to(device).train()
        if device.type == "cuda":
            self.method.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config.schedule, self.method.parameter_groups())
        settings = config.batches
        self.packed = [
            pack(source.records, settings.image_height, settings.image_width, cache_dir()) for source in task.sources
        ]
        # A GPU augments faster than the loader's processes, and a uint8 batch is a quarter of the copy.
        self.batches = IdentityBatches(
            task.sources,
            self.packed,
            settings,
            self.method.layout,
            config.run.seed,
            deal=self.method.identities if self.method.layout.dealt == "method" else None,
            augmented=device.type != "cuda",
        )

    def loader(self) -> Iterator[Batch]:
        """The batches still to come; before each the method looks at its sources if it wants to."""
        pin, total = self.device.type == "cuda", self.config.schedule.total_steps
        # What the method deals depends on its weights: such a batch is made here, and not ahead of its step.
        workers = 0 if self.method.layout.dealt == "method" else self.config.machine.loader_workers
        batches = batch_loader(self.batches, self.step, total, workers, pin)
        for step in range(self.step, total):
            if self.method.looks_at_sources(step):
                self.prepare()
            yield next(batches)

    def prepare(self) -> None:
        """Let the method look at all source images."""
        clean = CleanImages(self.task.sources, self.packed, self.config.machine.evaluation_batch)
        with forward_context(self.device):
            self.method.prepare(self._checked(clean))
        self.method.train()

    def _checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._check()
            yield self._placed(batch)

    def _placed(self, batch: Batch) -> Batch:
        return batch._replace(
            images=batch.images.to(self.device, non_blocking=True),
            labels=batch.labels.to(self.device),
            second=None if batch.second is None else batch.second.to(self.device, non_blocking=True),
            extra=None if batch.extra is None else self._placed(batch.extra),
        )

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step. Returns its scalars; raises TrainingError when one is not finite."""
        rate = self.config.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        update = _Update(self, batch)
        with forward_context(self.device):
            scalars = self.method.train_step(self._shown(batch), self.step, update)
        if not update.count:
            raise TrainingError(f"{self.config.method.name}: train_step ended without an update")
        update.check({name: value for name, value in scalars.items() if name not in update.scalars})
        self.step += 1
        return {**update.scalars, "lr": rate}

    def _shown(self, batch: Batch) -> Batch:
        """The batch on the device, augmented."""
        placed = self._placed(batch)
        return placed if self.batches.augmented else self.batches.augment(placed, self.step)

    def check_weights(self) -> None:
        """Raises TrainingError when a step left weights or statistics that are not finite (its loss may have been)."""
        for name, values in self.method.state_dict().items():
            if not bool(values.isfinite().all()):
                raise TrainingError(f"{name} is not finite after step {self.step}; {_REMEDY}")

    def checkpoint(self, unit: str, training: str, seconds: float = 0.0, rows: int = 0) -> Checkpoint:
        """The state after the last step; `rows` of metrics were logged before."""
        return Checkpoint(
            unit=unit,
            training=training,
            config=self.config,
            sources=tuple(source.name for source in self.task.sources),
            num_ids=tuple(source.num_ids for source in self.task.sources),
            step=self.step,
            seconds=seconds,
            method=self.method.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rows=rows,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same unit."""
        self.method.load_state_dict(checkpoint.method)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.step = checkpoint.step


class _Update:
    """The `lda.methods.base.Update` of one step, and what it saw."""

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self._trainer, self._batch = trainer, batch
        self.count = 0
        self.scalars: dict[str, float] = {}

    def __call__(
        self, losses: Losses, groups: tuple[str, ...] = ("main",), rule: Literal["optimiser", "plain_sgd"] = "optimiser"
    ) -> None:
        optimizer = self._trainer.optimizer
        chosen = [group for group in optimizer.param_groups if group["name"] in groups]
        if len(chosen) != len(groups):
            there = ", ".join(group["name"] for group in optimizer.param_groups)
            raise ValueError(f"update of groups {groups}: the method's parameter groups are {there}")
        self.check(losses)
        parameters = [parameter for group in chosen for parameter in group["params"]]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._trainer.device.type, enabled=False):
            torch.autograd.backward(losses["loss/total"], inputs=parameters)
        if rule == "optimiser":
            optimizer.step()  # a parameter without a gradient keeps its value and its moments
        else:
            _plain_sgd(chosen)
        if torch.is_autocast_enabled(self._trainer.device.type):
            torch.clear_autocast_cache()  # it holds the weights as they were before the step
        self.count += 1

    def check(self, losses: Losses) -> None:
        """Note scalars of the step. Raises TrainingError naming one that is not finite."""
        scalars = _numbers(losses)  # one wait for the GPU
        self.scalars |= scalars
        wrong = [name for name, value in scalars.items() if not np.isfinite(value)]
        if not wrong:
            return
        trainer, schedule = self._trainer, self._trainer.config.schedule
        name = next((name for name in wrong if name != "loss/total"), wrong[0])
        names = [trainer.task.sources[domain].name for domain in sorted(set(self._batch.domains.tolist()))]
        raise TrainingError(
            f"{name} is {scalars[name]} at step {trainer.step} (epoch {trainer.step // schedule.steps_per_epoch}, "
            f"domain{'s' if len(names) > 1 else ''} {', '.join(names)}, learning rate "
            f"{schedule.rate(trainer.step):.2g}); {_REMEDY}"
        )


def _numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    if not scalars:
        return {}
    values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))


@torch.no_grad()
def _plain_sgd(groups: list[dict[str, object]]) -> None:
    for group in groups:
        for parameter in group["params"]:  # type: ignore[attr-defined]
            if parameter.grad is not None:
                parameter.sub_(group["lr"] * (parameter.grad + group["weight_decay"] * parameter))
