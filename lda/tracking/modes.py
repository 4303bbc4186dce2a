"""Whether W&B logs online, offline or not at all, and why: W&B's own words and W&B's own idea of being logged in.

Nothing here imports wandb: a process that must stay light has a short-lived child ask it (about a second, no network).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from lda.errors import UsageError, unknown

Mode = Literal["online", "offline", "disabled"]
WORDS: dict[str, Mode] = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
    "shared": "online",  # many writers of one run; a run of ours has one
}
"""What WANDB_MODE may say, and what it means here."""
_TRUE = ("1", "true", "t", "yes", "y", "on")
_ASK_SECONDS = 60.0
SECONDS = "LDA_WANDB_SECONDS"
_PATIENCE = 30.0


@dataclass(frozen=True)
class Decision:
    """How W&B logs.

    Attributes:
        mode: "auto" where only W&B can say.
        reason: what decided, in a few words.
    """

    mode: Literal["auto", "online", "offline", "disabled"]
    reason: str


def requested(setting: str) -> Decision:
    """What the setting `wandb` and the environment say; WANDB_DISABLED and WANDB_MODE overrule `auto` only.

    Raises UsageError for a word that W&B does not know.
    """
    if setting != "auto":
        return Decision(_meaning("wandb", setting), f"wandb={setting}")
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in _TRUE:
        return Decision("disabled", f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}")
    if word := os.environ.get("WANDB_MODE"):
        return Decision(_meaning("WANDB_MODE", word), f"WANDB_MODE={word}")
    return Decision("auto", "")


def _meaning(where: str, word: str) -> Mode:
    if word not in WORDS:
        raise UsageError(f"{where}: {unknown('mode of W&B', word, WORDS)}")
    return WORDS[word]


def decide(setting: str) -> Decision:
    """The mode of a run with this setting, never "auto". Raises UsageError as `requested` does."""
    decision = requested(setting)
    return _ask() if decision.mode == "auto" else decision


def resolve_mode(setting: str) -> Mode:
    """`auto` is online with an account, else offline. Raises UsageError as `requested` does."""
    return cast(Mode, decide(setting).mode)


def account_configured() -> bool:
    """Whether W&B could log in without asking: keys, token files, netrc and settings files, as W&B itself looks."""
    return _ask().mode == "online"


def _ask() -> Decision:
    """What wandb itself makes of its environment and files."""
    command = [sys.executable, "-m", "lda.tracking.child", "--ask"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=_ASK_SECONDS,
            env=environment(),
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return Decision("offline", f"wandb did not start within {_ASK_SECONDS:.0f} s")
    except ValueError:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Decision("offline", f"wandb does not start: {why}")
    return Decision(answer["mode"], answer["reason"])


def environment() -> dict[str, str]:
    """The environment of a process that imports wandb: the modes are decided before, and it stays silent."""
    decided = ("WANDB_MODE", "WANDB_DISABLED")  # an unknown word would make wandb refuse to start
    return {**{key: value for key, value in os.environ.items() if key not in decided}, "WANDB_SILENT": "true"}


def patience() -> float:
    """Seconds that W&B may be silent: LDA_WANDB_SECONDS, else 30. Raises UsageError when that is no number above 0."""
    given = os.environ.get(SECONDS) or _PATIENCE
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise UsageError(f"{SECONDS}: expected seconds above 0, got {given!r}")
    return seconds


def log_folder(folder: Path) -> Path:
    """Where the logs of a run or study in `folder` lie: WANDB_DIR, if set, moves them."""
    parent = Path(os.environ.get("WANDB_DIR") or folder).expanduser()
    return parent / (".wandb" if (parent / ".wandb").exists() else "wandb")


def announcement(setting: str, folder: Path | None = None) -> str:
    """One line for the screen: how W&B logs, why, and where its logs lie. Takes about a second in mode `auto`.

    Args:
        setting: the setting `wandb`.
        folder: of the study or run.

    Raises UsageError for a mode that W&B does not know, a WANDB_DIR that cannot be written, a bad LDA_WANDB_SECONDS.
    """
    patience()
    decision = decide(setting)
    line = f"W&B: {decision.mode} ({decision.reason})"
    if decision.mode == "disabled":
        return line
    if given := os.environ.get("WANDB_DIR"):
        check_writable(Path(given).expanduser())
    where = log_folder(folder or Path())
    return f"{line}; wandb sync {where} uploads" if decision.mode == "offline" else f"{line}; logs in {where}"


def check_writable(folder: Path) -> None:
    """Make the folder of WANDB_DIR. Raises UsageError where that is not possible: wandb would write to /tmp."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"WANDB_DIR: cannot make {folder}: {error.strerror}") from None
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(f"WANDB_DIR: cannot write to {folder}")
