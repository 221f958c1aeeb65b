"""Imports point one way: diffveil_export -> diffveil -> diffveil_kernels -> nothing of ours."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "runtime/diffveil": {"diffveil", "diffveil_kernels"},
    "export/diffveil_export": {"diffveil", "diffveil_export", "diffveil_kernels"},
    "kernels/diffveil_kernels": {"diffveil_kernels"},
}
OURS = set().union(*ALLOWED.values())
SOURCE_ROOTS = {"runtime", "export", "kernels"}
FRAMEWORKS = {"torch", "diffusers", "transformers", "onnx", "onnxscript"}
# Loaded when the runtime is imported; everything else of third parties is imported in functions.
EARLY = {"numpy", "PIL", "safetensors"}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Top-level names that a module's import statements load, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], node.lineno


def at_import_time(tree: ast.Module) -> ast.Module:
    """The statements that run when a module is imported: no function bodies, no typing blocks."""

    class Pruned(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            typing_only = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if typing_only else self.generic_visit(node)

    return ast.fix_missing_locations(Pruned().visit(tree))


def modules(package: str) -> list[tuple[Path, ast.Module]]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} is empty"
    return [(file, ast.parse(file.read_text(encoding="utf-8"), str(file))) for file in files]


RUNTIME = modules("runtime/diffveil")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file, tree in modules(package)
        for name, line in imports(tree)
        if name in (OURS - ALLOWED[package]) | SOURCE_ROOTS
    ]
    assert not wrong, "\n".join(wrong)


def test_runtime_never_imports_a_framework() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file, tree in modules("runtime/diffveil")
        for name, line in imports(tree)
        if name in FRAMEWORKS
    ]
    assert not wrong, "\n".join(wrong)


def test_runtime_imports_heavy_packages_late() -> None:
    allowed = EARLY | OURS | set(sys.stdlib_module_names)
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name} when it is imported"
        for file, tree in modules("runtime/diffveil")
        for name, line in imports(at_import_time(tree))
        if name not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ALLOWED)
def test_source_roots_hold_one_package_only(package: str) -> None:
    root = (ROOT / package).parent
    entries = {entry.name for entry in root.iterdir()} - {"__pycache__"}
    assert {name for name in entries if not name.endswith(".egg-info")} == {Path(package).name}


@pytest.mark.parametrize("package", ALLOWED)
def test_source_roots_are_no_modules_from_elsewhere(package: str, tmp_path: Path) -> None:
    # A stranger may own the top-level name ("kernels" is published); ours must not be below it.
    root, _, name = package.partition("/")
    code = f"import {root}.{name}"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "ModuleNotFoundError" in found.stderr


def ladder() -> dict[str, int]:
    """Rung of each runtime module, 0 at the top, as the architecture document states it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## The ladder of the runtime")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")]
    rungs = enumerate(re.findall(r"`(\w+)`", row) for row in rows[2:])
    return {module: rung for rung, modules in rungs for module in modules}


def test_the_ladder_has_every_module_and_no_import_upwards() -> None:
    rungs = ladder()
    package = ROOT / "runtime" / "diffveil"
    parts = {file.relative_to(package).parts[0].removesuffix(".py") for file, _ in RUNTIME}
    assert parts - {"__init__", "__main__"} == set(rungs)
    wrong = []
    for file, tree in RUNTIME:
        own = file.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.module or own not in rungs:
                continue
            target = node.module.split(".")[1:2]
            if node.module.startswith("diffveil.") and rungs[target[0]] < rungs[own]:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} imports {node.module}")
    assert not wrong, "\n".join(wrong)
