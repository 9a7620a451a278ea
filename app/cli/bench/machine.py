"""Describe the machine and the software, so that figures can be compared."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from app.engine.selection import cpu_quota
from model.checkpoint import git_revision

_ISA = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Instruction sets for matrix products, as /proc/cpuinfo names them."""
_LIBRARIES = ("openvino", "torch", "numpy", "pillow", "fastapi", "uvicorn")


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Describe CPU, memory, system, versions and revision; and the GPU, if `device` is one."""
    cpu = _read_file("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)", cpu, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", cpu, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read_file("/proc/meminfo"), re.MULTILINE)
    versions = {name: _version(name) for name in _LIBRARIES}
    machine: dict[str, Any] = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": cpu_quota(),
        "cores_of_host": os.cpu_count(),
        "isa": [name for name in _ISA if name in has],
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "revision": git_revision(),
    }
    if device != "cpu":
        import torch

        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return machine


def machine_summary(machine: dict[str, Any]) -> str:
    """Summarise a machine in one line."""
    parts = [machine["cpu"], f"{machine['cores']} cores", *machine["isa"][-3:]]
    if "gpu" in machine:
        parts.insert(0, machine["gpu"]["name"])
    return ", ".join(parts)


def _read_file(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
