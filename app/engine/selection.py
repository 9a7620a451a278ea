"""Select the engine of a model: resolve settings of "auto" for this machine.

Nothing falls back silently. A setting that this machine cannot fulfil aborts the start with one
line. What "auto" chose is in the log, in `/models` and in `X-Engine`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from app.engine.base import Engine
from app.engine.cpus import count_cpus
from app.errors import EngineUnavailable
from model.checkpoint import SUFFIX, Checkpoint
from model.config import GraphConfig
from model.cuda import BF16_FROM, FP16_FROM, CudaDevice, CudaDevices, find_cuda_devices

log = logging.getLogger(__name__)

CUDA_BATCH = 8
"""Default batch size on a CUDA device: it fills the device at 512×512, and stays fast."""


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """The resolved settings of one device.

    Attributes:
        backend: "openvino", "torch", or "onnxruntime" for an ONNX graph on CUDA, see `resolve`.
        device: "cpu" or "cuda:N".
        precision: numeric precision; "auto" until the model is known, see `resolve`.
        threads: CPU threads of the engine.
        max_batch: most windows in a batch.
        reason: why these were chosen, as `/models` shows it.
        is_precision_set: whether the user set the precision.
    """

    backend: str
    device: str
    precision: str
    threads: int
    max_batch: int
    reason: str
    is_precision_set: bool = False


def choose_engines(
    *,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    max_batch: int | None = None,
) -> list[EngineChoice]:
    """Resolve settings, each of which may be "auto", to one choice per device.

    Raises:
        EngineUnavailable: this machine or installation cannot fulfil a setting.
    """
    reason = []
    cuda = CudaDevices()
    if device != "cpu" and engine != "openvino":
        cuda = find_cuda_devices()
    if device == "auto":
        device, why = _choose_device(engine, cuda)
        reason.append(f"device {device}: {why}")
    names = [f"{name}:0" if name == "cuda" else name for name in device.split(",")]
    on_cpu = names == ["cpu"]
    if not on_cpu:
        _check_cuda(device, engine, names, cuda)
    if engine == "auto":
        engine = "openvino" if on_cpu and is_installed("openvino") else "torch"
        reason.append(f"engine {engine}: " + ("the fastest on a CPU" if on_cpu else "for CUDA"))
    if not is_installed(engine):
        raise EngineUnavailable("engine", engine, f" is not installed: pip install {engine}")
    used = [] if on_cpu else [cuda.devices[int(name.removeprefix("cuda:"))] for name in names]
    supported = _precisions(engine, used)
    is_precision_set = precision != "auto"
    if precision == "auto" and engine != "openvino":
        precision = supported[0]
        slowest = min(used, key=lambda each: each.capability, default=None)
        reason.append(f"precision {precision}" + (f": {slowest}" if slowest else ""))
    if precision not in (*supported, "auto"):
        raise EngineUnavailable(
            "precision",
            precision,
            f" is not supported by {engine} on {names[0]}; supported: {', '.join(supported)}",
        )
    # On a CPU one window uses every core: a batch gains nothing and delays its first window.
    batch = max_batch or (1 if on_cpu else CUDA_BATCH)
    return [
        EngineChoice(
            engine,
            name,
            precision,
            threads or cpu_quota(),
            batch,
            "; ".join(reason) or "as set",
            is_precision_set,
        )
        for name in names
    ]


def _choose_device(engine: str, cuda: CudaDevices) -> tuple[str, str]:
    """Choose the device for "auto", and say why. A device that should work is not left silently."""
    if engine == "openvino":
        return "cpu", "openvino runs on the CPU only"
    problem = cuda.find_problem("cuda:0")
    if problem is None:
        return "cuda:0", "a CUDA device is present"
    if cuda.expected:
        log.warning("device cpu: %s", problem)
    return "cpu", problem


def _check_cuda(device: str, engine: str, names: list[str], cuda: CudaDevices) -> None:
    """Check that torch can use the named CUDA devices, and that the engine can.

    Raises:
        EngineUnavailable: one cannot be used, or the engine is OpenVINO.
    """
    if engine == "openvino":
        raise EngineUnavailable("engine", engine, f" runs on the CPU only, not on {device}")
    for name in names:
        problem = cuda.find_problem(name)
        if problem is not None:
            raise EngineUnavailable("device", device, f": {problem}")


def resolve(choice: EngineChoice, checkpoint: Checkpoint) -> EngineChoice:
    """Resolve the precision for one model, and the backend of an ONNX graph.

    int8 is the default only where it was validated.

    Raises:
        EngineUnavailable: int8 is set, and the model has no calibration; or the model is an ONNX
            graph, which the chosen engine or precision cannot run.
    """
    if isinstance(checkpoint.architecture, GraphConfig):
        choice = _choose_graph_backend(choice, checkpoint.name)
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


def _choose_graph_backend(choice: EngineChoice, name: str) -> EngineChoice:
    """Choose what runs an ONNX graph: OpenVINO on a CPU, ONNX Runtime in fp32 on CUDA.

    Raises:
        EngineUnavailable: that is not installed, or does not have the precision.
    """
    if choice.device == "cpu":
        if choice.backend != "openvino":
            raise EngineUnavailable(
                "engine",
                choice.backend,
                f" does not run ONNX graphs on a CPU, and {name} is one; use openvino",
            )
        return choice
    if choice.is_precision_set and choice.precision != "fp32":
        raise EngineUnavailable(
            "precision",
            choice.precision,
            f": {name} is an ONNX graph, which runs in fp32 on {choice.device}",
        )
    if not is_installed("onnxruntime"):
        raise EngineUnavailable(
            "device",
            choice.device,
            f": {name} is an ONNX graph, for which onnxruntime-gpu is not installed; install it "
            "with: pip install 'unet-server[onnx]', or use device cpu",
        )
    reason = f"{choice.reason}; precision fp32: {name} is an ONNX graph"
    return dataclasses.replace(choice, backend="onnxruntime", precision="fp32", reason=reason)


def build_engine(choice: EngineChoice, checkpoint: Checkpoint) -> Engine:
    """Build the engine of one model on one device; `Engine.warm` is not called yet.

    Raises:
        EngineUnavailable: the model does not support the precision.
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
    if choice.device == "cpu":
        import torch

        from app.engine.torch import TorchEngine

        torch.set_num_threads(choice.threads)
        return TorchEngine(checkpoint, max_batch=choice.max_batch)
    if choice.backend == "onnxruntime":
        from app.engine.onnx_cuda import OnnxCudaEngine

        return OnnxCudaEngine(checkpoint, device=choice.device, max_batch=choice.max_batch)
    from app.engine.cuda import CudaEngine

    return CudaEngine(
        checkpoint,
        device=choice.device,
        precision=choice.precision,
        max_batch=choice.max_batch,
    )


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the whole CPUs that this process may use.

    The least of the container's quota, the process's affinity and the host's cores; at least 1.
    """
    cores = count_cpus()
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


def _precisions(engine: str, devices: Sequence[CudaDevice]) -> tuple[str, ...]:
    """List the supported precisions; the first is the default.

    Args:
        devices: that are used; none is the CPU.
    """
    if engine == "openvino":
        return ("fp32", "int8", "bf16") if cpu_has_bf16() else ("fp32", "int8")
    if not devices:
        return ("fp32",)
    oldest = min(device.capability for device in devices)
    if oldest >= BF16_FROM:
        return ("bf16", "fp16", "fp32")
    # Older cards only emulate bf16, and those without tensor cores are slower in fp16.
    return ("fp16", "fp32") if oldest >= FP16_FROM else ("fp32", "fp16")


def cpu_has_bf16() -> bool:
    """Whether OpenVINO runs bf16 on this CPU. Imports OpenVINO."""
    from app.engine.openvino import has_bf16

    return has_bf16()


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
