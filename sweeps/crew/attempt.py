"""One attempt at a configuration: its units one after the other, none that is finished again, and pruning between."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import Trial

from lda.config import Config
from lda.errors import FolderInUseError
from lda.files import cannot_write, make_folder
from lda.runs import Result, UnitFolder, is_whole
from lda.tracking import RunLabels
from lda.trainer import TrainingError
from lda.unit import Progress, run_unit
from sweeps.crew.assignment import Assignment
from sweeps.crew.post import Post
from sweeps.list.archive import Archive
from sweeps.list.attempts import UNIT
from sweeps.list.jobs import Job, is_default
from sweeps.list.ledger import Ledger
from sweeps.plan.pruning import PrunedError, running_mean
from sweeps.plan.spec import StudySpec
from sweeps.study_folder import unit_name

_RETRY_SECONDS = 5.0
_WAITING_SECONDS = 900.0


class MachineError(Exception):
    """This machine cannot run the unit; another one may."""


@dataclass
class Attempt:
    """Runs the units of a job.

    Attributes:
        post: where it speaks and listens.
        search: work list of the search, for the scores of the defaults.
        archive: where every machine finds what one of them finished; None where they share the study's folder.
        trial: Optuna's.
    """

    post: Post
    assignment: Assignment
    spec: StudySpec
    search: Ledger
    archive: Archive | None
    trial: Trial
    job: Job
    _scores: dict[str, float] = field(default_factory=dict)

    def score(self) -> float:
        """Run what is not finished. Returns the mean of the units' selection scores. Raises PrunedError."""
        for index, target in enumerate(self.spec.targets):
            config = self._config(target)
            recorded = self._recorded(target, config) or self._run(index, target, config)
            self._scores[target] = float(recorded["score"])
            self._judge((index + 1) * config.schedule.epochs, self._scores)
        return statistics.fmean(self._scores.values())

    def _config(self, target: str) -> Config:
        """The unit's settings in this process, whose slot has a number of threads and sees one device only."""
        config = self.spec.config(target, self.job.seed, self.job.changes)
        return config.replace(threads=self.assignment.threads, device=config.machine.device.partition(":")[0])

    def _unit(self, target: str, config: Config) -> str:
        content = self.assignment.contents[target]
        return config.unit_hash(content["sources"], content["target"], content.get("proxy", ""))

    def _recorded(self, target: str, config: Config) -> dict[str, Any] | None:
        """What an earlier attempt, maybe on another machine, left of this unit in the storage.

        Nothing where its files are gone: a power cut may take what the storage knows of.
        """
        row: dict[str, Any] | None = self.trial.user_attrs.get(UNIT + target)
        if row is None or row["unit"] != self._unit(target, config):
            return None
        if is_whole(self.post.folder.path / self.job.place(target), row["unit"]) or self._lies_elsewhere(target, row):
            return row
        self.post.event("waiting", f"{self.job.title} {target} was finished and its files are gone: run again")
        return None

    def _lies_elsewhere(self, target: str, row: Mapping[str, Any]) -> bool:
        """Whether a finished unit is in the archive, or at least was run on another disk."""
        archive = self.archive
        if archive is None:
            return False
        if (row["host"], row.get("folder")) != (platform.node(), str(self.post.folder.path)):
            return True
        return self.post.patiently(lambda: archive.holds(self.job.place(target), row["unit"]))

    def _run(self, index: int, target: str, config: Config) -> dict[str, Any]:
        at = {"trial": self.job.trial, "target": target, "seed": self.job.seed}
        self.post.say(state="running", attempt=self.trial.number, **at, epoch=0, epochs=config.schedule.epochs)

        def on_progress(progress: Progress) -> None:
            self.post.check()
            self.post.say(epoch=progress.epoch, images_per_second=progress.images_per_second)
            if progress.score is not None:
                self.post.say(score=progress.score)
                self._judge(index * config.schedule.epochs + progress.epoch, {**self._scores, target: progress.score})

        folder, unit = self.post.folder.path / self.job.place(target), self._unit(target, config)
        result = self._finished_elsewhere(folder, unit) or self._train(config, folder, target, on_progress)
        self.post.check()
        row = {"unit": result.unit, "mAP": result.mAP, "rank1": result.rank1, "seconds": result.seconds}
        row |= {"score": result.selection.score, "host": platform.node(), "worker": self.post.worker}
        row |= {"folder": str(self.post.folder.path)}
        if (archive := self.archive) is not None:  # before the storage learns that the unit is done
            self.post.patiently(lambda: archive.keep(self.job.place(target), unit, folder))
        self.post.patiently(lambda: self.trial.set_user_attr(UNIT + target, row))
        not_used = "" if result.selection.rule == "oracle" else ", not used"
        self.post.event(
            "unit",
            f"{self.job.title} {target} done in {row['seconds']:.0f} s: selection score {row['score']:.1%} "
            f"(target mAP {row['mAP']:.1%}, Rank-1 {row['rank1']:.1%}{not_used})",
        )
        return row

    def _train(self, config: Config, folder: Path, target: str, on_progress: Callable[[Progress], None]) -> Result:
        """Run the unit; wait, and go on from the checkpoint, while its disk refuses: no trial is to blame for that.

        Raises MachineError where the disk goes on refusing: another worker may have a better one.
        """
        told, end = False, time.monotonic() + _WAITING_SECONDS
        while True:
            try:
                return run_unit(
                    config,
                    folder,
                    data_root=Path(self.assignment.data_root),
                    labels=self._labels(target),
                    on_progress=on_progress,
                    check=self.post.check,
                    trained=self.post.folder.trained,
                )
            except FolderInUseError as error:  # of a worker that is frozen, or asleep on another machine
                reason = str(error)
            except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
                reason = cannot_write(folder.parent, _checkpoint_size(folder))
                if isinstance(error, TrainingError) or not reason:
                    raise
            if time.monotonic() > end:
                raise MachineError(reason)
            if not told:
                self.post.event("waiting", f"{self.job.title} {target} waits: {reason}")
            told = True
            time.sleep(_RETRY_SECONDS)
            self.post.check()

    def _judge(self, step: int, scores: Mapping[str, float]) -> None:
        """Report where the trial stands; confirmations are never judged."""
        if self.job.confirms:
            return
        value = running_mean(self.spec.targets, scores, self._default_scores())
        if value is None:
            return
        self.post.patiently(lambda: self.trial.report(value, step))
        if self.post.patiently(self.trial.should_prune):
            raise PrunedError(
                f"{value:+.1%} against the defaults after {len(scores)} of {len(self.spec.targets)} targets"
            )

    def _default_scores(self) -> dict[str, float]:
        """Target -> score of the defaults in the search, as far as they have been run."""
        known = self.post.patiently(self.search.configurations)
        defaults = [configuration.units for configuration in known if is_default(self.spec, configuration.params)]
        return {target: unit["score"] for units in defaults for target, unit in units.items()}

    def _finished_elsewhere(self, folder: Path, unit: str) -> Result | None:
        """The result of the same unit in another trial of this study; its folder then stands here as a link."""
        if os.path.lexists(folder) or (other := self.post.folder.finished_unit(unit)) is None:
            return None
        make_folder(folder.parent)
        folder.symlink_to(os.path.relpath(other, folder.parent), target_is_directory=True)
        self.post.event("unit", f"{folder.parent.name} {folder.name} is {other.parent.name}'s, run before")
        return Result.read(other)

    def _labels(self, target: str) -> RunLabels:
        study, trial = self.assignment.study, self.job.trial
        return RunLabels(
            group=f"{study}/{trial}",
            job_type=self.job.job_type,
            name=f"t{trial.removeprefix('trial-')}-{unit_name(target, self.job.seed)}",
            tags=(self.assignment.data, study, target),
            folder=self.post.folder.path,
        )


def _checkpoint_size(folder: Path) -> int:
    """Bytes of what a unit writes next: one more checkpoint, or 16 MiB before the first."""
    checkpoint = UnitFolder(folder).checkpoint
    return checkpoint.stat().st_size if checkpoint.exists() else 2**24
