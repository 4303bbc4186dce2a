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
    kind: str  # how results are labelled: "stand-in" or "real"


def is_standin(data_root: Path | None) -> bool:
    """Whether a study on this data root (None: the built-in one) runs on stand-in images."""
    if data_root is None:
        return True
    from lda.data.survey import read_standin

    return read_standin(data_root) is not None


def prepare_data(spec: StudySpec, data_root: Path | None) -> Data:
    """Draw the stand-in, or check that every data set is there. Raises UsageError naming all that is missing."""
    from lda.data.options import DataOptions
    from lda.data.sources import build_task
    from lda.data.standin.tree import ensure_standin
    from lda.settings import settings_of

    root = (data_root or ensure_standin(spec.standin)).resolve()
    hashes, kinds = {}, []
    for target in spec.targets:
        config = spec.config(target, spec.seed, {})
        task = build_task(
            spec.protocol,
            target,
            root,
            DataOptions(**{key: getattr(config, key) for key in settings_of(DataOptions)}),
            validation_fraction=config.validation_fraction,
        )
        hashes[target] = "+".join(sorted({*task.content.sources.values(), task.content.target}))
        kinds.append(task.content.kind)
    return Data(root, hashes, "stand-in" if "stand-in" in kinds else "real")
