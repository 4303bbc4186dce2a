"""The files of a unit survive what happens to runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lda.bank_files import draw_banks, tabulate_banks, write_banks
from lda.normalisation import BufferBank

from lda.config import preset
from lda.errors import UsageError
from lda.files import atomic, write_json
from lda.runs import RunFolder, environment, read_metrics


def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), atomic(path) as file:
        file.writelines(["half", 3])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_atomic_under_sigkill(tmp_path: Path) -> None:
    """A process killed while it rewrites a file over and over leaves a whole one."""
    code = (
        "import sys; from pathlib import Path; from lda.runs import write_json\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1; write_json(Path(sys.argv[1]), {'n': n, 'filling': ['x' * 1000] * 200})\n"
        "    print(n, flush=True) if n == 3 else None\n"
    )
    path = tmp_path / "file.json"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert json.loads(path.read_text())["n"] >= 3


def test_files_are_as_readable_as_the_users_others(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json(tmp_path / "file.json", {})
    assert (tmp_path / "file.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "file.json", {"mAP": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_folder_never_mixes_two_units(tmp_path: Path) -> None:
    config = preset("standin")
    RunFolder(tmp_path, config, "aaa")
    RunFolder(tmp_path, config, "aaa")
    with pytest.raises(UsageError, match=r"holds another run .*differ in: bank_momentum\."):
        RunFolder(tmp_path, config.replace(bank_momentum=0.5), "bbb")


def test_result_finishes_a_unit(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, preset("standin"), "aaa")
    assert run.result() is None
    run.write_result({"mAP": 0.5})
    assert run.result() == {"unit": "aaa", "mAP": 0.5}


def test_damaged_result_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, preset("standin"), "aaa")
    (tmp_path / "result.json").write_text('{"mAP": 0.')
    with pytest.raises(UsageError, match=r"result\.json is not valid JSON"):
        run.result()


def test_metrics_survive_a_half_written_line_and_rewind(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, preset("standin"), "aaa")
    for step in (5, 10, 15):
        run.log({"step": step, "loss/total": 1.0 / step})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 20, "loss')
    assert [row["step"] for row in read_metrics(path)] == [5, 10, 15]
    run.rewind(10)
    assert [row["step"] for row in read_metrics(path)] == [5, 10]
    path.write_text('{"step": 5\n{"step": 10}\n')
    with pytest.raises(UsageError, match="line 1 is not valid JSON"):
        read_metrics(path)


def test_environment_names_the_runs_parents() -> None:
    env = environment("cpu")
    assert env["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(env) == {"commit", "dirty", "python", "versions", "host", "platform", "device", "command"}
    json.dumps(env)


@pytest.fixture
def banks() -> dict[str, BufferBank]:
    made = {"bn1": BufferBank(3, 4, 0.9), "output": BufferBank(3, 400, 0.9)}
    for bank in made.values():
        for domain in range(3):
            bank.update(domain, torch.randn(bank.mean.shape[1]), torch.rand(bank.mean.shape[1]))
    return made


def test_bank_file_holds_the_bank(tmp_path: Path, banks: dict[str, BufferBank]) -> None:
    write_banks(tmp_path / "buffer_bank.npz", ["a", "b", "c"], banks)
    with np.load(tmp_path / "buffer_bank.npz", allow_pickle=False) as arrays:
        assert arrays["domains"].tolist() == ["a", "b", "c"]
        assert arrays["layers"].tolist() == ["bn1", "output"]
        for layer, bank in banks.items():
            np.testing.assert_array_equal(arrays[f"mean/{layer}"], bank.mean.numpy())
            np.testing.assert_array_equal(arrays[f"var/{layer}"], bank.var.numpy())
            assert arrays[f"count/{layer}"].tolist() == [1, 1, 1]


def test_bank_picture_and_table(banks: dict[str, BufferBank]) -> None:
    picture = draw_banks(banks)
    assert picture.dtype == np.uint8
    assert picture.shape == (2 * 2 * (3 * 6 + 3), 1024, 3)
    columns, rows = tabulate_banks(["a", "b", "c"], banks)
    assert len(rows) == 6
    assert all(len(row) == len(columns) for row in rows)
    assert rows[1][:3] == ["bn1", "b", 1]
    assert rows[1][3] == pytest.approx(banks["bn1"].mean[1].mean().item())
