"""Imports run downwards through the packages, and no module loads what it does not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# From the top to the foundations. A module imports from its own package and from lines below.
LAYERS = [
    {"app.__main__"},
    {"app.cli"},
    {"app.main"},
    {"app.api"},
    {"app.inference"},
    {"app.settings", "app.metrics", "app.logs", "app.tracing"},
    {"app.batching", "app.imaging", "app.engine"},
    {"app.errors"},
    {"model.training"},
    {"model.convert"},
    {"model.evaluation"},
    {"model"},
]
FORBIDDEN = {
    "app.batching": {"torch", "numpy", "PIL", "fastapi", "starlette", "openvino", "model"},
    "app.imaging": {"torch", "openvino", "fastapi", "starlette", "uvicorn"},
    "app.engine": {"PIL", "fastapi", "starlette", "uvicorn"},
    "app.inference": {"torch", "openvino", "fastapi", "starlette", "uvicorn"},
    "app.errors": {"fastapi", "starlette", "http"},
    "model": {"app", "openvino", "fastapi", "starlette", "uvicorn", "httpx", "http"},
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("app", "model")
    for path in sorted((ROOT / top).rglob("*.py"))
}


def find_layer(module: str) -> tuple[int, str]:
    """Index in LAYERS and name of the most specific package that holds a module."""
    found = [
        (level, package)
        for level, packages in enumerate(LAYERS)
        for package in packages
        if module == package or module.startswith(f"{package}.")
    ]
    assert found or module == "app", f"{module} is in no layer"
    return max(found, key=lambda layer: len(layer[1]), default=(0, "app"))


def read_imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, within functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    level, package = find_layer(module)
    for other in read_imports(MODULES[module]) & MODULES.keys():
        other_level, other_package = find_layer(other)
        assert other_level > level or other_package == package, f"{module} imports {other}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_do_not_import_what_they_must_not_know(package: str) -> None:
    for module, path in MODULES.items():
        if module == package or module.startswith(f"{package}."):
            names = read_imports(path)
            top = {name.partition(".")[0] for name in names} - (
                {module.rpartition(".")[2]} & {"torch", "openvino"}
            )
            assert not top & FORBIDDEN[package], module


@pytest.mark.parametrize("slow", ["torch", "scipy", "openvino", "opentelemetry.sdk"])
def test_serving_imports_nothing_heavy_at_import_time(slow: str) -> None:
    code = f"import sys, app.main, app.cli.serve; sys.exit({slow!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_help_imports_nothing_heavy() -> None:
    code = """
import contextlib, sys
from app.cli import main
with contextlib.suppress(SystemExit):
    main(["--help"])
heavy = {"numpy", "PIL", "torch", "openvino", "fastapi", "httpx", "pydantic"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
