"""What a step costs: counted and timed in one command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tasks import make_task
from torch import nn

from lda import step_cost
from lda.step_cost import convolutions_counted, table


def test_convolutions_are_counted_forward_and_backward_and_nothing_else() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 6 * 6, 7))
    forward = 2 * 5 * 3 * 9 * 6 * 6
    with convolutions_counted() as number:
        network(torch.ones(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert number() == 3 * forward
    with convolutions_counted() as number:
        network(torch.ones(2, 3, 8, 8)).sum().backward()
    assert number() == 2 * forward


def test_the_table_has_what_is_declared_and_what_is_counted(tmp_path: Path) -> None:
    small = {"image_height": 32, "image_width": 16, "ids_per_batch": 6, "images_per_id": 2, "warmup_epochs": 0}
    changes = {"threads": 1, **small}
    lines = table("standin", changes, ["baseline", "lda"], make_task(tmp_path, 2), rounds=2).splitlines()
    cells = {line.split()[0]: [float(cell) for cell in line.split()[1:4]] for line in lines[1:]}
    assert cells["baseline"] == [1, 1, 1]
    assert cells["lda"][:2] == pytest.approx([2, 2], abs=0.02), "its second path has begun"


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_cost.main(["--methods", "lad"]) == 2
    assert "unknown method 'lad' (did you mean 'lda'?)" in capsys.readouterr().err
    assert step_cost.main(["--rounds", "0"]) == 2
