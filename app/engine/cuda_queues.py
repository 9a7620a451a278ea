"""One CUDA device as the engines use it: its streams, graphs and memory, and its errors.

All calls of `torch.cuda` that serving needs are here, so that tests can replace them. Knows no
network and no windows.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from app.errors import DeviceLost, EngineError, OutOfMemory
from model.errors import first_line

_BURN_IN_RUNS = 3
"""In the first, cuDNN tries its algorithms and libraries allocate workspaces."""


class CudaQueues:
    """The streams of a device, which all of its engines share.

    There is one stream for each direction of copies and one for computing, for as long as the
    process runs. `torch.cuda.graph` alone would capture every device's graphs on one stream of the
    first device.

    Only one thread may use it, but for `empty_pinned`.

    Attributes:
        device: "cuda:N".
        copy_in, compute, copy_out: the streams.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        try:
            self.copy_in, self.compute, self.copy_out, self._probe = (
                torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
                for _ in range(4)
            )
        except RuntimeError as error:  # not permitted, in exclusive use, no memory for a context
            raise EngineError(f"{device}: {_describe(error)}") from error
        self._failed_capture: str | None = None

    @staticmethod
    @functools.cache
    def of(device: str) -> CudaQueues:
        """Return the queues of a device.

        Raises:
            EngineError: the device cannot be used.
        """
        return CudaQueues(device)

    def on(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[Any]:
        """Queue what is called inside on a stream."""
        return torch.cuda.stream(stream)

    def event(self) -> torch.cuda.Event:
        """Create an event. A thread that waits for it sleeps; CUDA's default is to spin."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def empty(self, values: int, dtype: torch.dtype) -> Tensor:
        """Allocate memory of the device for the computing stream; it is uninitialized."""
        with self.on(self.compute):
            return torch.empty(values, dtype=dtype, device=self.device)

    def empty_pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate memory of the host that the device copies from and to; it is uninitialized.

        torch keeps freed blocks, so this is cheap once all sizes were used. It also keeps a block
        until the copies from and to it are complete.
        """
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def new_pool(self) -> Any:
        """Create a pool of memory that graphs share."""
        return torch.cuda.graph_pool_handle()

    def burn_in(self, function: Callable[[], None]) -> None:
        """Run a function until cuDNN has tried its algorithms and libraries have their workspaces.

        Raises:
            OutOfMemory, EngineError: as `errors`.
        """
        with self.errors(), self.on(self.compute):
            for _ in range(_BURN_IN_RUNS):
                function()
            self.compute.synchronize()

    def capture(self, function: Callable[[], None], pool: Any) -> Callable[[], None]:
        """Record the kernels of a function, and return a function that launches all of them.

        Args:
            function: reads and writes memory at fixed addresses; `burn_in` ran it.
            pool: for the memory that it allocates.

        Raises:
            OutOfMemory: as `errors`.
            EngineError: it cannot be recorded. Later captures are not tried: CUDA's state is
                undefined.
        """
        if self._failed_capture is not None:
            raise EngineError(f"a capture has failed before: {self._failed_capture}")
        with self.errors(), self.on(self.compute):
            graph = torch.cuda.CUDAGraph()
            try:
                # Another thread may prepare a batch; its calls do not concern this capture.
                with torch.cuda.graph(
                    graph, pool=pool, stream=self.compute, capture_error_mode="thread_local"
                ):
                    function()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._failed_capture = _describe(error)
                raise
        return graph.replay

    def measure(self, function: Callable[[], None], runs: int = 5) -> float:
        """Return the milliseconds that the device takes for a function."""
        with self.errors(), self.on(self.compute):
            for _ in range(_BURN_IN_RUNS):
                function()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(runs):
                function()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / runs

    def used_bytes(self) -> float:
        """Return the bytes that all processes use on the device.

        Raises:
            DeviceLost: the device does not respond.
        """
        with self.errors():
            self._wait_for_probe()
            free, total = torch.cuda.mem_get_info(self.device)
        return float(total - free)

    def wait(self) -> None:
        """Wait until all streams have done what is queued."""
        with self.errors():
            for stream in (self.copy_in, self.compute, self.copy_out):
                stream.synchronize()

    def return_memory(self) -> None:
        """Return memory that torch keeps for reuse to the device."""
        with self.errors(), self.on(self.compute):
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Map errors of torch to those of `Engine`. Each has one line."""
        try:
            yield
        except RuntimeError as error:
            text = f"{self.device}: {_describe(error)}"
            if isinstance(error, torch.OutOfMemoryError):
                # A log may keep the error. It must not keep the tensors of its frames.
                traceback.clear_frames(error.__traceback__)
                raise OutOfMemory(text) from error
            # After a sticky error (an illegal access, a lost device) every later call fails too.
            try:
                self._wait_for_probe()
            except RuntimeError:
                raise DeviceLost(text) from error
            if "out of memory" in text:  # of the host, pinned
                raise OutOfMemory(text) from error
            raise EngineError(text) from error

    def _wait_for_probe(self) -> None:
        """Wait for a stream that has no work. Not for the device: that would end a capture."""
        event = self.event()
        event.record(self._probe)
        event.synchronize()


def _describe(error: RuntimeError) -> str:
    """The part of a message that says what happened; the rest is advice to programmers."""
    return first_line(error).partition(" Including non-PyTorch memory")[0]
