"""The images a study runs on: drawn or checked once, before any worker starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.plan.spec import StudySpec

# The loaders (numpy, Pillow) are imported where they are needed: --list and --dry-run answer without them.


@dataclass(frozen=True)
class Data:
    """The images of a study.

    Attributes:
        root: their folder.
        contents: target -> what its units read, in plain JSON types: {"sources": {source: content hash}, "target":
            content hash, "proxy": that of a proxy domain, if any}; see `lda.data.sources.Content`.
        kind: how results are labelled, "stand-in" or "real".
    """

    root: Path
    contents: dict[str, dict[str, Any]]
    kind: str


def prepare_data(spec: StudySpec, data_root: Path | None) -> Data:
    """Draw the stand-in, or check that every data set is there. Raises UsageError naming all that is missing."""
    from lda.data.sources import build_task
    from lda.data.standin.tree import ensure_standin

    root = (data_root or ensure_standin(spec.standin)).resolve()
    contents: dict[str, dict[str, Any]] = {}
    kinds = set()
    for target in spec.targets:
        config = spec.config(target, spec.seed, {})
        fraction, proxy = config.selection.validation_fraction, config.selection.proxy
        task = build_task(spec.protocol, target, root, config.data, validation_fraction=fraction, proxy=proxy)
        content = task.content
        contents[target] = {"sources": dict(content.sources), "target": content.target}
        contents[target] |= {"proxy": content.proxy} if proxy else {}
        kinds.add(content.kind)
    return Data(root, contents, "stand-in" if "stand-in" in kinds else "real")
