"""Evaluation of a trained method on query and gallery, and `python -m lda.evaluate`."""

from __future__ import annotations

import argparse
import json
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
from lda.data.packed import PackedImages, pack
from lda.data.records import ImageRecord
from lda.data.sources import EvaluationSet, evaluation_set
from lda.data.standin import ensure_standin
from lda.data.transforms import normalise
from lda.device import choose_device, forward_context
from lda.errors import UsageError
from lda.method import Method
from lda.ranking import RankingResult, evaluate_ranking


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one set.

    Attributes:
        ranking: mAP, CMC and mINP.
        feature_norm: mean norm of Network-E's features of the queries before normalisation.
        effective_rank: of the queries' features: exp of the entropy of their normalised singular values
            (Roy and Vetterli, 2007); falls towards 1 when features collapse.
    """

    ranking: RankingResult
    feature_norm: float
    effective_rank: float


class Evaluator:
    """A query and gallery whose images are packed once and evaluated as often as wanted."""

    def __init__(self, images: EvaluationSet, config: Config, device: torch.device) -> None:
        self.set, self.config, self.device = images, config, device
        self._query = self._packed(images.query)
        self._gallery = self._packed(images.gallery)

    def _packed(self, records: Sequence[ImageRecord]) -> PackedImages:
        return pack(records, self.config.image_height, self.config.image_width, cache_dir())

    def __call__(self, method: Method) -> Evaluation:
        """Evaluate in the method's inference mode; leaves it in the mode it was in."""
        was_training = method.training
        method.eval()
        query, gallery = self._features(method, self._query), self._features(method, self._gallery)
        scale = torch.cat(list(self._passes(_Pooled(method), self._query))).norm(dim=1).mean()
        method.train(was_training)
        ranking = evaluate_ranking(
            query,
            gallery,
            [record.pid for record in self.set.query],
            [record.pid for record in self.set.gallery],
            [record.camid for record in self.set.query],
            [record.camid for record in self.set.gallery],
            ap=self.config.average_precision,
            camera_rule=self.set.camera_rule,
        )
        return Evaluation(ranking, float(scale), effective_rank(query))

    def _features(self, method: nn.Module, images: PackedImages) -> Tensor:
        return torch.cat(list(self._passes(method, images)))

    @torch.inference_mode()
    def _passes(self, module: nn.Module, images: PackedImages) -> list[Tensor]:
        features: list[Tensor] = []
        for start in range(0, len(images), self.config.evaluation_batch):
            indices = np.arange(start, min(start + self.config.evaluation_batch, len(images)))
            batch = normalise(images.batch(indices).to(self.device))
            with forward_context(self.device):
                output = module(batch)
                if self.config.flip_test:
                    output = output + module(batch.flip(3))
            features.append(output.float())
        return features


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


def metrics(ranking: RankingResult) -> dict[str, Any]:
    """A ranking as the keys of result.json; fractions."""
    return {
        "mAP": ranking.mAP,
        "rank1": ranking.rank1,
        "rank5": ranking.rank5,
        "rank10": ranking.rank10,
        "mINP": ranking.mINP,
        "num_valid_queries": ranking.num_valid_queries,
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lda.evaluate",
        description="Evaluate a checkpoint on a target's query and gallery; prints one JSON object.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt of a run folder")
    parser.add_argument("--target", required=True, help="data set to evaluate on")
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
        config = checkpoint.config.replace(target=options.target, **parse_overrides(options.set))
        method = load_method(checkpoint)
        method.config = config
        device = choose_device(config)
        root = options.data_root or ensure_standin()
        images = evaluation_set(options.target, root, cuhk03_boxes=config.cuhk03_boxes)
        evaluation = Evaluator(images, config, device)(method.to(device))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {
        "target": options.target,
        "data": str(options.data_root or "stand-in"),
        "inference": config.inference if config.method == "lda" else "baseline",
        "flip_test": config.flip_test,
        "average_precision": config.average_precision,
        **metrics(evaluation.ranking),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
