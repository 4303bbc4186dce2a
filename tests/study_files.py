"""Writes small study folders in the real format, for the tests of analysis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lda.config import preset
from lda.protocols import PROTOCOLS
from lda.runs import (
    BUFFER_BANK,
    CONFIG,
    ENVIRONMENT,
    FORMAT,
    METRICS,
    QUERIES,
    Content,
    Cost,
    Result,
    Selection,
    Split,
    UnitFolder,
)

LAYERS = {"bn1": 32, "layer1.0.bn1": 32, "layer2.0.bn1": 64, "layer3.0.bn1": 128, "layer4.0.bn1": 256, "output": 256}
"""Layer -> channels of the banks written here."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_bank(path: Path, domains: Sequence[str], seed: int = 0, unseen: Sequence[str] = ()) -> None:
    """A bank with channel-wise correlated domains; CUHK03 is CUHK02 with a little noise."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {"domains": np.array(domains), "layers": np.array(list(LAYERS))}
    for layer, channels in LAYERS.items():
        common = rng.normal(0, 1, channels)
        means = common + rng.normal(0, 0.4, (len(domains), channels))
        deviations = np.exp(rng.normal(0, 0.3, channels) + rng.normal(0, 0.2, (len(domains), channels)))
        if "cuhk02" in domains and "cuhk03" in domains:
            a, b = domains.index("cuhk02"), domains.index("cuhk03")
            means[b] = means[a] + rng.normal(0, 0.05, channels)
            deviations[b] = deviations[a] * np.exp(rng.normal(0, 0.03, channels))
        arrays[f"mean/{layer}"] = means.astype(np.float32)
        arrays[f"var/{layer}"] = (deviations**2).astype(np.float32)
        arrays[f"count/{layer}"] = np.array([0 if domain in unseen else 40 for domain in domains])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


TITLES = {"lda": "LDA", "baseline": "plain BN"}
"""Method -> its name in print; any other method is printed in capitals."""

COSTS = {"lda": Cost(2.0, 4.0, "vector")}
"""Method -> what an image costs; that of any other method is 1."""


def a_result(
    target: str = "cuhk03",
    *,
    protocol: str = "protocol3",
    method: str = "lda",
    mAP: float = 0.3,  # noqa: N803
    score: float = 0.5,
    selection: str = "source_validation",
    **others: Any,
) -> Result:
    """Its Rank-1 is mAP + 0.1. Over test splits mAP spreads by a tenth of itself, Rank-1 by a fifth."""
    ranks: dict[str, Any] = {"rank1": mAP + 0.1, "rank5": mAP + 0.2, "rank10": mAP + 0.3, "mINP": mAP / 2}
    splits: dict[str, Any] = {"num_splits": 1}
    if (num_splits := PROTOCOLS[protocol].num_splits) > 1:
        each = Split(mAP=mAP, **ranks, num_valid_queries=100)
        splits = {"num_splits": num_splits, "mAP_std": mAP / 10, "rank1_std": mAP / 5, "splits": (each,) * num_splits}
    sources = PROTOCOLS[protocol].sources(target)
    measured: dict[str, Any] = {
        "unit": hashlib.sha256(repr((target, protocol, method, others)).encode()).hexdigest()[:12],
        "training": "0123456789ab",
        "protocol": protocol,
        "target": target,
        "seed": 0,
        "method": method,
        "title": TITLES.get(method, method.upper()),
        "reconstructed": "",
        "target_data": False,
        "mAP": mAP,
        **ranks,
        **splits,
        "num_valid_queries": 100,
        "inference": "fused" if method == "lda" else "",
        "flip_test": False,
        "average_precision": "step",
        "cuhk03_boxes": "labeled",
        "cuhk03_protocol": "new",
        "reference": "somebody, somewhere 2020",
        "selection": Selection(selection, score, dict.fromkeys(sources, score)),
        "data": "stand-in",
        "content": Content(dict.fromkeys(sources, "0123456789ab"), "0123456789ab"),
        "versions": {"msmt17": "MSMT17_V2"},
        "seconds": 12.5,
        "images_per_second": 500.0,
        "steps": 200,
        "trained_in": "",
        "cost": COSTS.get(method, Cost(1.0, 1.0, "vector")),
        "parameters": 1000,
        "effective_rank": 20.0,
    }
    return Result(**{**measured, **others})


def write_queries(path: Path, result: Result, queries: int = 20) -> None:
    """Queries whose mean AP is the result's mAP, the last without a match; a CMC curve that begins at its Rank-1."""
    rng = np.random.default_rng(result.seed)
    gaps = rng.uniform(-0.1, 0.1, queries)
    precisions = np.append(result.mAP + gaps - gaps.mean(), np.nan)
    cmc = result.rank1 + (1 - result.rank1) * np.arange(50) / 50
    np.savez(path, average_precisions=precisions, cmc=cmc[None])


def write_unit(
    folder: Path, target: str, *, score: float = 0.5, finished: bool = True, bank: bool | None = None, **others: Any
) -> None:
    """One unit; `others` are those of `a_result`. `bank`: whether it keeps a Buffer Bank; by default LDA does."""
    result = a_result(target, score=score, **others)
    named = {"protocol": result.protocol, "target": target, "seed": result.seed, "method": result.method}
    settings = {**preset("standin").to_dict(), **named, "selection": result.selection.rule}
    hashes = {"format": FORMAT, "unit": result.unit, "training": result.training}
    write_json(folder / CONFIG, {**hashes, "config": settings})
    sources = PROTOCOLS[result.protocol].sources(target)
    rows: list[dict[str, Any]] = []
    for step in range(20, 201, 20):
        rows.append({"step": step, "epoch": step // 20, "loss/id_e": 4 - step / 100, "loss/total": 8 - step / 50})
        rows[-1] |= {"lr": 1e-3, "images_per_second": 500.0, "feature/norm": 10 + step / 100}
    for step in (100, 200):
        value = score * step / 200
        rows.append({"step": step, "epoch": step // 20, "val/mAP": value, **{f"val/{s}/mAP": value for s in sources}})
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not finished:
        return
    write_json(folder / ENVIRONMENT, {"commit": "0123abc4567", "dirty": False, "versions": {"torch": "2.15.0"}})
    write_queries(UnitFolder(folder).kept(QUERIES), result)
    if result.method == "lda" if bank is None else bank:
        write_bank(UnitFolder(folder).kept(BUFFER_BANK), sources, result.seed)
    result.write(folder)


def write_study(
    folder: Path,
    *,
    protocol: str = "protocol3",
    scores: Sequence[float] = (0.50, 0.55, 0.52),
    confirm_seeds: Sequence[int] = (),
    **unit: Any,
) -> Path:
    """A finished study: trial i has selection score scores[i] and test mAP scores[i] - 0.2 (+ 0.01 per seed).

    With confirmation the defaults, the best other trial and the baseline (mAP 0.2, + 0.02 per seed) are rerun. `unit`:
    what all trials' units share, see `a_result`; the baseline has its data and selection only.
    """
    targets = PROTOCOLS[protocol].targets
    write_json(
        folder / "study.json",
        {
            "format": FORMAT,
            "study": folder.name,
            "title": "A study for tests",
            "protocol": protocol,
            "targets": list(targets),
            "data": unit.get("data", "stand-in"),
            "selection": unit.get("selection", "source_validation"),
            "seed": 0,
            "confirm_seeds": list(confirm_seeds),
            "space": {
                "alignment_weight": {"low": 0.01, "high": 5.0, "log": True, "step": None, "choices": []},
                "bank_momentum": {"low": 0.5, "high": 0.99, "log": False, "step": None, "choices": []},
            },
            "defaults": {"alignment_weight": 0.1, "bank_momentum": 0.9},
            "base": {},
            "preset": "standin",
            "budget": {"trials": len(scores)},
            "command": "python sweeps/run.py --study protocol3",
            "commit": "0123abc",
            "dirty": False,
            "versions": {"python": "3.11.7", "torch": "2.15.0"},
        },
    )
    best = max(range(1, len(scores)), key=lambda number: scores[number], default=0)
    for number, score in enumerate(scores):
        trial = folder / f"trial-{number:04d}"
        seeds = [0, *confirm_seeds] if number in (0, best) else [0]
        for target in targets:
            for seed in seeds:
                values = {"mAP": score - 0.2 + 0.01 * seed, "score": score, "seed": seed, **unit}
                write_unit(trial / f"{target}-s{seed}", target, protocol=protocol, **values)
        write_trial(trial, number, score, [f"{target}-s{seed}" for target in targets for seed in seeds])
    if confirm_seeds:
        trial = folder / "trial-baseline"
        for target in targets:
            for seed in confirm_seeds:
                shared = {key: unit[key] for key in ("data", "selection") if key in unit}
                values = {"mAP": 0.2 + 0.02 * seed, "score": 0.4, "seed": seed, "method": "baseline", **shared}
                write_unit(trial / f"{target}-s{seed}", target, protocol=protocol, **values)
        write_trial(trial, None, None, [f"{target}-s{seed}" for target in targets for seed in confirm_seeds])
    return folder


def write_trial(
    trial: Path,
    number: int | None,
    score: float | None,
    units: Sequence[str],
    state: str = "complete",
    reason: str = "",
) -> None:
    """trial.json; units on seed 0 are the search's, others confirm."""
    rng = np.random.default_rng(number or 0)
    params = {"alignment_weight": 0.1, "bank_momentum": 0.9}
    if number:
        params = {"alignment_weight": float(10 ** rng.uniform(-2, 0.7)), "bank_momentum": float(rng.uniform(0.5, 0.99))}
    write_json(
        trial / "trial.json",
        {
            "number": number,
            "origin": "baseline" if number is None else "search" if number else "default",
            "params": {} if number is None else params,
            "state": state,
            "score": score,
            "reason": reason,
            "units": [unit for unit in units if unit.endswith("-s0")],
            "confirm_units": [unit for unit in units if not unit.endswith("-s0")],
        },
    )
