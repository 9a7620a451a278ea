"""A thread for blocking calls that an event loop awaits."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class CallThread:
    """One thread that makes blocking calls, one after the other.

    Every call runs on the same thread, because OpenMP pools and CUDA contexts belong to a thread.
    It is not the thread of an executor: Python joins those at exit, and a hung device would keep
    the process from ending.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(*args)` on the thread and return its result.

        Cancelling this does not stop the function.

        Raises:
            Exception: what the function raised.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
            if not future.done():
                set_outcome(outcome)

        def work() -> None:
            outcome: tuple[Callable[[Any], None], Any]
            try:
                outcome = future.set_result, function(*args)
            except BaseException as error:  # the caller gets it, whatever it is
                outcome = future.set_exception, error
            with contextlib.suppress(RuntimeError):  # the loop was closed: the caller is gone
                loop.call_soon_threadsafe(settle, *outcome)

        self._calls.put(work)
        return await future

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
