"""Which engine a model gets: the settings, resolved against what this machine has.

There is never a silent fall-back: what was asked for and cannot be had stops the start with one
line, and what `auto` chose is said in the log, in `/models` and in `X-Engine`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
from pathlib import Path

from app.engine.base import Engine
from app.errors import EngineUnavailable
from model.checkpoint import SUFFIX, Checkpoint

CUDA_BATCH = 8
"""Windows at once on a CUDA device: enough to fill it at 512×512, little enough to stay quick."""


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """The resolved settings of one device.

    Attributes:
        backend: "openvino" or "torch".
        device: "cpu" or "cuda:N".
        precision: of the arithmetic; "auto" until a model is known, see `resolve`.
        threads: CPU threads of the engine.
        max_batch: windows at once.
        reason: why, in words.
    """

    backend: str
    device: str
    precision: str
    threads: int
    max_batch: int
    reason: str


def choose_engines(
    *,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    max_batch: int | None = None,
) -> list[EngineChoice]:
    """One choice a device, from settings of which each may be "auto".

    Raises:
        EngineUnavailable: what is asked for cannot be had.
    """
    cuda = _cuda_devices() if device != "cpu" and engine != "openvino" else 0
    reason = []
    if device == "auto":
        device = "cuda:0" if cuda else "cpu"
        reason.append(f"device {device}: {'a CUDA device is there' if cuda else 'no CUDA device'}")
    names = [f"{name}:0" if name == "cuda" else name for name in device.split(",")]
    if names != ["cpu"]:
        if engine == "openvino":
            raise EngineUnavailable("engine", engine, f" runs on the CPU only, not on {device}")
        for name in names:
            number = int(name.removeprefix("cuda:"))
            if number >= cuda:
                raise EngineUnavailable(
                    "device", device, f": there is no {name}; torch sees {cuda} CUDA devices"
                )
    on_cpu = names == ["cpu"]
    if engine == "auto":
        engine = "openvino" if on_cpu and _installed("openvino") else "torch"
        reason.append(f"engine {engine}: " + ("the fastest on a CPU" if on_cpu else "for CUDA"))
    if not _installed(engine):
        raise EngineUnavailable("engine", engine, f" is not installed here: pip install {engine}")
    allowed = _precisions(engine, on_cpu)
    if precision == "auto" and engine != "openvino":
        precision = allowed[0]
        reason.append(f"precision {precision}")
    if precision not in (*allowed, "auto"):
        raise EngineUnavailable(
            "precision",
            precision,
            f" is not to be had with {engine} on {names[0]}; there is {' and '.join(allowed)}",
        )
    # On a CPU one window fills every core: a batch gains nothing and delays its first window.
    batch = max_batch or (1 if on_cpu else CUDA_BATCH)
    return [
        EngineChoice(
            engine, name, precision, threads or cpu_quota(), batch, "; ".join(reason) or "as set"
        )
        for name in names
    ]


def resolve(choice: EngineChoice, checkpoint: Checkpoint) -> EngineChoice:
    """The choice for one model: int8 is the default only for those it was proven on.

    Raises:
        EngineUnavailable: int8 was asked for, and this model was not calibrated.
    """
    calibration = checkpoint.calibration
    if choice.precision == "int8" and calibration is None:
        raise EngineUnavailable(
            "precision",
            "int8",
            f": {checkpoint.name} has no calibration; make one with: unet export "
            f"{checkpoint.name}{SUFFIX} --calibrate RECIPE",
        )
    if choice.precision != "auto":
        return choice
    precision = "int8" if calibration and calibration.validated else "fp32"
    why = "this model has no calibration for int8" if calibration is None else str(calibration)
    return dataclasses.replace(
        choice, precision=precision, reason=f"{choice.reason}; precision {precision}: {why}"
    )


def build_engine(choice: EngineChoice, checkpoint: Checkpoint) -> Engine:
    """The engine of one model on one device, not yet warm.

    Raises:
        EngineUnavailable: this model cannot be had in that precision.
    """
    choice = resolve(choice, checkpoint)
    if choice.backend == "openvino":
        from app.engine.openvino import OpenVinoEngine

        return OpenVinoEngine(
            checkpoint,
            threads=choice.threads,
            max_batch=choice.max_batch,
            precision=choice.precision,
        )
    import torch

    from app.engine.torch import TorchEngine

    if choice.device == "cpu":
        torch.set_num_threads(choice.threads)
    return TorchEngine(
        checkpoint,
        device=choice.device,
        precision=choice.precision,
        max_batch=choice.max_batch,
    )


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole CPUs this process may use: the container's quota, its affinity, or the host's cores."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        if (cgroup / "cpu.max").exists():  # cgroup v2: "max 100000" or "150000 100000"
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        if quota != "max" and int(quota) > 0:
            return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def _precisions(engine: str, on_cpu: bool) -> tuple[str, ...]:
    """The default first."""
    if engine == "torch":
        return ("fp32",) if on_cpu else ("bf16", "fp16", "fp32")
    return ("fp32", "int8", "bf16") if _bf16_on_cpu() else ("fp32", "int8")


def _bf16_on_cpu() -> bool:
    from app.engine.openvino import has_bf16

    return has_bf16()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _cuda_devices() -> int:
    """How many there are. The driver is asked first: importing torch takes over a second."""
    try:
        driver = ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return 0
    if driver.cuInit(0) != 0 or not _installed("torch"):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
