"""The house, as its imports draw it: downwards only, and the rooms that must not know things."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# From the top of the house to its foundations; a module imports from its own floor or below.
FLOORS = [
    ["app.cli"],
    ["app.export", "app.server", "app.local", "app.catalogue", "app.bench"],
    ["app.evaluation"],
    ["app.main", "app.connection"],
    ["app.routers", "app.middleware"],
    ["app.handlers", "app.schemas", "app.uploads", "app.inference"],
    ["app.service"],
    ["app.segmenter"],
    ["app.registry", "app.outputs"],
    ["app.engine", "app.images", "app.metrics", "app.settings", "app.logs"],
    ["app.tensors"],
    ["app.budget", "app.formats", "app.tiff", "app.sources"],
    ["app.batching"],
    ["app.estimates"],
    ["app.lanes", "app.fairqueue"],
    ["app.threads"],
    ["app.errors"],
    ["model.train", "model.foreign", "model.export"],
    ["model.trainer"],
    ["model.run", "model.evaluate", "model.crops"],
    [
        "model.data",
        "model.predict",
        "model.widen",
        "model.augment",
        "model.losses",
        "model.pictures",
    ],
    ["model.recipe"],
    ["model.checkpoint", "model.metrics", "model.boundary"],
    ["model.instances", "model.polygons"],
    ["model.batchnorm", "model.by_window"],
    ["model.transforms", "model.windows", "model.unet", "model.flops", "model.pixels"],
    ["model.config"],
]


def floor(module: str) -> int:
    for level, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    raise AssertionError(f"{module} has no floor; put it on one in {Path(__file__).name}")


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, within functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            base = node.module or ""
            found |= {
                f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base
                for alias in node.names
            }
    return found


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for room in ("app", "model")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.name != "__init__.py"
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    for other in imports(MODULES[module]):
        if other.partition(".")[0] in ("app", "model") and other in MODULES:
            same_room = module.rpartition(".")[0] == other.rpartition(".")[0]
            assert floor(other) > floor(module) or (same_room and floor(other) == floor(module)), (
                f"{module} imports {other}, which is above it"
            )


FOREIGN = {
    "app.batching": {"torch", "numpy", "PIL", "fastapi", "starlette", "openvino", "model"},
    "app.lanes": {"torch", "numpy", "PIL", "fastapi", "starlette", "openvino", "model"},
    "app.estimates": {"asyncio", "torch", "numpy"},
    "app.fairqueue": {"asyncio", "torch", "numpy"},
    "app.errors": {"fastapi", "starlette", "http"},
    "app.segmenter": {"fastapi", "starlette", "torch", "openvino"},
    "app.outputs": {"fastapi", "starlette", "http", "asyncio", "torch", "openvino"},
    "app.formats": {"fastapi", "starlette", "PIL", "numpy", "model"},
    # of the model, what makes arrays of images: training must see what the service sees
    "app.images": {"fastapi", "starlette", "torch"}
    | {name for name in MODULES if name.startswith("model.") and name != "model.pixels"},
    "app.sources": {"fastapi", "starlette", "http", "PIL", "numpy", "torch"},
    "app.tensors": {"fastapi", "starlette", "http", "PIL", "torch", "model"},
    "app.inference": {"fastapi", "starlette", "http", "PIL", "torch"},
    "app.engine.base": {"torch", "openvino", "fastapi"},
    "app.engine.openvino": {"torch", "fastapi"},
    "app.engine.torch": {"openvino", "fastapi"},
    "app.engine.quantise": {"openvino", "torch", "fastapi"},
    "model.by_window": {"app", "torch", "openvino"},
    "model.pixels": {"app", "torch", "model", "pathlib"},
    "model.unet": {"app", "numpy"},
}


@pytest.mark.parametrize("module", FOREIGN)
def test_rooms_know_nothing_of_what_is_not_theirs(module: str) -> None:
    names = imports(MODULES[module])
    known = names | {name.partition(".")[0] for name in names}
    assert not known & FOREIGN[module]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("model.")])
def test_the_model_knows_no_service(module: str) -> None:
    known = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not known & {"app", "fastapi", "starlette", "uvicorn", "httpx", "http"}


@pytest.mark.parametrize("slow", ["torch", "scipy"])
def test_a_start_on_a_cpu_imports_nothing_slow(slow: str) -> None:
    import subprocess

    code = (
        "import sys, app.server, app.main, app.service, app.engine.openvino;"
        f"sys.exit({slow!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_heart_of_the_product_fits_on_its_pages() -> None:
    assert len((ROOT / "app/batching.py").read_text().splitlines()) < 350
