"""The torch engine: CUDA devices, and the reference in fp32 on a CPU.

Bytes cross the bus, and everything else happens on the device: normalisation, network, sigmoid
(thresholds do not: overlapping windows are blended first). On CUDA the next batch crosses the bus
on a stream of its own while one computes, and every declared shape is captured as a CUDA graph
for a few batch sizes, so that a batch is one launch and allocates nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from app.errors import DeviceLost, EngineError, OutOfMemory
from model.arrays import ByteArray, FloatArray, Shape
from model.checkpoint import Checkpoint
from model.predict import build_network
from model.transforms import normalize, probabilities

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BURN_IN = 3
"""Runs before a capture: cuDNN tries its algorithms, and libraries take their workspaces."""


@dataclasses.dataclass
class _Loaded:
    """Windows on their way to a device; `host` lives until they have arrived."""

    host: ByteArray
    windows: Tensor
    arrived: torch.cuda.Event | None = None


class _Graph:
    """The network for one shape and batch size, captured: one launch replays all its kernels."""

    def __init__(self, compute: Callable[[Tensor], Tensor], windows: Tensor, pool: Any) -> None:
        self.inputs = windows
        # Not on the default stream, which cannot be captured and would wait for every other.
        aside = torch.cuda.Stream(windows.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_BURN_IN):
                compute(windows)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Another model may be serving on another thread meanwhile: its calls are not ours to judge.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = compute(windows)

    def __call__(self, windows: Tensor) -> Tensor:
        """Of (n, h, w, C) windows, no more than were captured; valid until the next call."""
        self.inputs[: len(windows)].copy_(windows)
        self._graph.replay()
        return self.outputs[: len(windows)]


class TorchEngine:
    """See `app.engine.base.Engine`.

    Args:
        checkpoint: the model.
        device: "cpu" or "cuda:N".
        precision: "fp32", "bf16" or "fp16".
        max_batch: windows at once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str,
        precision: str,
        max_batch: int,
    ) -> None:
        self.shapes: tuple[Shape, ...] = checkpoint.preprocess.window
        self.max_batch = max_batch
        self._preprocess = checkpoint.preprocess
        self._channels = checkpoint.architecture.in_channels
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._dtype = _DTYPES[precision]
        self._graphs: dict[tuple[Shape, int], _Graph] = {}
        self._network = (
            build_network(checkpoint)
            .eval()
            .to(
                device=self._device,
                dtype=self._dtype,
                memory_format=torch.channels_last,  # type: ignore[call-overload]
            )
        )
        if self._cuda:
            torch.backends.cudnn.benchmark = True  # the shapes are few, and tuned while warming
            self._uploads = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def stage(self, shape: Shape, count: int) -> ByteArray:
        if shape not in self.shapes or not 1 <= count <= self.max_batch:
            raise ValueError(f"{count} windows of {shape} for an engine of {self.shapes}")
        # Pinned, so that the copy to the device needs no second copy by the driver; torch keeps
        # freed pinned blocks for the next batch.
        buffer = torch.empty(
            (count, *shape, self._channels), dtype=torch.uint8, pin_memory=self._cuda
        )
        return buffer.numpy()

    def load(self, windows: ByteArray) -> _Loaded:
        host = torch.from_numpy(windows)
        if not self._cuda:
            return _Loaded(windows, host)
        with self._errors(), torch.cuda.device(self._device), torch.cuda.stream(self._uploads):
            there = host.to(self._device, non_blocking=True)
            return _Loaded(windows, there, self._uploads.record_event())

    @torch.inference_mode()
    def run(self, windows: _Loaded) -> FloatArray:
        with self._errors():
            if not self._cuda:
                return self._compute(windows.windows).numpy()
            with torch.cuda.device(self._device):
                return self._run_on_cuda(windows)

    def _run_on_cuda(self, loaded: _Loaded) -> FloatArray:
        stream = torch.cuda.current_stream()
        assert loaded.arrived is not None
        stream.wait_event(loaded.arrived)
        loaded.windows.record_stream(stream)  # its memory is not reused before it was read
        count, height, width, _ = loaded.windows.shape
        graph = self._graphs.get(((height, width), self._size(count)))
        outputs = (graph or self._compute)(loaded.windows)
        host = torch.empty(outputs.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(outputs, non_blocking=True)
        stream.synchronize()
        return host.numpy()

    def _compute(self, windows: Tensor) -> Tensor:
        """(n, h, w, C) uint8 -> (n, channels, h', w') float32, all of it on the device."""
        inputs = normalize(windows, self._preprocess)
        inputs = inputs.to(dtype=self._dtype, memory_format=torch.channels_last)
        return probabilities(self._network(inputs), self._preprocess)

    def _size(self, count: int) -> int:
        """Windows of the graph that computes `count`: a power of two, or the largest batch."""
        return min(1 << (count - 1).bit_length(), self.max_batch)

    def warm(self) -> None:
        if not self._cuda:
            for shape in self.shapes:
                self.run(self.load(self.stage(shape, 1)))
            return
        sizes = sorted({self._size(count) for count in range(1, self.max_batch + 1)}, reverse=True)
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others find their memory in what it leaves behind.
        shapes = sorted(self.shapes, key=lambda shape: shape[0] * shape[1], reverse=True)
        for shape in shapes:
            for size in sizes:
                self._capture(shape, size, pool)
                # through stages, streams and pinned memory, as a request will
                with contextlib.suppress(OutOfMemory):
                    self.run(self.load(self.stage(shape, size)))

    @torch.inference_mode()
    def _capture(self, shape: Shape, size: int, pool: Any) -> None:
        try:
            with self._errors(), torch.cuda.device(self._device):
                windows = torch.zeros(
                    (size, *shape, self._channels), dtype=torch.uint8, device=self._device
                )
                self._graphs[shape, size] = _Graph(self._compute, windows, pool)
        except OutOfMemory:
            # Such a batch raises it again when it comes, and the batcher remembers a smaller one.
            log.warning("%s has no room for %d windows of %s", self._device, size, shape)
        except EngineError as error:
            log.warning("%d windows of %s run uncaptured, which is slower: %s", size, shape, error)

    @contextlib.contextmanager
    def _errors(self) -> Any:
        """What torch raises, in our own terms."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from error
        except RuntimeError as error:
            # After a sticky error (an illegal access, a lost device) every later call fails too.
            if self._cuda and not _answers(self._device):
                raise DeviceLost(f"{self._device}: {error}") from error
            raise EngineError(f"{self._device}: {error}") from error

    def close(self) -> None:
        self._graphs.clear()
        del self._network
        if self._cuda:
            torch.cuda.empty_cache()


def _answers(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
