"""Checkpoints of a few steps, for tests of what is done with them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from tasks import make_task

from lda.config import preset
from lda.trainer import Trainer


def checkpoint(folder: Path, method: str, steps: int = 4, **changes: Any) -> Path:
    """`folder`/checkpoint.pt of a small network after some steps on three sources, drawn in `folder` as well."""
    small = {"image_height": 32, "image_width": 16, "ids_per_batch": 6, "images_per_id": 2, "pad": 1}
    config = preset("standin", method=method, threads=1, **{**small, "warmup_epochs": 0, **changes})
    torch.set_num_threads(1)
    trainer = Trainer(config, make_task(folder / "images", 3), torch.device("cpu"))
    for batch in itertools.islice(trainer.loader(), steps):
        trainer.train_step(batch)
    trainer.checkpoint("unit", f"training-{method}", 0.0, 0).save(folder / "checkpoint.pt")
    return folder / "checkpoint.pt"
