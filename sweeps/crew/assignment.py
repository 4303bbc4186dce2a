"""What a coordinator tells a worker process, through its stdin, and what the worker's exit code tells it back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import IO, Any

EXIT_USAGE = 2  # the data or the study cannot be used: no further attempt helps
STOP_SECONDS = 20.0  # from the word stop to the end; a unit notices at its next step


@dataclass(frozen=True)
class Assignment:
    """What the coordinator tells a worker.

    Attributes:
        study: name of the study.
        spec: sweeps.spec.to_dict.
        storage: URL, with its password if there is one: it comes by pipe, so that no list of processes shows it.
        folder, data_root: of the study, and of the images.
        data_hash: target -> content hash of its data.
        data: "stand-in" or "real".
        slot: index of the worker on its machine.
        threads: CPU threads of a unit.
        salt: differs whenever a sampler must not repeat another one's draws.
        until: no new configuration after this time (seconds since the epoch).
    """

    study: str
    spec: dict[str, Any]
    storage: str
    folder: str
    data_root: str
    data_hash: dict[str, str]
    data: str
    slot: int
    threads: int
    salt: str
    until: float | None

    def send(self, pipe: IO[bytes]) -> None:
        """Write it as one line."""
        pipe.write(json.dumps(asdict(self)).encode() + b"\n")
        pipe.flush()

    @classmethod
    def receive(cls, pipe: IO[bytes]) -> Assignment:
        """Read what `send` wrote."""
        return cls(**json.loads(pipe.readline()))
