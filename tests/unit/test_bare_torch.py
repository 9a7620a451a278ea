"""The code for a borrowed GPU imports no package that an image with torch lacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

HTTP = ["fastapi", "starlette", "uvicorn", "httpx", "openvino", "prometheus_client"]
OTHERS = ["pydantic_settings", "zlib_ng", "imagecodecs", "tifffile", "contourpy", "tensorboard",
          "matplotlib", "skimage"]  # fmt: skip
SCRIPT = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split(","):
            raise ModuleNotFoundError(f"no module named {name}", name=name)

sys.meta_path.insert(0, Missing())
importlib.import_module(sys.argv[1])
"""


def import_without(module: str, missing: list[str]) -> str:
    """Import a module in a process that lacks some packages, and return the error."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, module, ",".join(missing)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stderr


@pytest.mark.parametrize(
    "module",
    ["app.engine.torch", "app.engine.device_engines", "app.batching.batcher", "model.predict",
     "benchmarks.cuda_probe", "benchmarks.gpu_engine", "tests.gpu.test_torch_engine"],
)  # fmt: skip
def test_engine_is_imported_without_packages_for_serving(module: str) -> None:
    assert not import_without(module, [*HTTP, *OTHERS, "scipy", "tqdm"])


@pytest.mark.parametrize(
    "module", ["model.training.loop", "benchmarks.gpu_training", "tests.gpu.test_training"]
)
def test_training_is_imported_without_packages_for_serving(module: str) -> None:
    assert not import_without(module, [*HTTP, *OTHERS])


def test_proof_itself_needs_the_standard_library_alone() -> None:
    missing = [*HTTP, *OTHERS, "torch", "numpy", "scipy", "tqdm", "pydantic", "safetensors", "PIL"]
    assert not import_without("benchmarks.gpu_proof", missing)
    assert "no module named torch" in import_without("model.training.loop", missing)
