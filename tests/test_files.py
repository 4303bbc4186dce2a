"""What is written stays, a folder has one owner, and a disk that refuses says why."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lda.errors import DamagedError, FolderInUseError, UsageError, warn
from lda.files import LOCK, atomic, cannot_write, damage_of_zip, held, make_folder, read_json, write_json

# --- synced ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is synced from now on, as it is called at that moment."""
    found: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_a_file_is_synced_with_every_folder_that_names_it(tmp_path: Path, synced: list[Path]) -> None:
    folder = tmp_path / "study" / "trial" / "unit"
    write_json(folder / "result.json", {})
    file = synced.pop(-2)
    assert file.parent == folder
    assert file.name.startswith(".result.json.")
    assert synced == [tmp_path, tmp_path / "study", tmp_path / "study" / "trial", folder]
    synced.clear()
    write_json(folder / "result.json", {})
    assert [path.name.split(".")[0] for path in synced] == ["", "unit"]


def test_a_folder_that_another_makes_meanwhile_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda self, **options: (real(self), real(self, **options))[1])
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_text_is_utf8_in_every_locale(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from lda.files import atomic\n"
    code += "with atomic(Path(sys.argv[1])) as file: file.write('mAP \\u00b1 0.3')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=True, env=environment)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mAP \u00b1 0.3"


# --- held ------------------------------------------------------------------------------------------------------------

_HOLDER = """
import sys, time
from pathlib import Path
from lda.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", _HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        with pytest.raises(FolderInUseError, match=rf"run is in use by process {process.pid} on ") as told:
            held(tmp_path / "run").__enter__()
        assert isinstance(told.value, UsageError)
        assert (told.value.pid, told.value.host) == (process.pid, os.uname().nodename)
        assert told.value.folder == tmp_path / "run"
        process.kill()
        process.wait()
        with held(tmp_path / "run"):
            assert (tmp_path / "run" / LOCK).read_text().split()[0] == str(os.getpid())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_is_held_once_in_a_process_and_let_go_by_an_error(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run")
    told: list[FolderInUseError] = []

    def other_thread() -> None:
        try:
            held(link).__enter__()
        except FolderInUseError as error:
            told.append(error)

    def fail_meanwhile() -> None:
        with held(tmp_path / "run"):
            thread = threading.Thread(target=other_thread)
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        fail_meanwhile()
    assert [error.pid for error in told] == [os.getpid()]
    with held(link):
        pass


def test_a_child_does_not_keep_the_folder_held(tmp_path: Path) -> None:
    """A worker of a data loader that outlives a killed run."""
    code = _HOLDER.replace(
        "    sys.stdin.read()", "    import os\n    if os.fork() == 0: time.sleep(60)\n    os._exit(9)"
    )
    code = code.replace('print("held", flush=True)', "")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], start_new_session=True)
    try:
        assert process.wait(30) == 9
        with held(tmp_path):
            pass
    finally:
        os.killpg(process.pid, 9)


def test_a_child_that_ends_does_not_let_go(tmp_path: Path) -> None:
    with held(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=os.getpid)
        child.start()
        child.join()
        code = f"from lda.files import held; from pathlib import Path; held(Path({str(tmp_path)!r})).__enter__()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "FolderInUseError" in done.stderr


def test_one_of_many_at_once_holds(tmp_path: Path) -> None:
    """The lock file is removed by its holder: who opened it before and locks it after holds nothing."""
    code = (
        "import sys; from pathlib import Path; from lda.files import held; from lda.errors import FolderInUseError\n"
        "folder, won = Path(sys.argv[1]), 0\n"
        "while won < 40:\n"
        "    try:\n"
        "        with held(folder):\n"
        "            (folder / 'inside').mkdir(); (folder / 'inside').rmdir(); won += 1\n"
        "    except FolderInUseError: pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


def test_without_locks_it_goes_on_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with held(tmp_path):
        pass
    assert (
        "its file system has no locks (No locks available); run one command there at a time" in capsys.readouterr().err
    )


# --- why nothing can be written --------------------------------------------------------------------------------------


def test_a_disk_with_room_can_be_written(tmp_path: Path) -> None:
    assert cannot_write(tmp_path / "not" / "yet", 3 * 2**20 + 1) == ""
    assert cannot_write(tmp_path, 0) == ""
    assert list(tmp_path.iterdir()) == []
    assert "full" in cannot_write(tmp_path, 2**60)


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own; only root may mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("no mounting here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_says_how_full(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=4m") as folder:
        assert cannot_write(folder, 2**20) == ""
        assert cannot_write(folder / "unit", 2**23) == f"the disk of {folder} is full (4.0 MiB free, 8.0 MiB needed)"


def test_no_inodes_and_read_only_are_told_from_full(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=4m,nr_inodes=4") as folder:
        for number in range(3):
            (folder / str(number)).touch()
        assert cannot_write(folder, 1) == f"the disk of {folder} has no inodes left for another file"
        (folder / "0").unlink()
        assert cannot_write(folder, 1) == ""
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert cannot_write(folder, 1) == f"the disk of {folder} cannot be written: it is read-only"


@pytest.mark.parametrize(
    ("number", "reason"),
    [(122, "a quota is used up"), (116, "its server has lost it"), (5, "input/output errors"), (27, "File too large")],
)
def test_errors_that_no_test_can_bring_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    assert reason in cannot_write(tmp_path, 5)


def test_too_many_open_files_are_not_the_disks_fault(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from lda.files import cannot_write\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "print([cannot_write(Path(sys.argv[1]), 5)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout == "['']\n"


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\0" * 50, b"[]", b'{"a": "\xff"}', b"[" * 100000])
def test_damage_is_told_from_other_mistakes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=rf"^{path}: expected a JSON"):
        read_json(path)


def test_a_missing_file_and_a_folder_are_damage(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing" / "deeper"):
        with pytest.raises(DamagedError, match=f"^{path}: expected a JSON file"):
            read_json(path)


def test_a_zip_file_is_checked_to_its_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights", bytes(range(256)) * 16)
    content = path.read_bytes()
    assert damage_of_zip(path) == ""
    path.write_bytes(content[:1000] + bytes(512) + content[1512:])
    assert damage_of_zip(path) == "wrong checksum of weights"
    for damaged in (b"", content[:-5], bytes(len(content))):
        path.write_bytes(damaged)
        assert damage_of_zip(path)


def test_a_warning_is_one_line_once(capsys: Any) -> None:
    for _ in range(2):
        warn("something that this test alone says")
    assert capsys.readouterr().err == "warning: something that this test alone says\n"


def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that know no sync of folders answer EINVAL, which is no failure; EIO is one."""
    real = os.fsync

    def fsync(descriptor: int, number: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(descriptor, 22))
    with atomic(tmp_path / "a") as file:
        file.write("a")
    monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(descriptor, 5))
    with pytest.raises(OSError, match="Input/output"), atomic(tmp_path / "b") as file:
        file.write("b")
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "b"}
