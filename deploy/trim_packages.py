"""Removes from an image's packages what the service never loads: about 130 MB.

    python trim_packages.py SITE_PACKAGES

A pattern that matches nothing is an error, so that a new version of a package that names its files
otherwise does not silently make the image larger. Knows nothing of the service's code.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

PATTERNS = (
    # OpenVINO: devices other than the CPU, and readers of formats other than its own and ONNX
    "openvino/libs/libopenvino_intel_gpu_plugin.so",
    "openvino/libs/libopenvino_intel_npu_plugin.so",
    "openvino/libs/cache.json",
    "openvino/libs/libopenvino_tensorflow_frontend.so.*",
    "openvino/libs/libopenvino_tensorflow_lite_frontend.so.*",
    "openvino/libs/libopenvino_pytorch_frontend.so.*",
    "openvino/libs/libopenvino_paddle_frontend.so.*",
    "openvino/libs/libopenvino_jax_frontend.so.*",
    "openvino/libs/libopenvino_gguf_frontend.so.*",
    "openvino/include",
    # test suites, with their data
    "numpy/**/tests",
    "scipy/**/tests",
)


def trim_packages(folder: Path, patterns: Sequence[str] = PATTERNS) -> int:
    """Remove the files and folders that match the patterns; returns how many bytes that were.

    Raises:
        FileNotFoundError: a pattern matches nothing.
    """
    removed = 0
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{folder}: nothing matches {pattern}")
        for path in found:
            if path.is_dir():
                removed += sum(each.lstat().st_size for each in path.rglob("*") if each.is_file())
                shutil.rmtree(path)
            elif path.exists():  # not in a folder that was removed
                removed += path.stat().st_size
                path.unlink()
    return removed


def main(arguments: Sequence[str]) -> int:
    """Trim the packages of the folder that is named, and say by how much."""
    (folder,) = map(Path, arguments)
    print(f"{trim_packages(folder) / 1e6:.0f} MB removed from {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
