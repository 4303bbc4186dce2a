"""Data flows one way: who may import whom. The table is the house's plan; a new import is a decision."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# module (or package) -> first-party prefixes it may import, besides lda.errors. The longest matching row counts.
MAY_IMPORT = {
    "lda": set(),
    "lda.errors": set(),
    "lda.protocols": set(),
    "lda.config": set(),
    "lda.normalisation": set(),
    "lda.losses": set(),
    "lda.ranking": set(),
    "lda.data": {"lda.protocols", "lda.command", "lda.data"},
    "lda.networks": {"lda.normalisation"},
    "lda.method": {"lda.normalisation", "lda.losses", "lda.networks", "lda.config"},
    "lda.settings": set(),
    "lda.batch": set(),
    "lda.command": set(),
    "lda.files": set(),
    "lda.runs": {"lda.config", "lda.files"},
    "lda.tracking": {"lda.config"},
    "lda.device": {"lda.config"},
    "lda.bank_files": {"lda.normalisation", "lda.files"},
    "lda.checkpoint": {"lda.config", "lda.method", "lda.files"},
    "lda.evaluate": {"lda"},
    "lda.trainer": {"lda"},
    "lda.train": {"lda"},
    "sweeps": {"lda", "sweeps"},
    "analysis": {"lda.command", "lda.files", "lda.protocols", "lda.runs", "analysis"},
}
ONLY_IMPORTER = {"wandb": "lda.tracking", "optuna": "sweeps"}
FORBIDDEN = {
    "analysis": {"torch", "torchvision", "optuna", "wandb"},
    "lda.config": {"torch", "numpy"},
    "lda.protocols": {"torch", "numpy"},
    "lda": {"pandas", "matplotlib", "seaborn"},
}


def modules() -> dict[str, Path]:
    files = [path for package in ("lda", "sweeps", "analysis") for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path) -> set[str]:
    """Modules a file imports anywhere; `from package import module` counts as package.module where that is one."""
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


@pytest.mark.parametrize("module", ["sweeps.run", "lda.train", "lda.config", "lda.runs"])
def test_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
