"""Evaluation of a trained method on query and gallery, and `python -m lda.evaluate`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lda.checkpoint import load_method, read_checkpoint
from lda.config import Config, parse_overrides
from lda.data.cache import cache_dir
from lda.data.packed import pack
from lda.data.sources import EvaluationSet, evaluation_splits
from lda.data.standin.tree import ensure_standin
from lda.data.survey import MARKER
from lda.data.transforms import normalise
from lda.device import choose_device, forward_context
from lda.errors import UsageError
from lda.method import Method
from lda.protocols import SINGLE_SHOT
from lda.ranking import RankingResult, evaluate_ranking


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one target.

    Attributes:
        rankings: mAP, CMC and mINP of every split; one split where the data set has an official query and gallery.
        feature_norm: mean norm of Network-E's features of the queries before normalisation.
        effective_rank: of the queries' features: exp of the entropy of their normalised singular values
            (Roy and Vetterli, 2007); falls towards 1 when features collapse.
    """

    rankings: tuple[RankingResult, ...]
    feature_norm: float
    effective_rank: float

    @property
    def mAP(self) -> float:  # noqa: N802 - the field's spelling
        """Mean over splits."""
        return statistics.fmean(ranking.mAP for ranking in self.rankings)


class Evaluator:
    """The splits of one target, whose images are packed once and evaluated as often as wanted.

    Every image passes the network once, however many splits use it.
    """

    def __init__(self, splits: Sequence[EvaluationSet], config: Config, device: torch.device) -> None:
        self.splits, self.config, self.device = splits, config, device
        records = [record for split in splits for record in (*split.query, *split.gallery)]
        images = {record.path: record for record in records}
        self._row = {path: row for row, path in enumerate(images)}
        self._images = pack(list(images.values()), config.image_height, config.image_width, cache_dir())
        self._queries = sorted({self._row[record.path] for split in splits for record in split.query})

    @property
    def name(self) -> str:
        """The data set."""
        return self.splits[0].name

    def __call__(self, method: Method) -> Evaluation:
        """Evaluate in the method's inference mode; leaves it in the mode it was in."""
        was_training = method.training
        method.eval()
        features = self._passes(method, range(len(self._images)))
        norms = self._passes(_Pooled(method), self._queries).norm(dim=1)
        method.train(was_training)
        rankings = tuple(self._ranking(split, features) for split in self.splits)
        return Evaluation(rankings, float(norms.mean()), effective_rank(features[self._queries]))

    def _ranking(self, split: EvaluationSet, features: Tensor) -> RankingResult:
        ranking = evaluate_ranking(
            features[[self._row[record.path] for record in split.query]],
            features[[self._row[record.path] for record in split.gallery]],
            [record.pid for record in split.query],
            [record.pid for record in split.gallery],
            [record.camid for record in split.query],
            [record.camid for record in split.gallery],
            ap=self.config.average_precision,
            camera_rule=split.camera_rule,
            single_gallery_shot=split.single_gallery_shot,
        )
        single = split.name in SINGLE_SHOT and self.config.average_precision == "step"
        if single and not math.isclose(ranking.mAP, ranking.mINP, abs_tol=1e-9):
            raise RuntimeError(
                f"{split.name}: mINP {ranking.mINP} is not mAP {ranking.mAP}, though every query has one match; "
                "the query and gallery lists are wrong"
            )
        return ranking

    @torch.inference_mode()
    def _passes(self, module: nn.Module, rows: Sequence[int]) -> Tensor:
        """The module's outputs for some images, (len(rows), D)."""
        features: list[Tensor] = []
        for start in range(0, len(rows), self.config.evaluation_batch):
            batch = self._images.batch(np.array(rows[start : start + self.config.evaluation_batch]))
            images = normalise(batch.to(self.device))
            with forward_context(self.device):
                output = module(images)
                if self.config.flip_test:
                    output = output + module(images.flip(3))
            features.append(output.float())
        return torch.cat(features)


def chosen_splits(splits: Sequence[EvaluationSet], config: Config) -> Sequence[EvaluationSet]:
    """All splits of a target, or the one of `test_split`. Raises UsageError when there is no such split."""
    if config.test_split < 0:
        return splits
    if config.test_split >= len(splits):
        raise UsageError(
            f"test_split: {splits[0].name} has {len(splits)} split(s), numbered from 0; got {config.test_split}"
        )
    return splits[config.test_split : config.test_split + 1]


class _Pooled(nn.Module):
    """A method's features at their own scale."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        return self.method.pooled(images)


def effective_rank(features: Tensor) -> float:
    """exp(entropy) of the normalised singular values of centred features (N, D): between 1 and min(N - 1, D)."""
    singular = torch.linalg.svdvals((features - features.mean(0)).double())
    share = singular / singular.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as fields of `Result`: fractions, means over splits, and every split where there are several."""
    rows = [
        {
            "mAP": ranking.mAP,
            "rank1": ranking.rank1,
            "rank5": ranking.rank5,
            "rank10": ranking.rank10,
            "mINP": ranking.mINP,
            "num_valid_queries": ranking.num_valid_queries,
        }
        for ranking in evaluation.rankings
    ]
    if len(rows) == 1:
        return {**rows[0], "num_splits": 1}
    means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    spread = {f"{key}_std": statistics.stdev(row[key] for row in rows) for key in ("mAP", "rank1")}
    return {**means, "num_splits": len(rows), **spread, "splits": rows}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lda.evaluate",
        description="Evaluate a checkpoint on a target's query and gallery; prints one JSON object.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt of a run folder")
    parser.add_argument("--target", required=True, help="data set to evaluate on")
    parser.add_argument("--split", type=int, help="one split only, from 0, as single-split papers do (Protocol-1)")
    parser.add_argument("--data-root", type=Path, help="folder with the data sets; without it, the stand-in")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="settings of evaluation, for example inference=expert flip_test=true",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lda.evaluate`: 0 done, 2 bad usage."""
    options = parse_arguments(arguments)
    try:
        checkpoint = read_checkpoint(options.checkpoint)
        changes = parse_overrides(options.set)
        if options.split is not None:
            changes["test_split"] = options.split
        config = checkpoint.config.replace(target=options.target, **changes)
        method = load_method(checkpoint)
        method.config = config
        device = choose_device(config)
        root = options.data_root or ensure_standin()
        splits = evaluation_splits(
            options.target, root, cuhk03_boxes=config.cuhk03_boxes, cuhk03_protocol=config.cuhk03_protocol
        )
        evaluation = Evaluator(chosen_splits(splits, config), config, device)(method.to(device))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {
        "target": options.target,
        "data": "stand-in" if (root / MARKER).is_file() else "real",
        "inference": config.inference if config.method == "lda" else "baseline",
        "flip_test": config.flip_test,
        "average_precision": config.average_precision,
        **metrics(evaluation),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
