"""What a coordinator tells a worker process through its stdin, and what the worker says last through its stdout."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

STOP_SECONDS = 20.0  # from the word stop to the end; a unit notices at its next step
_END_LENGTH = 2000  # characters; far below what a pipe holds while nobody reads


@dataclass(frozen=True)
class Assignment:
    """What the coordinator tells a worker.

    Attributes:
        study: name of the study.
        spec: sweeps.plan.spec.to_dict.
        storage: URL, with its password if there is one: it comes by pipe, so that no list of processes shows it.
        folder, data_root: of the study, and of the images.
        contents: target -> what its units read, see `sweeps.plan.images.Data`.
        data: "stand-in" or "real".
        slot: name of the worker's place, see `WorkerPool.name`.
        threads: CPU threads of a unit.
        salt: differs whenever a sampler must not repeat another one's draws.
        until: no new configuration after this time (seconds since the epoch).
        code: hash of the code that a worker must have; "" for any.
    """

    study: str
    spec: dict[str, Any]
    storage: str
    folder: str
    data_root: str
    contents: dict[str, dict[str, Any]]
    data: str
    slot: str
    threads: int
    salt: str
    until: float | None
    code: str

    def send(self, pipe: IO[bytes]) -> None:
        """Write it as one line."""
        pipe.write(json.dumps(asdict(self)).encode() + b"\n")
        pipe.flush()

    @classmethod
    def receive(cls, pipe: IO[bytes]) -> Assignment:
        """Read what `send` wrote."""
        return cls(**json.loads(pipe.readline()))


@dataclass(frozen=True)
class End:
    """Why a worker ended by itself. One that was told to stop, killed or fenced leaves none.

    Attributes:
        kind: unusable (the data or the study: no further attempt helps) or failed (another worker may do better).
        text: one line.
    """

    kind: Literal["unusable", "failed"]
    text: str

    def send(self, pipe: IO[bytes]) -> None:
        """Write it as one line."""
        pipe.write(json.dumps({"kind": self.kind, "text": self.text[:_END_LENGTH]}).encode() + b"\n")
        pipe.flush()

    @classmethod
    def receive(cls, said: bytes) -> End | None:
        """What `send` wrote, from all that came through the pipe; None where that is nothing of the kind."""
        try:
            return cls(**json.loads(said.splitlines()[-1]))
        except (IndexError, ValueError, TypeError):  # silence, or something that was printed at import
            return None
