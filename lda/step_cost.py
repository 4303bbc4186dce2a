"""`python -m lda.step_cost`: what a training step of every method costs beside the plain network's, here and now.

Counted: multiply-adds of the step's convolutions over those of a plain step. Measured: time of the step, as the median
over rounds of its ratio to the plain step of the same round, so that a machine that others slow down too is no matter.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lda import methods
from lda.arguments import Parser, existing_folder, names, whole
from lda.command import exit_code, openmp_threads
from lda.config import Config, parse_overrides, preset
from lda.data.cache import check_cache
from lda.errors import UsageError

if TYPE_CHECKING:
    from lda.data.sources import Task

# What imports torch is imported where it is needed: mistakes answer at once.

_COUNTED = 12  # steps whose multiply-adds are counted
_WARMUP = 48  # steps before anything is measured: some methods begin by steps that are cheaper


@contextmanager
def convolutions_counted() -> Iterator[Callable[[], int]]:
    """Counts the multiply-adds of convolutions inside `with`, forward and backward; what it gives says how many."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    backward = {torch.ops.aten.convolution_backward: _backward_of_convolution}
    with FlopCounterMode(display=False, custom_mapping=backward) as mode:

        def number() -> int:
            counted = mode.get_flop_counts()["Global"]
            flops: int = sum(value for operation, value in counted.items() if "convolution" in str(operation))
            return flops // 2

        yield number


def _backward_of_convolution(out_gradient: Any, x: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """Shapes -> twice the multiply-adds: each gradient costs what the forward pass does. Torch's own count takes the
    weights of a grouped convolution for those of one without groups."""
    of_input, of_weight, _of_bias = rest[-1]
    return int(2 * (of_input + of_weight) * math.prod(out_gradient) * math.prod(weight[1:]))


class _Steps:
    """The steps of one method, one after the other."""

    def __init__(self, config: Config, task: Task) -> None:
        from lda.device import choose_device
        from lda.trainer import Trainer

        self.trainer = Trainer(config, task, choose_device(config.machine))
        self.batches = self.trainer.loader()
        self.seconds: list[float] = []
        for batch in itertools.islice(self.batches, _WARMUP):
            self.trainer.train_step(batch)

    def time_one(self) -> None:
        """One more step, timed without the making of its batch."""
        batch = next(self.batches)
        started = time.perf_counter()
        self.trainer.train_step(batch)  # its scalars are numbers, so it has waited for a GPU
        self.seconds.append(time.perf_counter() - started)

    def multiply_adds(self, steps: int) -> float:
        """Of the convolutions, mean per step and image."""
        images = 0
        with convolutions_counted() as number:
            for batch in itertools.islice(self.batches, steps):
                images += len(batch.labels)
                self.trainer.train_step(batch)
        return number() / images


def table(recipe: str, changes: Mapping[str, Any], names: Sequence[str], task: Task, rounds: int) -> str:
    """A line per method: declared and counted passes, and time over the plain step's.

    recipe: the preset; changes: settings that differ from it, which all methods share.
    """
    steps = {name: _Steps(preset(recipe, **{**changes, "method": name}), task) for name in names}
    for _, one in itertools.product(range(rounds), steps.values()):
        one.time_one()
    plain = steps[methods.CONTROL]
    counted = {name: one.multiply_adds(_COUNTED) for name, one in steps.items()}
    lines = [f"{'method':12}{'declared':>10}{'counted':>10}{'time':>8}   (plain step: {_median(plain.seconds):.4f} s)"]
    for name, one in steps.items():
        ratios = [own / base for own, base in zip(one.seconds, plain.seconds, strict=True)]
        declared = one.trainer.method.cost.train_passes
        passes = counted[name] / counted[methods.CONTROL]
        lines.append(f"{name:12}{declared:10.2f}{passes:10.2f}{_median(ratios):8.2f}")
    return "\n".join(lines)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.step_cost",
        description="Measure a training step of every method beside the plain network's, on the stand-in.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--methods", type=names, default=",".join(methods.names()), help="names, with commas between")
    parser.add_argument("--rounds", type=whole(1, 10**6), default=20, help="steps that are timed of each")
    parser.add_argument("--data-root", type=existing_folder, help="folder with the data sets; without it, the stand-in")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings that all methods share"
    )
    options = parser.parse_args(arguments)
    openmp_threads()
    check_cache()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lda.step_cost`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _measure(parse_arguments(arguments)))


def _measure(options: argparse.Namespace) -> None:
    from lda.data.standin.tree import ensure_standin
    from lda.data.survey import is_standin
    from lda.unit import task_of

    for name in options.methods:
        methods.find(name)
    changes = {"threads": 1, **parse_overrides(options.set)}
    recipe = "standin" if is_standin(options.data_root) else "real"
    config = preset(recipe, method=methods.CONTROL, **changes)
    if (there := config.schedule.total_steps) < (needed := _WARMUP + options.rounds + _COUNTED):
        raise UsageError(
            f"--rounds: {options.rounds} need {needed} steps with what comes before and after, and the settings have "
            f"{there}; give fewer, or --set steps_per_epoch={-(-needed // config.schedule.epochs)}"
        )
    task = task_of(config, options.data_root or ensure_standin())
    print(table(recipe, changes, list(dict.fromkeys([methods.CONTROL, *options.methods])), task, options.rounds))


if __name__ == "__main__":
    raise SystemExit(main())
