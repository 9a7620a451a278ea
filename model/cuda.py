"""The CUDA devices that torch can use, and why it cannot use others.

Imports torch only when asked, and only where a driver is installed: that takes over a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from model.errors import ConfigError, first_line

log = logging.getLogger(__name__)

BF16_FROM, FP16_FROM = (8, 0), (7, 0)
"""Compute capabilities from which tensor cores multiply bf16 and fp16."""
_NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE of the driver's API."""


@dataclasses.dataclass(frozen=True)
class CudaDevice:
    """One device as torch numbers them.

    Attributes:
        name: of the card.
        capability: its compute capability, (major, minor).
        problem: why torch cannot use it; None if it can.
    """

    name: str
    capability: tuple[int, int]
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"


@dataclasses.dataclass(frozen=True)
class CudaDevices:
    """The result of a search for devices.

    Attributes:
        devices: in torch's order.
        problem: why there are none; None if there are.
        expected: there is hardware or a driver, so that having no device is worth a warning.
    """

    devices: tuple[CudaDevice, ...] = ()
    problem: str | None = None
    expected: bool = True

    def find_problem(self, name: str) -> str | None:
        """Say in one line why torch cannot use "cuda:N"; None if it can."""
        if self.problem is not None:
            return self.problem
        index = int(name.removeprefix("cuda:"))
        if index >= len(self.devices):
            plural = "" if len(self.devices) == 1 else "s"
            return f"{name} not found; torch sees {len(self.devices)} CUDA device{plural}"
        return self.devices[index].problem


def find_cuda_devices() -> CudaDevices:
    """Look for CUDA devices. Asks the driver first, then torch."""
    nodes = sorted(Path("/dev").glob("nvidia[0-9]*"))
    try:
        driver = ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        problem = "no CUDA device: the NVIDIA driver (libcuda) is not installed"
        return CudaDevices(problem=problem, expected=bool(nodes))
    status = driver.cuInit(0)
    if status != 0:
        denied = [str(path) for path in nodes if not os.access(path, os.R_OK | os.W_OK)]
        problem = f"no CUDA device: the driver says: {_describe(driver, status)}"
        if denied:
            problem += f"; no permission for {', '.join(denied)}"
        return CudaDevices(problem=problem, expected=status != _NO_DEVICE or bool(nodes))
    if importlib.util.find_spec("torch") is None:
        return CudaDevices(problem="torch is not installed: pip install torch")
    return _ask_torch()


def _describe(driver: ctypes.CDLL, status: int) -> str:
    """The driver's text for an error."""
    text = ctypes.c_char_p()
    with contextlib.suppress(AttributeError):  # a very old driver
        driver.cuGetErrorString(status, ctypes.byref(text))
    return f"{text.value.decode() if text.value else 'unknown error'} (error {status})"


def _ask_torch() -> CudaDevices:
    import torch

    if torch.version.cuda is None:
        return CudaDevices(problem="this torch was built without CUDA: pip install torch")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        kernels = torch.cuda.get_arch_list()
        devices = []
        for index in range(torch.cuda.device_count()):
            name, capability = (
                torch.cuda.get_device_name(index),
                torch.cuda.get_device_capability(index),
            )
            device = CudaDevice(name, capability)
            if not has_kernels(capability, kernels):
                problem = (
                    f"cuda:{index} ({device}) cannot be used: this torch "
                    f"({torch.__version__}) has kernels for {' '.join(kernels)} only"
                )
                device = dataclasses.replace(device, problem=problem)
            devices.append(device)
    except (RuntimeError, AssertionError) as error:  # among others: the driver is too old
        return CudaDevices(problem=f"no CUDA device: torch says: {first_line(error)}")
    if not devices:
        return CudaDevices(problem="no CUDA device: CUDA_VISIBLE_DEVICES hides every device")
    return CudaDevices(tuple(devices))


def has_kernels(capability: tuple[int, int], kernels: Sequence[str]) -> bool:
    """Whether a torch with these kernels ("sm_80", "compute_90") runs on a device.

    Compiled kernels run on devices of the same major version and of an equal or higher minor one;
    intermediate code is compiled for every newer device (CUDA programming guide, section on
    application compatibility).
    """
    for kernel in kernels:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", kernel)
        if match is None:
            continue
        version = int(match[2]), int(match[3])
        if match[4] == "a":  # for this architecture alone
            compatible = version == capability
        else:
            is_binary = match[1] == "sm" or match[4] == "f"
            compatible = version <= capability and (not is_binary or version[0] == capability[0])
        if compatible:
            return True
    return False


def choose_device(name: str) -> str:
    """Choose the device that a recipe asks for.

    Args:
        name: auto, cpu, cuda or cuda:N.

    Returns:
        "cpu" or "cuda:N".

    Raises:
        ConfigError: torch cannot use it; the message is one line.
    """
    if name == "cpu":
        return name
    chosen = name if name.startswith("cuda:") else "cuda:0"
    found = find_cuda_devices()
    problem = found.find_problem(chosen)
    if problem is None:
        return chosen
    if name != "auto":
        raise ConfigError(f"device {name!r} is not available: {problem}")
    if found.expected:
        log.warning("device cpu: %s", problem)
    return "cpu"
