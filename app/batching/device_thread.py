"""The one thread that calls a device. Knows no torch and no windows."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from app.batching.call_thread import ThreadFuture

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Timed(Generic[T]):
    """The result of a batch, and when the device computed it.

    Attributes:
        started: on the clock of `time.monotonic`: when the batch was submitted, or when the batch
            before it was done, whichever was later.
        seconds: from then until the result was there.
    """

    result: T
    started: float
    seconds: float


@dataclasses.dataclass
class DeviceCall:
    """Work for the thread.

    Attributes:
        submit: starts it.
        collect: waits for the result of `submit` and returns it; None if `submit` does everything.
        outcome: gets the result: a `Timed` if there is `collect`.
    """

    submit: Callable[[], Any]
    collect: Callable[[Any], Any] | None
    outcome: ThreadFuture[Any]


class DeviceThread:
    """A thread that submits batches to a device, collects them, and makes all other calls to it.

    Everything runs on this thread because CUDA's current device, cuDNN's choice of algorithms and
    OpenMP's pools belong to a thread. Up to `depth` batches are in flight, so that the device has
    its next batch already when it completes one. The thread waits for the oldest only if it has
    nothing to submit.

    Like `CallThread` it is not joined at exit.

    Args:
        name: of the thread.
        depth: most batches that are submitted and not collected.
    """

    def __init__(self, name: str, depth: int) -> None:
        self._depth = depth
        self._calls: queue.SimpleQueue[DeviceCall | None] = queue.SimpleQueue()
        self._in_flight: deque[tuple[DeviceCall, Any]] = deque()
        self._busy_since: float | None = None
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def put(self, call: DeviceCall) -> None:
        """Queue work. Returns at once; any thread may call this."""
        self._calls.put(call)

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function on the thread, between two batches, and return its result.

        Raises:
            Exception: what the function raised.
        """
        outcome: ThreadFuture[T] = ThreadFuture()
        self.put(DeviceCall(function, None, outcome))
        return await outcome.future

    def elapsed(self) -> float:
        """Seconds that the oldest batch in flight, or another call, has taken; 0 if idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self) -> None:
        """End the thread after the work that is queued. Does not wait for that."""
        self._calls.put(None)

    def _work(self) -> None:
        stopping = False
        while True:
            settle: Callable[[], None] | None = None
            if self._in_flight and (stopping or not self._can_submit()):
                settle = self._collect(*self._in_flight.popleft())
            elif stopping:
                return
            else:
                call = self._calls.get()
                if call is None:
                    stopping = True
                else:
                    settle = self._submit(call)
                del call
            # Only now: nothing here keeps the memory of a batch that will be tried again.
            if settle is not None:
                settle()

    def _can_submit(self) -> bool:
        return len(self._in_flight) < self._depth and not self._calls.empty()

    def _submit(self, call: DeviceCall) -> Callable[[], None] | None:
        """Submit a batch, or make another call; returns what settles its outcome."""
        if not self._in_flight:
            self._busy_since = time.monotonic()
        settle: Callable[[], None] | None = None
        try:
            submitted = call.submit()
        except BaseException as error:  # the caller gets it, whatever it is
            release_frames(error)
            settle = functools.partial(call.outcome.set_exception, error)
        else:
            if call.collect is None:
                settle = functools.partial(call.outcome.set_result, submitted)
            else:
                self._in_flight.append((call, submitted))
            del submitted
        finally:
            del call  # the traceback of an error keeps this frame, which still runs
        if not self._in_flight:
            self._busy_since = None
        return settle

    def _collect(self, call: DeviceCall, submitted: Any) -> Callable[[], None]:
        """Collect a batch; returns what settles its outcome."""
        collect, outcome, started = call.collect, call.outcome, self._busy_since
        assert collect is not None
        assert started is not None
        try:
            result = collect(submitted)
        except BaseException as error:
            release_frames(error)
            settle = functools.partial(outcome.set_exception, error)
        else:
            done = Timed(result, started, time.monotonic() - started)
            settle = functools.partial(outcome.set_result, done)
        finally:
            del call, submitted  # as in `_submit`
        self._busy_since = time.monotonic() if self._in_flight else None
        return settle


def release_frames(error: BaseException | None) -> None:
    """Drop the local variables that the tracebacks of an error and its causes keep alive.

    After a lack of memory these are the activations of the failed batch: the next, smaller batch
    would have no more room than the first. The tracebacks can still be printed. Frames that still
    run keep their variables.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
