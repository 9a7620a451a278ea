"""A thread for blocking calls that an event loop awaits."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ThreadCallback:
    """Passes the outcome of another thread's work to a function, on the running event loop.

    Args:
        function: gets the result, or the exception.
    """

    def __init__(self, function: Callable[[Any], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._function = function

    def set(self, outcome: Any) -> None:
        """Pass on a result or an exception. Any thread may call this."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: the caller is gone
            self._loop.call_soon_threadsafe(self._function, outcome)


class ThreadFuture(ThreadCallback, Generic[T]):
    """A future of the running event loop that another thread settles.

    Attributes:
        future: to await. Cancelling it does not stop the thread's work.
    """

    def __init__(self) -> None:
        super().__init__(self._settle)
        self.future: asyncio.Future[T] = self._loop.create_future()

    def _settle(self, outcome: Any) -> None:
        if self.future.done():
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class CallThread:
    """One thread that makes blocking calls, one after the other.

    It is not the thread of an executor: Python joins those at exit, and a call that hangs would
    keep the process from ending.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def put(self, call: Callable[[], None]) -> None:
        """Make a call later, which must not raise. Returns at once."""
        self._calls.put(call)

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(*args)` on the thread and return its result.

        Cancelling this does not stop the function.

        Raises:
            Exception: what the function raised.
        """
        outcome: ThreadFuture[T] = ThreadFuture()

        def work() -> None:
            try:
                result = function(*args)
            except BaseException as error:  # the caller gets it, whatever it is
                outcome.set(error)
            else:
                outcome.set(result)

        self.put(work)
        return await outcome.future

    def stop(self) -> None:
        """End the thread after the calls that are already queued. Does not wait for that."""
        self._calls.put(None)

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if call is None:
                return
            call()
            del call  # otherwise the last batch's buffers would live until the next call
