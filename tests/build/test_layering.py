"""Who may include and import what: the rules that keep the parts apart, read off the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")]
PYTHON = sorted((ROOT / "fastlora").rglob("*.py"))

# The stable ABI's own headers: anything else of torch ties the binary to one torch.
STABLE = re.compile(r"torch/(csrc/stable|headeronly)/|torch/csrc/inductor/aoti_torch/c/shim\.h$")
# Folders of csrc that may see torch at all; kernels, plans and building blocks must not.
MAY_SEE_TORCH = ("bindings", "host")

# Data flows down this list: a module imports from its own line or from lines above it.
LAYERS = (
    ("_core", "_counters", "_library", "activations", "rng", "reference"),
    ("ops", "triton"),
    ("quant",),
    ("autograd",),
    ("functional",),
    ("layers",),
    ("methods",),
    ("models", "io", "optim"),
    ("training",),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Heavy packages -> files that may import them at module level, because they are themselves loaded late.
LATE = {
    "triton": ("triton/",),
    "transformers": ("models/hf.py", "cli/", "training/"),
    "peft": ("models/",),
    "matplotlib": (),
    "datasets": (),
    "rich": ("cli/", "training/"),
    "typer": ("cli/",),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def imports(path: Path):
    """(node, at module level) for every import statement of a file."""
    tree = ast.parse(path.read_text())
    inside = {
        child
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(scope, ast.If) and "TYPE_CHECKING" in ast.dump(scope.test))
        for child in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, node not in inside


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.module and not node.level else []


def test_there_are_sources_to_read():
    assert len(CSRC) > 8
    assert len(PYTHON) > 10


@pytest.mark.parametrize("path", CSRC, ids=name_of)
def test_csrc_includes(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for header in includes(path):
        if header.startswith(("ATen/", "c10/", "caffe2/", "torch/")):
            assert folder in MAY_SEE_TORCH, f"{header}: only {MAY_SEE_TORCH} may include torch"
            assert STABLE.match(header), f"{header} is not a header of the stable ABI"
        if header.startswith(("pybind11/", "Python.h")):
            assert path.name == "module.cpp", f"{header}: the op library has no Python in it"
        if (ROOT / "csrc" / header).exists() and folder in ("common", "plan"):
            assert not any("torch/" in deeper for deeper in includes(ROOT / "csrc" / header))
    for other in path.parent.glob("*.h*"):
        assert other.name not in includes(path), f"include {other.name} by its path from csrc/"


@pytest.mark.parametrize("path", CSRC, ids=name_of)
def test_csrc_never_ends_the_process(path):
    assert not re.search(r"\b(exit|_Exit|abort|quick_exit)\s*\(", path.read_text())


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_imports_inside_the_package_are_relative(path):
    for node, _ in imports(path):
        assert not [name for name in imported_names(node) if name.split(".")[0] == "fastlora"]


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_heavy_packages_are_imported_late(path):
    inside = str(path.relative_to(ROOT / "fastlora"))
    for node, at_module_level in imports(path):
        for name in imported_names(node):
            allowed = LATE.get(name.split(".")[0])
            if at_module_level and allowed is not None:
                assert inside.startswith(allowed), (
                    f"line {node.lineno}: import {name} where it is used"
                )


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_arrow_points_back(path):
    parts = path.relative_to(ROOT / "fastlora").with_suffix("").parts
    level = LEVEL.get(parts[0])
    if level is None:  # __init__ re-exports, testing stands beside
        return
    for node, _ in imports(path):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = parts[: len(parts) - node.level]
        targets = (
            [(*base, *node.module.split("."))]
            if node.module
            else [(*base, a.name) for a in node.names]
        )
        for target in targets:
            assert LEVEL.get(target[0], level) <= level, (
                f"line {node.lineno}: {parts[0]} imports {target[0]}"
            )


@pytest.mark.parametrize("path", [*CSRC, *PYTHON], ids=name_of)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 500
