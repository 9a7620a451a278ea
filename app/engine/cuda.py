"""The torch engine on a CUDA device.

Windows are copied to the device as bytes, and probabilities come back as 16-bit integers::

    pinned memory ─ copy_in ─▶ slot.inputs ─ compute ─▶ slot.outputs ─ copy_out ─▶ pinned memory

Each arrow is a stream, and events order them, so that two batches are in flight: one is copied
while the other one is computed, and the host waits for nothing but the results. There are two
slots, whose memory is allocated once.

Normalization, network, sigmoid and the check for numbers that are not finite run on the device;
thresholds do not, because overlapping windows are blended first. Every declared shape is captured
as a CUDA graph for some batch sizes, so that a batch is one launch and allocates nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from app.engine.base import Engine, check_batch
from app.engine.cuda_queues import CudaQueues
from app.engine.torch_network import FusedUNet, WindowNetwork
from app.errors import EngineError, NonFiniteOutput, OutOfMemory
from model.arrays import ByteArray, Shape, UInt16Array
from model.checkpoint import Checkpoint

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST = 65535
"""Probability 1 as an integer."""


@dataclasses.dataclass
class _Buffers:
    """Memory of the device for one batch of any shape.

    Attributes:
        inputs: windows, uint8.
        outputs: probabilities times 65,535, uint16.
        finite: whether all outputs of a window are finite numbers.
    """

    inputs: Tensor
    outputs: Tensor
    finite: Tensor

    def view(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> _Buffers:
        """The part for a batch of these shapes: (n, h, w, C) and (n, channels, h', w')."""
        return _Buffers(
            self.inputs[: math.prod(inputs)].view(inputs),
            self.outputs[: math.prod(outputs)].view(outputs),
            self.finite[: inputs[0]],
        )


@dataclasses.dataclass
class _Slot:
    """Memory for a batch on its way, and the events after each step."""

    buffers: _Buffers
    filled: torch.cuda.Event
    computed: torch.cuda.Event
    copied_out: torch.cuda.Event


@dataclasses.dataclass
class _Flight:
    """A batch on its way.

    Attributes:
        windows: its source, which must live until it was copied.
        outputs, finite: pinned memory for the results.
        done: the event after which they are there.
    """

    windows: ByteArray
    outputs: Tensor
    finite: Tensor
    done: torch.cuda.Event


class CudaEngine(Engine):
    """See `app.engine.base.Engine`.

    Args:
        checkpoint: the model.
        device: "cuda:N".
        precision: "fp32", "bf16" or "fp16".
        max_batch: most windows in a batch.
        queues: of the device; None are the real ones.

    Raises:
        OutOfMemory, EngineError: the device cannot hold the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str,
        precision: str,
        max_batch: int,
        queues: CudaQueues | None = None,
    ) -> None:
        self.shapes: tuple[Shape, ...] = checkpoint.preprocess.window
        self.max_batch = max_batch
        self._channels = checkpoint.architecture.in_channels
        self._out_channels = checkpoint.architecture.out_channels
        self._margin = checkpoint.architecture.margin
        self._queues = queues or CudaQueues.of(device)
        self._graphs: dict[tuple[Shape, int], Callable[[], None]] = {}
        torch.backends.cudnn.benchmark = True  # few shapes, tuned in `warm_steps`
        with self._queues.errors(), self._queues.on(self._queues.compute):
            self._network = WindowNetwork(checkpoint, self._queues.device, _DTYPES[precision])
            self._pool = self._queues.new_pool()
            self._captured = self._new_buffers()
            self._slots = itertools.cycle([self._new_slot(), self._new_slot()])
        self._may_fuse = precision != "fp32"

    def stage(self, shape: Shape, count: int) -> ByteArray:
        check_batch(self, shape, count)
        with self._queues.errors():
            size = (count, *shape, self._channels)
            return self._queues.empty_pinned(size, torch.uint8).numpy()

    @torch.inference_mode()
    def submit(self, windows: ByteArray) -> _Flight:
        queues, slot = self._queues, next(self._slots)
        with queues.errors():
            batch = self._view(slot.buffers, windows.shape)
            with queues.on(queues.copy_in):
                queues.copy_in.wait_event(slot.computed)  # the batch before has read its inputs
                batch.inputs.copy_(torch.from_numpy(windows), non_blocking=True)
                slot.filled.record(queues.copy_in)
            with queues.on(queues.compute):
                queues.compute.wait_event(slot.filled)
                queues.compute.wait_event(slot.copied_out)
                self._compute_batch(batch)
                slot.computed.record(queues.compute)
            with queues.on(queues.copy_out):
                outputs = queues.empty_pinned(tuple(batch.outputs.shape), torch.uint16)
                finite = queues.empty_pinned(tuple(batch.finite.shape), torch.bool)
                queues.copy_out.wait_event(slot.computed)
                outputs.copy_(batch.outputs, non_blocking=True)
                finite.copy_(batch.finite, non_blocking=True)
                slot.copied_out.record(queues.copy_out)
        return _Flight(windows, outputs, finite, slot.copied_out)

    def collect(self, submitted: _Flight) -> UInt16Array:
        with self._queues.errors():
            submitted.done.synchronize()
        if not submitted.finite.numpy().all():
            raise NonFiniteOutput("the network returned values that are not finite")
        return submitted.outputs.numpy()

    def _compute_batch(self, batch: _Buffers) -> None:
        """Compute a batch by the smallest graph that holds it, or without one."""
        count, height, width, _ = batch.inputs.shape
        size = next(size for size in batch_sizes(self.max_batch) if size >= count)
        replay = self._graphs.get(((height, width), size))
        if replay is None:  # memory did not suffice to capture it
            self._compute(batch)
            return
        captured = self._view(self._captured, batch.inputs.shape)
        captured.inputs.copy_(batch.inputs)
        replay()
        batch.outputs.copy_(captured.outputs)
        batch.finite.copy_(captured.finite)

    @torch.inference_mode()
    def _compute(self, batch: _Buffers) -> None:
        values = self._network(batch.inputs)
        batch.finite.copy_(values.sum(dim=(1, 2, 3)).isfinite())
        batch.outputs.copy_(values.mul_(_LARGEST).add_(0.5))  # the conversion cuts the fraction off

    def warm_steps(self) -> Iterator[Callable[[], None]]:
        # The largest first: the others fit into the memory that it allocated.
        shapes = sorted(self.shapes, key=math.prod, reverse=True)
        if self._may_fuse:
            yield functools.partial(self._choose_network, shapes[0])
        batches = list(itertools.product(shapes, reversed(batch_sizes(self.max_batch))))
        # Graphs keep the memory of their runs. Runs without one need as much, so they come first.
        fitting: set[tuple[Shape, int]] = set()
        for shape, size in batches:
            yield functools.partial(self._burn_in, shape, size, fitting)
        yield self._queues.return_memory
        for shape, size in batches:
            yield functools.partial(self._capture, shape, size, fitting)

    def _choose_network(self, shape: Shape) -> None:
        """Use the form of the network that is fastest on this device.

        Raises:
            EngineError: the network as it is cannot be computed.
        """
        size = (min(4, self.max_batch), *shape, self._channels)
        batch = self._view(self._captured, size)
        plain = self._network.unet
        forms: dict[str, Callable[[], nn.Module]] = {
            "as it is": lambda: plain,
            "fused layers": lambda: FusedUNet(plain),  # type: ignore[arg-type]
            "and products": lambda: FusedUNet(plain, grow_by_product=True),  # type: ignore[arg-type]
            "and maxima": lambda: FusedUNet(plain, grow_by_product=True, pool_by_maxima=True),  # type: ignore[arg-type]
        }
        networks: dict[str, nn.Module] = {}
        times: dict[str, float] = {}
        for name, build in forms.items():
            try:
                with self._queues.errors(), self._queues.on(self._queues.compute):
                    self._network.unet = networks[name] = build()
                times[name] = self._queues.measure(lambda: self._compute(batch))
            except EngineError as error:
                if name == "as it is":
                    raise
                log.warning("%s: no %s: %s", self._queues.device, name, error)
        self._network.unet = networks[min(times, key=times.__getitem__)]
        log.info(
            "%s: %d windows of %dx%d take %s",
            self._queues.device,
            size[0],
            *shape,
            ", ".join(f"{each:.2f} ms ({name})" for name, each in times.items()),
        )

    def _burn_in(self, shape: Shape, size: int, fitting: set[tuple[Shape, int]]) -> None:
        """Run a batch size without a graph.

        Args:
            fitting: receives it if memory suffices.

        Raises:
            OutOfMemory: memory does not suffice for one window.
            EngineError: it cannot be computed.
        """
        captured = self._view(self._captured, (size, *shape, self._channels))
        with self._lack_of_memory_logged(shape, size):
            self._queues.burn_in(lambda: self._compute(captured))
            fitting.add((shape, size))

    def _capture(self, shape: Shape, size: int, fitting: set[tuple[Shape, int]]) -> None:
        """Capture a batch size, and run it once as a request does.

        Args:
            fitting: those that `_burn_in` has run.

        Raises:
            OutOfMemory: memory does not suffice for one window.
            EngineError: it cannot be captured.
        """
        if (shape, size) not in fitting:
            return
        captured = self._view(self._captured, (size, *shape, self._channels))
        with self._lack_of_memory_logged(shape, size):
            self._graphs[shape, size] = self._queues.capture(
                lambda: self._compute(captured), self._pool
            )
            black = self.stage(shape, size)
            black[:] = 0
            self.collect(self.submit(black))

    @contextlib.contextmanager
    def _lack_of_memory_logged(self, shape: Shape, size: int) -> Iterator[None]:
        """Log a lack of memory, or raise it if it is for one window."""
        try:
            yield
        except OutOfMemory as error:
            if size == 1:
                raise
            # A batch of this size will raise it again, and the batcher will use smaller ones.
            log.warning("not enough memory for %d windows of %dx%d: %s", size, *shape, error)

    def captured(self) -> set[tuple[Shape, int]]:
        """List the shapes and batch sizes that CUDA graphs were captured for."""
        return set(self._graphs)

    def check(self) -> float:
        return self._queues.used_bytes()

    def close(self) -> None:
        self._queues.wait()  # for copies out of the memory that is freed next
        self._graphs.clear()
        del self._network, self._captured, self._slots, self._pool
        self._queues.return_memory()

    def _view(self, buffers: _Buffers, inputs: tuple[int, ...]) -> _Buffers:
        count, height, width, _ = inputs
        lost = 2 * self._margin
        return buffers.view(tuple(inputs), (count, self._out_channels, height - lost, width - lost))

    def _new_buffers(self) -> _Buffers:
        """Allocate buffers for the largest batch."""
        lost = 2 * self._margin
        inputs = max(height * width for height, width in self.shapes)
        outputs = max((height - lost) * (width - lost) for height, width in self.shapes)
        empty, count = self._queues.empty, self.max_batch
        return _Buffers(
            empty(count * inputs * self._channels, torch.uint8),
            empty(count * outputs * self._out_channels, torch.uint16),
            empty(count, torch.bool),
        )

    def _new_slot(self) -> _Slot:
        event = self._queues.event
        slot = _Slot(self._new_buffers(), event(), event(), event())
        # Its memory may have been that of a tensor of this stream.
        slot.computed.record(self._queues.compute)
        return slot


@functools.cache
def batch_sizes(largest: int) -> tuple[int, ...]:
    """The batch sizes that are captured: 1, 2, 3, 4, 6, 8, 12, 16, ... and the largest.

    Less than a third of a batch is padding.
    """
    doublings = range(largest.bit_length())
    sizes = {1, *(base << doubling for base in (2, 3) for doubling in doublings)}
    return (*sorted(size for size in sizes if size < largest), largest)
