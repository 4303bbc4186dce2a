"""The images a study runs on: drawn or checked once, before any worker starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sweeps.plan.spec import StudySpec

# The loaders (numpy, Pillow) are imported where they are needed: --list and --dry-run answer without them.


@dataclass(frozen=True)
class Data:
    """The images of a study: their root folder, and the content hash of what each target's units read."""

    root: Path
    hashes: dict[str, str]

    @property
    def kind(self) -> str:
        """How results are labelled."""
        return "stand-in" if any(self.hashes.values()) else "real"


def is_standin(data_root: Path | None) -> bool:
    """Whether a study on this data root (None: the built-in one) runs on stand-in images."""
    if data_root is None:
        return True
    from lda.data.survey import MARKER

    return (data_root / MARKER).is_file()


def prepare_data(spec: StudySpec, data_root: Path | None) -> Data:
    """Draw the stand-in, or check that every data set is there. Raises UsageError naming all that is missing."""
    from lda.data.sources import build_task
    from lda.data.standin.tree import ensure_standin

    root = (data_root or ensure_standin(spec.standin)).resolve()
    hashes = {}
    for target in spec.targets:
        config = spec.config(target, spec.seed, {})
        task = build_task(
            spec.protocol,
            target,
            root,
            validation_fraction=config.validation_fraction,
            cuhk03_boxes=config.cuhk03_boxes,
            cuhk03_protocol=config.cuhk03_protocol,
            msmt17_train=config.msmt17_train,
        )
        hashes[target] = task.data_hash
    return Data(root, hashes)
