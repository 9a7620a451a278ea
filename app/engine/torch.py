"""The torch engine: CUDA devices, and the fp32 reference on a CPU.

Windows are copied to the device as bytes. Normalization, network and sigmoid run there; thresholds
do not, because overlapping windows are blended first. On CUDA a separate stream copies the next
batch while one computes, and every declared shape is captured as a CUDA graph for a few batch
sizes, so that a batch is one launch and allocates nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from app.engine.base import check_batch
from app.errors import DeviceLost, EngineError, OutOfMemory
from model.arrays import ByteArray, FloatArray, Shape
from model.checkpoint import Checkpoint
from model.predict import build_network
from model.transforms import normalize, probabilities

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BURN_IN_RUNS = 3
"""Runs before a capture, in which cuDNN tries its algorithms and libraries allocate workspaces."""


@dataclasses.dataclass
class _Transfer:
    """A batch that is being copied to a device.

    Attributes:
        host: the source, kept until the copy is complete.
        windows: the destination.
        copied: the event after the copy; None on a CPU, where nothing is copied.
    """

    host: ByteArray
    windows: Tensor
    copied: torch.cuda.Event | None = None


class _Graph:
    """The network captured for one shape and batch size: one launch replays all its kernels."""

    def __init__(self, compute: Callable[[Tensor], Tensor], windows: Tensor, pool: Any) -> None:
        self.inputs = windows
        # Not on the default stream, which cannot be captured and waits for all other streams.
        stream = torch.cuda.Stream(windows.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_BURN_IN_RUNS):
                compute(windows)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may serve another model meanwhile; its calls do not concern this capture.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = compute(windows)

    def __call__(self, windows: Tensor) -> Tensor:
        """Compute (n, h, w, C) windows, at most the captured number.

        Returns:
            A view of the outputs, valid until the next call.
        """
        self.inputs[: len(windows)].copy_(windows)
        self._graph.replay()
        return self.outputs[: len(windows)]


class TorchEngine:
    """See `app.engine.base.Engine`.

    Args:
        checkpoint: the model.
        device: "cpu" or "cuda:N".
        precision: "fp32", "bf16" or "fp16".
        max_batch: most windows in a batch.
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
            torch.backends.cudnn.benchmark = True  # few shapes, tuned in `warm`
            self._uploads = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def stage(self, shape: Shape, count: int) -> ByteArray:
        check_batch(self, shape, count)
        # Pinned memory saves the driver a second copy; torch reuses freed pinned blocks.
        buffer = torch.empty(
            (count, *shape, self._channels), dtype=torch.uint8, pin_memory=self._cuda
        )
        return buffer.numpy()

    def load(self, windows: ByteArray) -> _Transfer:
        host = torch.from_numpy(windows)
        if not self._cuda:
            return _Transfer(windows, host)
        with self._errors(), torch.cuda.device(self._device), torch.cuda.stream(self._uploads):
            copy = host.to(self._device, non_blocking=True)
            return _Transfer(windows, copy, self._uploads.record_event())

    @torch.inference_mode()
    def run(self, windows: _Transfer) -> FloatArray:
        with self._errors():
            if not self._cuda:
                return self._compute(windows.windows).numpy()
            with torch.cuda.device(self._device):
                return self._run_on_cuda(windows)

    def _run_on_cuda(self, transfer: _Transfer) -> FloatArray:
        stream = torch.cuda.current_stream()
        assert transfer.copied is not None
        stream.wait_event(transfer.copied)
        transfer.windows.record_stream(stream)  # its memory is not reused before it was read
        count, height, width, _ = transfer.windows.shape
        graph = self._graphs.get(((height, width), self._graph_size(count)))
        outputs = (graph or self._compute)(transfer.windows)
        host = torch.empty(outputs.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(outputs, non_blocking=True)
        stream.synchronize()
        return host.numpy()

    def _compute(self, windows: Tensor) -> Tensor:
        """Compute (n, h, w, C) uint8 -> (n, channels, h', w') float32, both on the device."""
        inputs = normalize(windows, self._preprocess)
        inputs = inputs.to(dtype=self._dtype, memory_format=torch.channels_last)
        return probabilities(self._network(inputs), self._preprocess)

    def _graph_size(self, count: int) -> int:
        """Batch size of the graph that computes `count` windows: a power of two, or the largest."""
        return min(1 << (count - 1).bit_length(), self.max_batch)

    def warm(self) -> None:
        if not self._cuda:
            for shape in self.shapes:
                self.run(self.load(self.stage(shape, 1)))
            return
        sizes = sorted(
            {self._graph_size(count) for count in range(1, self.max_batch + 1)}, reverse=True
        )
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others fit into the memory that it allocated.
        shapes = sorted(self.shapes, key=lambda shape: shape[0] * shape[1], reverse=True)
        for shape in shapes:
            for size in sizes:
                self._capture(shape, size, pool)
                # as a request does: with staging, streams and pinned memory
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
            # A batch of this size will raise it again, and the batcher will use smaller ones.
            log.warning("%s: not enough memory for %d windows of %s", self._device, size, shape)
        except EngineError as error:
            log.warning("no CUDA graph for %d windows of %s, slower: %s", size, shape, error)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Map errors of torch to those of `Engine`."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from error
        except RuntimeError as error:
            # After a sticky error (an illegal access, a lost device) every later call fails too.
            if self._cuda and not _responds(self._device):
                raise DeviceLost(f"{self._device}: {error}") from error
            raise EngineError(f"{self._device}: {error}") from error

    def captured(self) -> set[tuple[Shape, int]]:
        """List the shapes and batch sizes that CUDA graphs were captured for."""
        return set(self._graphs)

    def close(self) -> None:
        self._graphs.clear()
        del self._network
        if self._cuda:
            torch.cuda.empty_cache()


def _responds(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
