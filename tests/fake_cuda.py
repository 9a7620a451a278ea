"""`torch.cuda` on a CPU: streams, events, graphs and loss, for tests of the CUDA engine.

Operators run at once, but a race detector knows which of them a device would have ordered: those
on one stream, and those that an event orders. A capture records operators, and a replay runs them
again on the same memory. Needs torch alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.engine.cuda_queues import CudaQueues

Clock = dict[str, int]
_FROM_HOST = ("aten::lift_fresh", "aten::_local_scalar_dense")
"""Operators that wait for a copy from or to pageable memory of the host."""


class FakeCuda:
    """The state of the driver.

    Attributes:
        lost: every call fails.
        races: descriptions of accesses that no event orders.
        waits: how often the host waited, by what it waited for.
        copies: operators outside of a replay that copied to existing memory.
        allocations: operators outside of a replay that allocated memory.
        captures: streams that graphs were captured on.
        memory: values that a capture may allocate in one operator.
    """

    def __init__(self) -> None:
        self.lost = False
        self.races: list[str] = []
        self.waits: Counter[str] = Counter()
        self.copies: list[str] = []
        self.allocations: list[str] = []
        self.captures: list[FakeStream] = []
        self.memory = 10**12
        self.stream: FakeStream | None = None
        self.graph: FakeGraph | None = None
        self.replaying = False
        self._clocks: defaultdict[str, Clock] = defaultdict(dict)
        self._writes: dict[int, tuple[str, int]] = {}
        self._reads: defaultdict[int, Clock] = defaultdict(dict)

    def check(self) -> None:
        if self.lost:
            raise RuntimeError(
                "CUDA error: the launch failed\nCompile with advice for programmers."
            )

    def clock(self, name: str) -> Clock:
        """The operators that `name`, a stream or the host, knows to be done."""
        return dict(self._clocks[name])

    def merge(self, name: str, clock: Clock) -> None:
        mine = self._clocks[name]
        for other, time in clock.items():
            mine[other] = max(time, mine.get(other, 0))

    def access(self, name: str, operator: str, tensor: Tensor, *, write: bool) -> None:
        """Record an access, and check that what it depends on is done."""
        key, mine = tensor.untyped_storage().data_ptr(), self._clocks[name]
        earlier = [self._writes[key]] if key in self._writes else []
        if write:
            earlier += self._reads[key].items()
        for other, time in earlier:
            if other != name and mine.get(other, 0) < time:
                self.races.append(f"{operator} on {name} does not wait for {other}")
        if write:
            self._writes[key] = name, mine.get(name, 0)
            self._reads[key] = {}
        else:
            self._reads[key][name] = mine.get(name, 0)

    def allocate(self, name: str, tensor: Tensor) -> None:
        """Record that `name` allocated and wrote a tensor."""
        key = tensor.untyped_storage().data_ptr()
        self._reads.pop(key, None)
        self._writes[key] = name, self._clocks[name].get(name, 0)

    def tick(self, stream: FakeStream) -> str:
        """Begin an operator on a stream, and return the stream's name."""
        name = stream.name
        self.merge(name, self._clocks["host"])  # it is queued after what the host did
        self._clocks[name][name] = self._clocks[name].get(name, 0) + 1
        return name


class FakeStream:
    cuda_stream = 4711
    """The address of the driver's stream."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda = cuda
        self.name = name

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.check()
        self.cuda.merge(self.name, event.clock)

    def synchronize(self) -> None:
        self.cuda.check()
        self.cuda.waits["stream"] += 1
        self.cuda.merge("host", self.cuda.clock(self.name))


class FakeEvent:
    def __init__(self, cuda: FakeCuda, **options: bool) -> None:
        self.cuda = cuda
        self.blocking = options.get("blocking", False)
        self.clock: Clock = {}

    def record(self, stream: FakeStream | None = None) -> None:
        self.cuda.check()
        stream = stream or self.cuda.stream
        assert stream is not None
        self.clock = self.cuda.clock(stream.name)

    def synchronize(self) -> None:
        self.cuda.check()
        self.cuda.waits["event" if self.blocking else "spinning"] += 1
        self.cuda.merge("host", self.clock)

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1.0


@dataclasses.dataclass
class FakeGraph:
    """Operators with the tensors that they read and wrote."""

    cuda: FakeCuda
    recorded: list[tuple[Any, Any, Any, Any]] = dataclasses.field(default_factory=list)

    def replay(self) -> None:
        self.cuda.check()
        self.cuda.replaying = True
        for operator, args, options, result in self.recorded:
            again = operator(*args, **options)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self.cuda.replaying = False


class _Watch(TorchDispatchMode):
    """Sees every operator."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cuda, options = self._cuda, kwargs or {}
        cuda.check()
        name = func._schema.name
        if cuda.graph is not None and name in _FROM_HOST:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **options)
        if cuda.graph is not None:
            if any(isinstance(x, Tensor) and x.numel() > cuda.memory for x in tree_leaves(result)):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.")
            cuda.graph.recorded.append((func, args, options, result))
        if cuda.stream is None:  # the host's own, such as a reference
            return result
        stream = cuda.tick(cuda.stream)
        known = {
            each.untyped_storage().data_ptr()
            for each in tree_leaves((args, options))
            if isinstance(each, Tensor)
        }
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, Tensor) and not func.is_view:
                write = argument.alias_info is not None and argument.alias_info.is_write
                cuda.access(stream, name, value, write=write)
                if write and not cuda.replaying:
                    cuda.copies.append(name)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                cuda.allocate(stream, value)
                if not cuda.replaying:
                    cuda.allocations.append(name)
        return result


class FakeQueues(CudaQueues):
    """Real queues, with memory of the host that needs no driver to be pinned."""

    def empty_pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        fake = self.compute.cuda  # type: ignore[attr-defined]
        fake.check()
        return torch.empty(shape, dtype=dtype)


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Replace `torch.cuda` for the calling thread."""
    cuda = FakeCuda()
    streams = iter(range(1000))

    def new_stream(device: torch.device) -> FakeStream:
        cuda.check()
        return FakeStream(cuda, f"{device} stream {next(streams)}")

    @contextlib.contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        before, cuda.stream = cuda.stream, stream
        try:
            yield
        finally:
            cuda.stream = before

    @contextlib.contextmanager
    def capture(
        graph: FakeGraph, *, pool: object, stream: FakeStream, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        cuda.captures.append(stream)
        with on(stream):
            cuda.graph = graph
            try:
                yield
            finally:
                cuda.graph = None

    def forbidden(*_: object) -> None:
        raise AssertionError("waits for the whole device, and would end another thread's capture")

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        cuda.check()
        return 30, 100

    for name, value in {
        "Stream": new_stream,
        "Event": lambda **options: FakeEvent(cuda, **options),
        "stream": on,
        "graph": capture,
        "CUDAGraph": lambda: FakeGraph(cuda),
        "graph_pool_handle": object,
        "mem_get_info": mem_get_info,
        "empty_cache": lambda: None,
        "synchronize": forbidden,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with _Watch(cuda):
        yield cuda
