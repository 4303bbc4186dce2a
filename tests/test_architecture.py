"""Data flows one way: who may import whom. The table is the house's plan; a new import is a decision."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lda import methods

ROOT = Path(__file__).parent.parent

# module (or package) -> first-party prefixes it may import, besides lda.errors. The longest matching row counts.
MAY_IMPORT = {
    "lda": set(),
    # Ground floor: words, files, settings, the batch.
    "lda.errors": set(),
    "lda.protocols": {"lda.data.catalogue", "lda.data.own"},  # of your own: what they name, and the files
    "lda.settings": set(),
    "lda.batch": set(),
    "lda.kept": set(),
    "lda.bank_distance": set(),
    "lda.code": set(),
    "lda.files": set(),
    "lda.command": set(),
    "lda.arguments": set(),
    "lda.ranking": set(),
    "lda.reranking": {"lda.ranking"},
    "lda.tracking": {"lda.tracking"},
    "lda.groups": {"lda.settings"},
    "lda.runs": {"lda.code", "lda.files", "lda.settings"},
    "lda.device": {"lda.groups", "lda.command"},
    "lda.data": {"lda.protocols", "lda.settings", "lda.batch", "lda.arguments", "lda.command", "lda.files", "lda.data"},
    # What a method is made of, the methods, and what joins their settings.
    "lda.parts": {"lda.bank_distance", "lda.batch", "lda.groups", "lda.kept", "lda.settings", "lda.parts"},
    "lda.methods": {
        "lda.arguments",
        "lda.batch",
        "lda.groups",
        "lda.kept",
        "lda.ranking",
        "lda.settings",
        "lda.parts",
        "lda.methods",
    },
    "lda.config": {
        "lda.arguments",
        "lda.data.options",
        "lda.files",
        "lda.groups",
        "lda.methods",
        "lda.protocols",
        "lda.settings",
    },
    # One run.
    "lda.checkpoint": {"lda.config", "lda.files", "lda.methods"},
    "lda.trainer": {"lda"},
    "lda.testing": {"lda"},
    "lda.retrieval": {"lda"},
    "lda.step_cost": {"lda"},
    "lda.weights": {"lda"},
    "lda.unit": {"lda"},
    "lda.train": {"lda"},
    "lda.evaluate": {"lda"},
    "lda.matrix": {"lda.files", "lda.runs"},
    "lda.cross_evaluation": {"lda"},
    # What leaves the house: features and networks.
    "lda.features": {"lda.files"},
    "lda.embedding": {"lda"},
    "lda.embed": {"lda"},
    "lda.search": {"lda"},
    "lda.export": {"lda"},
    # Many runs, and what reads them.
    "sweeps": {"lda", "sweeps"},
    "analysis": {
        "lda.arguments",
        "lda.bank_distance",
        "lda.command",
        "lda.data.catalogue",
        "lda.files",
        "lda.matrix",
        "lda.protocols",
        "lda.runs",
        "lda.settings",
        "analysis",
    },
    # The only ones that need a network: what it finds is in no file.
    "analysis.ranked_data": {
        "lda.data.decode",
        "lda.data.records",
        "lda.ranking",
        "lda.retrieval",
        "analysis.study",
    },
    "analysis.ranked_lists": {"lda.arguments", "lda.command", "lda.files", "lda.retrieval", "analysis"},
    "analysis.wandb_workspace": {"lda.arguments", "lda.command", "lda.tracking.modes"},
    "analysis.report": {"lda.arguments", "lda.command", "lda.files", "lda.retrieval", "analysis"},
}
ONLY_IMPORTER = {"wandb": "lda.tracking.child", "optuna": "sweeps"}
FORBIDDEN = {
    "analysis": {"torch", "torchvision", "optuna", "wandb"},
    "lda.config": {"torch", "numpy"},
    "lda.groups": {"torch", "numpy"},
    "lda.protocols": {"torch", "numpy"},
    "lda.runs": {"torch"},
    "lda.matrix": {"torch"},
    "lda": {"pandas", "matplotlib", "seaborn"},
}


def modules() -> dict[str, Path]:
    files = [path for package in ("lda", "sweeps", "analysis") for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path) -> set[str]:
    """Modules a file imports anywhere; `from package import module` counts as package.module where that is one.

    What is only imported for its type counts as well: it is an arrow for whoever reads.
    """
    known, found = set(modules()), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) | ({str(node.module)} if inner - known else set())
    return found


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("name", modules())
def test_imports_follow_the_plan(name: str) -> None:
    row = max((prefix for prefix in MAY_IMPORT if under(name, prefix)), key=len)
    if row == "lda" and name != "lda":
        pytest.fail(f"{name} has no row in MAY_IMPORT")
    if name == "lda":
        return  # the package only offers `lda.load`, imported when called
    for imported in imports(modules()[name]):
        if any(under(imported, package) for package in ("lda", "sweeps", "analysis")) and imported != "lda.errors":
            assert any(under(imported, allowed) for allowed in MAY_IMPORT[row]), f"{name} imports {imported}"
        for library, importer in ONLY_IMPORTER.items():
            assert not under(imported, library) or under(name, importer), f"{name} imports {imported}"
        for prefix, libraries in FORBIDDEN.items():
            assert not under(name, prefix) or imported.split(".")[0] not in libraries, f"{name} imports {imported}"


def test_nothing_goes_round_in_circles() -> None:
    """Imports inside functions and for types included; `lda` itself, which only offers `load`, is left out."""
    files = {name: path for name, path in modules().items() if name != "lda"}
    arrows = {name: sorted(imports(path) & files.keys() - {name}) for name, path in files.items()}
    # lda.methods looks its files up by name: base and the methods import the package only through their own place.
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if name in way:
            yield (*way[way.index(name) :], name)
            return
        if name in done:
            return
        for other in arrows[name]:
            yield from visit(other, (*way, name))
        done.add(name)

    assert [circle for name in arrows for circle in visit(name, ())] == []


OTHER_WORDS = {("lda.parts.backbones", "meta")}  # torch's device for shapes without numbers


def test_no_method_is_named_outside_its_file() -> None:
    """Everybody else asks the class, or the result: a method that is added is nowhere forgotten."""
    words = set(methods.names()) - {methods.CONTROL}  # that one is also what studies call the row of the control
    named = []
    for name, path in modules().items():
        if under(name, "lda.methods"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in words and (name, node.value) not in OTHER_WORDS:
                named.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}")
    assert named == []


@pytest.mark.parametrize(
    "module",
    [
        "sweeps.run",
        "lda.train",
        "lda.evaluate",
        "lda.embed",
        "lda.search",
        "lda.export",
        "lda.step_cost",
        "lda.weights",
        "lda.config",
        "lda.runs",
        "lda.methods",
        "lda.data",
        "analysis.tables",
        "analysis.ranked_lists",
    ],
)
def test_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
