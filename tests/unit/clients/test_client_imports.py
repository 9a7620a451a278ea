"""Modules that unet_client imports, and what works without numpy and Pillow."""

from __future__ import annotations

import subprocess
import sys

import pytest

import unet_client

HIDE = """
import sys
sys.modules["PIL"] = sys.modules["PIL.PngImagePlugin"] = None
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_arrays_nor_the_service() -> None:
    modules = run("import sys, unet_client; print(*sys.modules)").split()
    roots = {name.partition(".")[0] for name in modules}
    assert "unet_client" in roots
    assert not roots & {
        "numpy",
        "PIL",
        "app",
        "model",
        "fastapi",
        "torch",
        "openvino",
        "opentelemetry",
    }


def test_bytes_are_encoded_without_numpy() -> None:
    code = "import sys, unet_client as u; print(u.encode_image(b'image'), 'numpy' in sys.modules)"
    assert run(code) == "b'image' False\n"


@pytest.mark.parametrize(
    "call",
    [
        "import numpy; unet_client.encode_image(numpy.zeros((4, 4), 'u1'))",
        "unet_client.SegmentationResult(b'', httpx.Headers(), {'mask': b''}).image()",
    ],
)
def test_array_without_pillow_is_a_clear_error(call: str) -> None:
    code = f"""{HIDE}
import httpx, unet_client
try:
    {call}
except ImportError as error:
    print(error)
"""
    assert run(code) == "arrays require numpy and Pillow: pip install numpy pillow\n"


def test_public_names_are_importable() -> None:
    for name in unet_client.__all__:
        assert hasattr(unet_client, name)
