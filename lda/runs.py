"""The folder of one unit: the truth about a run, as files. W&B and Optuna are views of it.

config.json: {"unit": hash, "config": {...}}
env.json: commit, dirty flag, versions, host, device, command
metrics.jsonl: one line per logged step, append-only
checkpoint.pt: the newest complete state
buffer_bank.npz: "domains" (K,), "layers" (L,); per layer "mean/<layer>" (K, C), "var/<layer>" (K, C) and
    "count/<layer>" (K,); absent for the plain baseline
result.json: written last: a unit that has it is finished and never runs again
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lda.config import Config
from lda.errors import UsageError
from lda.files import atomic, write_json

_PACKAGES = ("lda-reid", "torch", "torchvision", "numpy", "pillow", "wandb", "optuna")


class RunFolder:
    """The files of one unit.

    Raises UsageError when the folder holds another unit's files: a folder never mixes two configurations.
    """

    def __init__(self, path: Path, config: Config, unit: str) -> None:
        self.path = path
        self.unit = unit
        existing = self._read("config.json")
        if existing is not None and existing["unit"] != unit:
            theirs, ours = existing["config"], config.to_dict()
            keys = [key for key in ours if theirs.get(key) != ours[key]] or ["the data"]
            raise UsageError(
                f"{path} holds another run (unit {existing['unit']}, this is {unit}); they differ in: "
                f"{', '.join(keys)}. Choose another --output or remove that folder"
            )
        write_json(path / "config.json", {"unit": unit, "config": config.to_dict()})

    def result(self) -> dict[str, Any] | None:
        """The finished unit's result, None while it is unfinished."""
        return self._read("result.json")

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Finish the unit."""
        write_json(self.path / "result.json", {"unit": self.unit, **result})

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and flush it."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says so far."""
        path = self.path / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def rewind(self, step: int, last: bool = False) -> None:
        """Drop what metrics.jsonl says after `step` (a resumed run writes it again), and a half-written last line.

        `last`: the step is the run's last one, whose validation is made again too.
        """
        if (self.path / "metrics.jsonl").exists():
            rows = self.rows()
            self.replace_rows(
                [row for row in rows if row["step"] < step or (row["step"] == step and (not last or "lr" in row))]
            )

    def replace_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make metrics.jsonl say this."""
        with atomic(self.path / "metrics.jsonl") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UsageError(
                f"{self.path / name} is not valid JSON ({error}); remove it to run the unit again"
            ) from None
        return content


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A killed run may leave a half-written last line: it is left out."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UsageError(f"{path}: line {number} is not valid JSON") from None
    return rows


def environment(device: str) -> dict[str, Any]:
    """What a run can name of its parents: code, versions, machine, command."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "host": platform.node(),
        "platform": platform.platform(),
        "device": device,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    """Output of git in the source tree, empty where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
