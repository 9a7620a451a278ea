"""The thread that calls a device, and the one that waits for it. Knows no torch and no windows."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from app.batching.call_thread import ThreadCallback, ThreadFuture

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
    """Work for the device.

    Attributes:
        submit: starts it.
        collect: waits for the result of `submit` and returns it; None if `submit` does everything.
        outcome: gets the result, a `Timed` if there is `collect`; or the exception.
    """

    submit: Callable[[], Any]
    collect: Callable[[Any], Any] | None
    outcome: ThreadCallback


class DeviceThread:
    """A thread that submits batches to a device, and makes all other calls to it.

    Everything runs on this thread because CUDA's current device, cuDNN's choice of algorithms and
    OpenMP's pools belong to a thread. Up to `depth` batches are in flight, so that the device has
    its next batch already when it completes one. With a depth of 1 the thread also collects. With
    more, a second thread does, which only waits: the first one could not submit meanwhile.

    Like `CallThread` they are not joined at exit.

    Args:
        name: of the thread.
        depth: most batches that are submitted and not collected.
    """

    def __init__(self, name: str, depth: int) -> None:
        self._depth = depth
        self._calls: queue.SimpleQueue[DeviceCall | None] = queue.SimpleQueue()
        self._submitted: queue.SimpleQueue[tuple[DeviceCall, Any] | None] = queue.SimpleQueue()
        self._places = threading.Semaphore(depth)
        self._lock = threading.Lock()  # of what follows
        self._in_flight = 0
        self._batch_since: float | None = None
        self._call_since: float | None = None
        threading.Thread(target=self._submit_all, name=name, daemon=True).start()
        if depth > 1:
            threading.Thread(target=self._collect_all, name=f"{name} collect", daemon=True).start()

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
        with self._lock:
            times = [each for each in (self._batch_since, self._call_since) if each is not None]
        return time.monotonic() - min(times) if times else 0.0

    def stop(self) -> None:
        """End the threads after the work that is queued. Does not wait for that."""
        self._calls.put(None)

    def _submit_all(self) -> None:
        while (call := self._calls.get()) is not None:
            settle = self._make_call(call) if call.collect is None else self._submit(call)
            del call
            # Only now: nothing here keeps the memory of a batch that will be tried again.
            if settle is not None:
                settle()
            del settle
        self._submitted.put(None)

    def _collect_all(self) -> None:
        while (each := self._submitted.get()) is not None:
            settle = self._collect(*each)
            del each
            settle()
            del settle

    def _make_call(self, call: DeviceCall) -> Callable[[], None]:
        """Make a call that is not a batch; returns what settles its outcome."""
        with self._lock:
            self._call_since = time.monotonic()
        try:
            settle = functools.partial(call.outcome.set, call.submit())
        except BaseException as error:  # the caller gets it, whatever it is
            release_frames(error)
            settle = functools.partial(call.outcome.set, error)
        finally:
            del call  # the traceback of an error keeps this frame, which still runs
        with self._lock:
            self._call_since = None
        return settle

    def _submit(self, call: DeviceCall) -> Callable[[], None] | None:
        """Submit a batch once fewer than `depth` are in flight.

        Returns:
            What settles its outcome; None if another thread collects it.
        """
        self._places.acquire()
        with self._lock:
            self._in_flight += 1
            if self._in_flight == 1:
                self._batch_since = time.monotonic()
        try:
            # No variable: a traceback of `collect` keeps the variables of this frame.
            if self._depth == 1:
                return self._collect(call, call.submit())
            self._submitted.put((call, call.submit()))
        except BaseException as error:
            release_frames(error)
            self._leave()
            return functools.partial(call.outcome.set, error)
        finally:
            del call
        return None

    def _collect(self, call: DeviceCall, submitted: Any) -> Callable[[], None]:
        """Wait for the oldest batch; returns what settles its outcome."""
        collect, outcome, started = call.collect, call.outcome, self._batch_since
        assert collect is not None
        assert started is not None
        try:
            result = collect(submitted)
        except BaseException as error:
            release_frames(error)
            settle = functools.partial(outcome.set, error)
        else:
            done = Timed(result, started, time.monotonic() - started)
            settle = functools.partial(outcome.set, done)
        finally:
            del call, submitted  # as in `_make_call`
        self._leave()
        return settle

    def _leave(self) -> None:
        """Count a batch that is no longer in flight. The next one is what the device does now."""
        with self._lock:
            self._in_flight -= 1
            self._batch_since = time.monotonic() if self._in_flight else None
        self._places.release()


def release_frames(error: BaseException | None) -> None:
    """Drop the local variables that the tracebacks of an error and its causes keep alive.

    After a lack of memory these are the activations of the failed batch: the next, smaller batch
    would have no more room than the first. The tracebacks can still be printed. Frames that still
    run keep their variables.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
