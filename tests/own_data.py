"""Data sets of one's own, for tests: any list of images as CSV and YAML."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lda.data.catalogue import facts
from lda.data.records import ReidDataset

APART = 100_000  # persons of one number who train and who are tested are kept apart by it


def describe(folder: Path, name: str, root: Path | str, *, cameras: bool = True, **more: str) -> Path:
    """The YAML file of a data set."""
    keys = {"name": name, "title": f"My {name}", "licence": "CC0", "citation": "nobody, 2026", "version": "1.0"}
    keys |= {"cameras": str(cameras).lower(), "root": str(root), **more}
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items() if value))
    return path


def protocol(folder: Path, name: str, sources: Iterable[str], targets: Iterable[str], part: str = "train") -> Path:
    """The YAML file of a protocol."""
    path = folder / f"{name}.yaml"
    lists = f"sources: [{', '.join(sources)}]\ntargets: [{', '.join(targets)}]\n"
    path.write_text(f"name: {name}\ntitle: My {name}\n{lists}source_part: {part}\n")
    return path


def copy_of(dataset: ReidDataset, folder: Path, root: Path) -> str:
    """A data set that was read, once more as one's own: the same images below `root`, persons numbered from 1,
    test persons apart from training persons, distractors as nobody. Returns its name."""
    name = f"my_{dataset.name}"
    lines = ["path,pid,camid,split"]
    for split in ("train", "query", "gallery"):
        for record in getattr(dataset, split):
            pid = record.pid + (1 if split == "train" else APART)
            pid = 0 if record.pid in dataset.distractor_pids else pid
            lines.append(f"{record.path.relative_to(root).as_posix()},{pid},{record.camid},{split}")
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    describe(folder, name, root, cameras=facts(dataset.name).cameras)
    return name
