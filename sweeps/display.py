"""What a study shows while it runs. Reads its files and its storage, and holds no state of its own."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from sweeps.folders import StudyFolder


class EventLines:
    """The lines of events.jsonl from now on, one plain line each: for logs and pipes."""

    def __init__(self, folder: StudyFolder) -> None:
        self._path: Path = folder.path / "events.jsonl"
        self._seen = self._path.stat().st_size if self._path.exists() else 0

    def new(self) -> list[str]:
        """What happened since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._seen)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        self._seen += len(complete)
        return [_line(row) for row in complete.splitlines()]


def _line(row: bytes) -> str:
    event = json.loads(row)
    return f"{datetime.fromisoformat(event['time']):%H:%M:%S}  {event['text']}"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h, 5.1 days."""
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 129600 else f"{seconds / 86400:.1f} days"
