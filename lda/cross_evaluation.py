"""Several checkpoints on several targets: everything that could be refused is refused before the first is tested.

One checkpoint's network is alive at a time; the images of a target are packed once and stay open for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lda.checkpoint import load_method, read_checkpoint
from lda.config import Config
from lda.data import DataOptions, load_dataset
from lda.data.catalogue import facts, title
from lda.data.sources import Target, target_of
from lda.device import choose_device, memory_errors
from lda.errors import AbsentError, FailedError, UsageError, warn
from lda.files import sha256_of
from lda.groups import Test
from lda.matrix import Cell, Column, Matrix, Row, labels
from lda.settings import settings_of
from lda.testing import (
    Evaluator,
    check_cameras,
    check_flip,
    chosen_splits,
    metrics,
    test_config,
    test_settings,
)


@dataclass(frozen=True)
class Entrant:
    """A checkpoint under the settings of this test."""

    path: Path
    config: Config
    row: Row


def entrants(paths: Sequence[Path], changes: Mapping[str, Any]) -> list[Entrant]:
    """The checkpoints. Raises UsageError naming the file that is damaged, or that the changes contradict."""
    return [_entrant(path, label, changes) for path, label in zip(paths, labels(paths), strict=True)]


def _entrant(path: Path, label: str, changes: Mapping[str, Any]) -> Entrant:
    digest, saved = sha256_of(path), read_checkpoint(path)
    trained = saved.config
    try:
        config = test_config(trained, trained.run.target, changes)
        method = load_method(saved, config)
        check_flip(method, method.scorer(), config.test)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if not saved.complete:
        warn(f"{path}: of a training under way, at step {saved.step} of {trained.schedule.total_steps}")
    row = Row(
        label=label,
        path=str(path),
        sha256=digest,
        method=trained.method.name,
        title=method.label,
        reconstructed=method.reconstructed,
        target_data=method.looks_at_target,
        protocol=trained.run.protocol,
        trained_for=trained.run.target,
        seed=trained.run.seed,
        sources=saved.sources,
        settings={key: value for key, value in config.to_dict().items() if key in test_settings(config)},
    )
    return Entrant(path, config, row)


def check_alike(chosen: Sequence[Entrant], targets: Sequence[str]) -> None:
    """Raises UsageError where checkpoints would be tested on other images, or counted otherwise, than each other."""
    of_images = [key for name in targets for key, role in facts(name).options.items() if role != "extent"]
    first = chosen[0]
    for key in dict.fromkeys((*settings_of(Test), *of_images)):
        for other in chosen[1:]:
            mine, theirs = first.config.value(key), other.config.value(key)
            if mine != theirs:
                raise UsageError(
                    f"{key}: {first.path} says {mine}, {other.path} {theirs}; numbers side by side need one: "
                    f"--set {key}={mine}"
                )


def load_targets(
    names: Sequence[str], data_root: Path, options: DataOptions, *, skip_missing: bool, every: bool
) -> tuple[dict[str, Target], list[str]]:
    """The targets by name, and those in print that are not there.

    `every`: the names are all that there are: one that holds no query and gallery is none of them. Raises UsageError
    for everything that is wrong, at once, and unless `skip_missing` for what is not there.
    """
    found, missing, wrong = {}, [], []
    for name in names:
        try:
            dataset = load_dataset(name, data_root, options)
            if dataset.test_splits or not every:
                found[name] = target_of(dataset)
        except AbsentError:
            missing.append(title(name))
        except UsageError as error:
            wrong.append(str(error))
    if wrong:
        raise UsageError("; ".join(wrong))
    if missing and (not skip_missing or not found):
        hint = "; --skip-missing goes on without" if found else ""
        raise UsageError(f"not below {data_root}: {', '.join(missing)}{hint}")
    return found, missing


def check_targets(chosen: Sequence[Entrant], targets: Mapping[str, Target]) -> None:
    """Raises UsageError for a checkpoint that cannot be tested on a target, or a split that a target lacks."""
    for entrant in chosen:
        for target in targets.values():
            try:
                chosen_splits(target.splits, entrant.config.test)
                if entrant.row.target_data:
                    check_cameras(entrant.row.title, target.splits)
            except UsageError as error:
                raise UsageError(f"{entrant.path}: {error}") from None


def columns(targets: Mapping[str, Target]) -> tuple[Column, ...]:
    """The targets, as a matrix names them."""
    return tuple(
        Column(target=name, title=title(name), data=target.kind, version=target.version, content=target.content)
        for name, target in targets.items()
    )


def untested(
    matrix: Matrix, chosen: Sequence[Entrant], targets: Mapping[str, Target], check: Callable[[], None]
) -> Iterator[Cell]:
    """The cells that a matrix lacks, row by row, each as soon as it is tested.

    Raises FailedError for a checkpoint that was changed since `entrants`, and when memory runs out.
    """
    evaluators: dict[Any, Evaluator] = {}
    for entrant in chosen:
        left = [column for column in matrix.columns if matrix.cell(entrant.row, column) is None]
        for cell in _row(entrant, left, targets, evaluators, check) if left else ():
            matrix = matrix.with_cell(cell)  # a copy of the checkpoint may follow
            yield cell


def _row(
    entrant: Entrant,
    left: Sequence[Column],
    targets: Mapping[str, Target],
    evaluators: dict[Any, Evaluator],
    check: Callable[[], None],
) -> Iterator[Cell]:
    config, row = entrant.config, entrant.row
    if sha256_of(entrant.path) != row.sha256:
        raise FailedError(f"{entrant.path} has been written anew meanwhile; run the command again")
    device = choose_device(config.machine)
    with memory_errors(device):
        method = load_method(read_checkpoint(entrant.path), config).to(device)
        for column in left:
            size = config.batches.image_height, config.batches.image_width
            key = column.target, size, config.machine.evaluation_batch, device
            if key not in evaluators:
                splits = chosen_splits(targets[column.target].splits, config.test)
                evaluators[key] = Evaluator(splits, config, device, check)
            found = metrics(evaluators[key](method))
            found.pop("splits", None)
            yield Cell(
                sha256=row.sha256,
                target=column.target,
                content=column.content,
                settings=row.settings,
                source=column.target in row.sources,
                inference=method.inference,
                **found,
            )
