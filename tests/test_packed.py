"""Packed images: the right pixels, one file for everyone, rebuilt when a source changes, clear refusals."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image

from lda.data import packed
from lda.data.packed import PackedImages, pack, verify
from lda.data.records import ImageRecord
from lda.errors import UsageError


def _records(root: Path, count: int = 5) -> list[ImageRecord]:
    for number in range(count):
        trees.image(root / f"{number}.png", (9 + number, 20))
    return [ImageRecord(root / f"{number}.png", 0, 0) for number in range(count)]


def _reference(path: Path, height: int, width: int) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def _files(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "packed").iterdir() if path.suffix != ".lock")


def test_pixels_are_those_of_each_image_resized(tmp_path: Path) -> None:
    records = _records(tmp_path)
    images = pack(records, 16, 8, tmp_path / "cache")
    assert len(images) == 5
    batch = images.batch([3, 0, 3])
    assert batch.dtype == torch.uint8
    assert batch.shape == (3, 3, 16, 8)
    for image, index in zip(batch, (3, 0, 3), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), _reference(records[index].path, 16, 8))
    assert torch.equal(images.batch(np.arange(5)), torch.from_numpy(np.array(images.array)))
    batch.zero_()  # a batch is the caller's own
    assert images.batch([3]).any()


def test_worker_processes_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = _records(tmp_path, 9)
    alone = pack(records, 16, 8, tmp_path / "alone").path.read_bytes()
    monkeypatch.setattr(packed, "ALONE", 0)
    monkeypatch.setattr(packed, "CHUNK", 2)
    monkeypatch.setattr(packed, "cores", lambda: 2)
    assert pack(records, 16, 8, tmp_path / "together").path.read_bytes() == alone


def test_worker_processes_do_not_load_torch() -> None:
    code = "import sys, lda.data.decode, lda.data.processes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    source.save(path)
    image = pack([ImageRecord(path, 0, 0)], 16, 8, tmp_path / "cache").batch([0])[0]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(source.convert("RGB")))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: turn by 90 degrees clockwise to view
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    image = pack([ImageRecord(tmp_path / "a.png", 0, 0)], 16, 8, tmp_path / "cache").batch([0])[0]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(upright))


def test_packed_once_and_found_again(tmp_path: Path) -> None:
    records = _records(tmp_path)
    path = pack(records, 16, 8, tmp_path / "cache").path
    stamp = path.stat().st_mtime_ns, path.stat().st_ino
    assert pack(records, 16, 8, tmp_path / "cache").path == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == stamp
    assert pack(records, 32, 8, tmp_path / "cache").path != path
    assert pack(records[::-1], 16, 8, tmp_path / "cache").path != path
    assert len(_files(tmp_path / "cache")) == 6


def test_changed_source_is_packed_again(tmp_path: Path) -> None:
    records = _records(tmp_path)
    before = pack(records, 16, 8, tmp_path / "cache")
    old = before.batch([2])
    Image.new("RGB", (8, 16), "red").save(records[2].path)
    after = pack(records, 16, 8, tmp_path / "cache")
    assert after.path == before.path
    assert np.array_equal(after.batch([2])[0].permute(1, 2, 0).numpy(), _reference(records[2].path, 16, 8))
    assert torch.equal(before.batch([2]), old)  # who has the old file open keeps it
    assert len(_files(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", ["manifest", "cut", "gone"])
def test_damaged_cache_is_packed_again(tmp_path: Path, damage: str) -> None:
    records = _records(tmp_path)
    images = pack(records, 16, 8, tmp_path / "cache")
    good = images.path.read_bytes()
    if damage == "manifest":
        images.path.with_suffix(".json").write_text('{"format": 1, "sou')
    elif damage == "cut":
        images.path.write_bytes(good[:100])
    else:
        images.path.unlink()
    assert pack(records, 16, 8, tmp_path / "cache").path.read_bytes() == good
    assert verify(images.path)


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    path = pack(_records(tmp_path), 16, 8, tmp_path / "cache").path
    assert verify(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not verify(path)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("damage", "reason"), [("empty", "it is empty"), ("cut", "truncated"), ("text", "identify")])
def test_damaged_image_is_named(
    tmp_path: Path, damage: str, reason: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "ALONE", 1000 if processes == 1 else 0)
    monkeypatch.setattr(packed, "cores", lambda: processes)
    records = _records(tmp_path)
    records.append(ImageRecord(tmp_path / "bad.jpg", 0, 0))
    trees.image(tmp_path / "bad.jpg", (32, 64))
    whole = (tmp_path / "bad.jpg").read_bytes()
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"<!DOCTYPE html>"}[damage]
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UsageError, match=rf"bad\.jpg: cannot be decoded \(.*{reason}"):
        pack(records, 16, 8, tmp_path / "cache")
    assert _files(tmp_path / "cache") == []
    (tmp_path / "bad.jpg").unlink()
    with pytest.raises(UsageError, match=r"bad\.jpg: cannot read this image \(No such file"):
        pack(records, 16, 8, tmp_path / "cache")


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=packed.SPARE + 5 * 3 * 16 * 8 - 1))
    records = _records(tmp_path)
    with pytest.raises(UsageError, match=r"packing 5 images of 16 x 8 needs 0\.00 GiB .*set LDA_CACHE_DIR"):
        pack(records, 16, 8, tmp_path / "cache")
    assert _files(tmp_path / "cache") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=packed.SPARE + 5 * 3 * 16 * 8))
    assert len(pack(records, 16, 8, tmp_path / "cache")) == 5


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot be written \(.*set LDA_CACHE_DIR"):
        pack(_records(tmp_path), 16, 8, tmp_path / "cache")
    with pytest.raises(UsageError, match="no images to pack"):
        pack([], 16, 8, tmp_path / "cache")


def test_size_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pack(_records(tmp_path), 16, 8, tmp_path / "cache")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(packed, "ANNOUNCED", 0)
    pack(_records(tmp_path), 32, 8, tmp_path / "cache")
    assert capsys.readouterr().err.startswith("packing 5 images of 32 x 8 (0.00 GiB) into ")


def test_travels_to_another_process(tmp_path: Path) -> None:
    images = pack(_records(tmp_path), 16, 8, tmp_path / "cache")
    expected = images.batch([1])
    content = pickle.dumps(images)
    assert len(content) < 1000
    copy: PackedImages = pickle.loads(content)
    assert torch.equal(copy.batch([1]), expected)


_PACK = """
import sys
from pathlib import Path
from lda.data import packed
from lda.data.records import ImageRecord
packed.ANNOUNCED = 0
records = [ImageRecord(path, 0, 0) for path in sorted(Path(sys.argv[1]).glob("*.png"))]
print("ready", flush=True)
sys.stdin.readline()
print(packed.pack(records, 64, 32, Path(sys.argv[2])).path)
"""


def test_several_processes_at_once_pack_once(tmp_path: Path) -> None:
    records = _records(tmp_path, 200)
    command = [sys.executable, "-c", _PACK, str(tmp_path), str(tmp_path / "cache")]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    results = [process.communicate("go\n", timeout=60) for process in processes]
    assert len({out for out, _ in results}) == 1
    assert sum(err.count("packing 200 images") for _, err in results) == 1
    images = pack(sorted(records, key=lambda record: record.path), 64, 32, tmp_path / "cache")
    assert str(images.path) == results[0][0].strip()
    assert verify(images.path)


def test_killed_while_packing(tmp_path: Path) -> None:
    records = sorted(_records(tmp_path, 1200), key=lambda record: record.path)
    command = [sys.executable, "-c", _PACK, str(tmp_path), str(tmp_path / "cache")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()
    assert process.stderr.readline().startswith(b"packing")
    deadline = time.monotonic() + 20
    while not list((tmp_path / "cache/packed").glob(".*.tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((tmp_path / "cache/packed").glob("*.json"))
    assert [path.name[0] for path in (tmp_path / "cache/packed").glob(".*.tmp-*")] == ["."]  # left over
    images = pack(records, 64, 32, tmp_path / "cache")
    assert verify(images.path)
    assert len(_files(tmp_path / "cache")) == 2
    assert [source[0] for source in json.loads(images.path.with_suffix(".json").read_text())["sources"]] == [
        str(record.path) for record in records
    ]
