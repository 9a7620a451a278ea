"""A thread for blocking calls, awaited from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class CallThread:
    """One thread that makes blocking calls, in their order.

    Always the same one, because OpenMP pools and CUDA contexts belong to a thread. And not an
    executor's, because those are joined when the process ends: a hung device would keep it from
    ending.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` on the thread; cancelling the wait does not stop the call."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
            if not future.done():
                set_outcome(outcome)

        def work() -> None:
            outcome: tuple[Callable[[Any], None], Any]
            try:
                outcome = future.set_result, function(*args)
            except BaseException as error:  # it belongs to whoever awaits the call
                outcome = future.set_exception, error
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(settle, *outcome)

        self._calls.put(work)
        return await future

    def end(self) -> None:
        """Let the thread go once it has made the calls it was given."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # or the last batch's buffers would live until the next
