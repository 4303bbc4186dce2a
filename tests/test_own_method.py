"""A method of one's own: one file outside the package is trained, swept, tabulated, drawn and evaluated as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

METHOD = """
from dataclasses import dataclass
from lda.methods.base import Method
from lda.parts.backbones import backbone_of
from lda.parts.heads import Head, gem, label_offsets
from lda.parts.losses import IdentitySettings, identity_loss
from lda.settings import Range, setting

@dataclass(frozen=True, kw_only=True)
class Own(IdentitySettings):
    norm_weight: float = setting(0.1, "of the squared norm", low=0.0, high=10.0, search=Range(0.01, 1.0, log=True))

class SmallFeatures(Method):
    title, reference, searched, Settings = "small features", "nobody, 2026", ("norm_weight",), Own
    def __init__(self, settings, setup):
        super().__init__(settings, setup)
        self.backbone = backbone_of(setup)
        self.head, self.offsets = Head(self.backbone.channels, [sum(setup.num_ids)]), label_offsets(setup.num_ids)
    def training_losses(self, batch, step):
        features, labels = self.encode(batch.images), batch.labels + self.offsets[batch.domains]
        identity = identity_loss(self.head(features, 0), labels, self.settings.label_smoothing)
        norm = features.square().mean()
        return {"loss/total": identity + self.settings.norm_weight * norm, "loss/id": identity, "loss/norm": norm}
    def encode(self, images):
        return gem(self.backbone(images), self.setup.network.gem_p)
"""


@pytest.fixture(scope="module")
def study(standin_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A smoke study of the method, and the environment in which it is found."""
    home = tmp_path_factory.mktemp("own")
    (home / "methods").mkdir()
    (home / "methods" / "small_features.py").write_text(METHOD)
    environment = {**os.environ, "LDA_METHODS": str(home / "methods"), "WANDB_MODE": "disabled"}
    command = ["sweeps/run.py", "--study", "smoke", "--set", "method=small_features", "--data-root", str(standin_tiny)]
    done = run(environment, *command, "--workers", "1", "--output", str(home / "runs"))
    assert done.returncode == 0, done.stderr
    assert "small features, best of 2 (trial 1)" in done.stdout
    assert "baseline, plain BN" in done.stdout
    return home / "runs" / "smoke", environment


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_its_own_setting_is_swept(study: tuple[Path, dict[str, str]]) -> None:
    trials = [json.loads((study[0] / f"trial-000{number}" / "trial.json").read_text()) for number in range(2)]
    assert trials[0]["params"] == {"norm_weight": 0.1}
    assert 0.01 <= trials[1]["params"]["norm_weight"] <= 1.0
    result = json.loads((study[0] / "trial-0001" / "market1501-s1" / "result.json").read_text())
    assert (result["method"], result["title"]) == ("small_features", "small features")
    assert result["cost"] == {"train_passes": 1.0, "test_forwards": 1.0, "test": "vector", "pair_cost": None}


def test_reading_needs_no_file_of_the_method(study: tuple[Path, dict[str, str]]) -> None:
    """Tables and reports ask the results."""
    folder, environment = study
    without = {key: value for key, value in environment.items() if key != "LDA_METHODS"}
    table = run(without, "analysis/tables.py", str(folder), "--format", "markdown")
    assert table.returncode == 0, table.stderr
    assert "small features, defaults (trial 0)" in table.stdout
    drawn = run(without, "analysis/buffer_bank.py", str(folder))
    assert drawn.returncode == 2
    assert len(drawn.stderr.splitlines()) == 1


@pytest.mark.slow
def test_its_checkpoint_is_evaluated_where_the_file_is(study: tuple[Path, dict[str, str]], standin_tiny: Path) -> None:
    folder, environment = study
    command = ["-m", "lda.evaluate", "--checkpoint", str(folder / "trial-0000" / "market1501-s1" / "checkpoint.pt"),
               "--target", "market1501", "--data-root", str(standin_tiny)]  # fmt: skip
    done = run(environment, *command)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "trial-0000" / "market1501-s1" / "result.json").read_text())
    assert json.loads(done.stdout)["mAP"] == pytest.approx(result["mAP"], abs=1e-6)
    lost = run({key: value for key, value in environment.items() if key != "LDA_METHODS"}, *command)
    assert lost.returncode == 2
    assert "unknown method 'small_features'" in lost.stderr
    assert len(lost.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"lda.py": METHOD}, "method 'lda' is there already"),
        ({"empty.py": "x = 1"}, "expected one class that derives from lda.methods.base.Method, found 0"),
    ],
)
def test_a_file_that_is_no_method_is_one_line(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    name = next(iter(files)).removesuffix(".py")
    done = run({**os.environ, "LDA_METHODS": str(tmp_path)}, "-m", "lda.train", "--set", f"method={name}")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
