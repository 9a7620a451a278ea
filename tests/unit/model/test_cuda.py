"""Which CUDA devices torch can use, and what is said about those it cannot. No device is needed."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from model import cuda
from model.cuda import CudaDevice, CudaDevices, choose_device, find_cuda_devices, has_kernels
from model.errors import ConfigError


class Driver:
    """A libcuda whose `cuInit` returns a status."""

    def __init__(self, status: int, text: str = "") -> None:
        self._status = status
        self._text = text.encode()

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._status

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = self._text
        return 0


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The device files of the machine; a test may add some."""
    nodes: list[Path] = []
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(nodes))
    return nodes


def set_driver(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)


def set_torch(
    monkeypatch: pytest.MonkeyPatch,
    *capabilities: tuple[int, int],
    error: Exception | None = None,
    kernels: tuple[str, ...] = ("sm_80", "sm_90"),
) -> None:
    """Let torch see cards of these compute capabilities, or fail."""

    def init() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "init": init,
        "device_count": lambda: len(capabilities),
        "get_device_name": lambda index: f"Card {index}",
        "get_device_capability": lambda index: capabilities[index],
        "get_arch_list": lambda: list(kernels),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_machine_without_a_driver_is_no_surprise(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Path]
) -> None:
    set_driver(monkeypatch, None)
    found = find_cuda_devices()
    assert found.problem == "no CUDA device: the NVIDIA driver (libcuda) is not installed"
    assert not found.expected
    nodes.append(Path("/dev/nvidia0"))  # a container without the driver's libraries
    assert find_cuda_devices().expected


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [(100, "no CUDA-capable device is detected", False), (803, "system has an old driver", True)],
)
def test_error_of_the_driver_is_reported(
    status: int, text: str, expected: bool, monkeypatch: pytest.MonkeyPatch, nodes: list[Path]
) -> None:
    set_driver(monkeypatch, Driver(status, text))
    found = find_cuda_devices()
    assert found.problem == f"no CUDA device: the driver says: {text} (error {status})"
    assert found.expected is expected


def test_device_without_permission_is_named(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Path], tmp_path: Path
) -> None:
    nodes.append(tmp_path / "nvidia0")
    monkeypatch.setattr(cuda.os, "access", lambda path, mode: False)
    set_driver(monkeypatch, Driver(100, "no device"))
    found = find_cuda_devices()
    assert str(found.problem).endswith(f"no permission for {tmp_path}/nvidia0")
    assert found.expected


def test_driver_that_is_too_old_for_torch_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Path]
) -> None:
    text = "The NVIDIA driver on your system is too old (found version 11040)."
    set_driver(monkeypatch, Driver(0))
    set_torch(monkeypatch, error=RuntimeError(f"{text}\nPlease update it."))
    assert find_cuda_devices().problem == f"no CUDA device: torch says: {text}"


def test_torch_without_cuda_is_reported(monkeypatch: pytest.MonkeyPatch, nodes: list[Path]) -> None:
    set_driver(monkeypatch, Driver(0))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(find_cuda_devices().problem)


def test_devices_have_names_and_capabilities(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Path]
) -> None:
    set_driver(monkeypatch, Driver(0))
    set_torch(monkeypatch, (9, 0), (3, 7))
    found = find_cuda_devices()
    assert found.problem is None
    assert str(found.devices[0]) == "Card 0, compute capability 9.0"
    assert found.find_problem("cuda:0") is None
    assert found.find_problem("cuda:1") == (
        "cuda:1 (Card 1, compute capability 3.7) cannot be used: this torch "
        f"({torch.__version__}) has kernels for sm_80 sm_90 only"
    )
    assert found.find_problem("cuda:7") == "cuda:7 not found; torch sees 2 CUDA devices"


@pytest.mark.parametrize(
    ("capability", "kernels", "expected"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 6), ["sm_80"], True),  # a newer minor version
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),  # another major version
        ((9, 0), ["sm_80", "compute_80"], True),  # intermediate code
        ((12, 1), ["sm_120"], True),
        ((10, 3), ["sm_100a"], False),  # for one architecture
        ((10, 3), ["sm_100f"], True),  # for a family
        ((3, 7), ["sm_75", "sm_80", "compute_80"], False),
    ],
)
def test_kernels_run_on_compatible_devices(
    capability: tuple[int, int], kernels: list[str], expected: bool
) -> None:
    assert has_kernels(capability, kernels) is expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:7", "device 'cuda:7' is not available: cuda:7 not found; torch sees 2 CUDA devices"),
        ("cuda:1", "device 'cuda:1' is not available: too old"),
    ],
)
def test_training_on_a_device_that_torch_cannot_use_is_one_line(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = (CudaDevice("new", (9, 0)), CudaDevice("old", (3, 7), "too old"))
    monkeypatch.setattr(cuda, "find_cuda_devices", lambda: CudaDevices(devices))
    with pytest.raises(ConfigError) as caught:
        choose_device(name)
    assert str(caught.value) == message
    assert choose_device("auto") == choose_device("cuda") == "cuda:0"
    assert choose_device("cpu") == "cpu"


def test_training_on_auto_says_why_it_leaves_a_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "find_cuda_devices", lambda: CudaDevices(problem="driver too old"))
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto") == "cpu"
    assert caplog.messages == ["device cpu: driver too old"]
