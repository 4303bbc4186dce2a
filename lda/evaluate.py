"""`python -m lda.evaluate`: a trained checkpoint on any target, under other test settings if wanted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lda import methods
from lda.arguments import ArgumentError, Parser, existing_file, existing_folder, whole
from lda.command import exit_code, openmp_threads
from lda.config import Config, check_keys, parse_overrides
from lda.data.cache import check_cache
from lda.data.catalogue import facts, names
from lda.errors import UsageError
from lda.groups import Machine, Test
from lda.settings import settings_of

# What imports torch is imported where it is needed: mistakes answer at once.


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.evaluate",
        description="Evaluate a checkpoint on a target's query and gallery; prints one JSON object.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=_checkpoint, required=True, help="checkpoint.pt of a run folder")
    parser.add_argument("--target", required=True, help="data set to evaluate on")
    parser.add_argument(
        "--split", type=whole(0, 1000), help="one split only, from 0, as single-split papers do (Protocol-1)"
    )
    parser.add_argument("--data-root", type=existing_folder, help="folder with the data sets; without it, the stand-in")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="settings of the test, for example flip_test=true",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    facts(options.target)
    methods.names()  # all folders of methods are there
    openmp_threads()
    check_cache()
    return options


def _checkpoint(given: str) -> Path:
    try:
        return existing_file(given)
    except ArgumentError as mistake:
        raise ArgumentError(f"{mistake}; a run writes it as <run folder>/checkpoint.pt") from None


def test_config(trained: Config, target: str, changes: Mapping[str, Any]) -> Config:
    """The settings under which a trained run is tested again.

    Raises UsageError for a setting of training, which is over, and for one that the method contradicts.
    """
    check_keys(changes, trained.method.name)
    own = [key for key, known in settings_of(type(trained.method.settings)).items() if known.test]
    told = [*own, *settings_of(Test), *_choosing_test_images()]
    for key in changes:
        if key not in (*told, *settings_of(Machine)):
            raise UsageError(
                f"--set {key}: is a setting of training, which is over; a test of {trained.method.name} can be told: "
                f"{', '.join(told)}"
            )
    return trained.replace(target=target, **changes)


def _choosing_test_images() -> list[str]:
    """The options of data sets that choose a query and gallery, and not what trains."""
    roles = [(option, role) for name in names() for option, role in facts(name).options.items()]
    return [option for option, role in roles if role != "extent"]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lda.evaluate`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _evaluate(parse_arguments(arguments)))


def _evaluate(options: argparse.Namespace) -> None:
    changes = parse_overrides(options.set)
    from lda.checkpoint import load_method, read_checkpoint
    from lda.data.sources import evaluation_splits
    from lda.data.standin.tree import ensure_standin
    from lda.device import choose_device
    from lda.testing import Evaluator, check_target, chosen_splits, metrics

    checkpoint = read_checkpoint(options.checkpoint)
    if options.split is not None:
        changes["test_split"] = options.split
    config = test_config(checkpoint.config, options.target, changes)
    device = choose_device(config.machine)
    target = evaluation_splits(options.target, options.data_root or ensure_standin(), config.data)
    method = load_method(checkpoint, config).to(device)
    check_target(method, target.splits)
    evaluation = Evaluator(chosen_splits(target.splits, config.test), config, device)(method)
    result = {
        "target": options.target,
        "data": target.kind,
        "method": config.method.name,
        "inference": method.inference,
        "target_data": method.looks_at_target,
        "reconstructed": method.reconstructed,
        "pair_cost": method.scorer().pair_cost,
        "flip_test": config.test.flip_test,
        "average_precision": config.test.average_precision,
        "reranking": config.test.reranked,
        **metrics(evaluation),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    raise SystemExit(main())
