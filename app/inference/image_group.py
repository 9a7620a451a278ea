"""The images of one request: they run concurrently, and take the turns of one request.

So one client with many images fills the batches of a device, and its images are decoded and
rendered while others are computed, but other requests get as many turns as beside a single image.
Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from app.batching.reservation import Share
from app.inference.progress import ProgressLog

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class ImageGroup:
    """Runs the images of a request, a number of them at once.

    Args:
        concurrency: images at once; fewer where these are large.
        max_pixels: of the images at once. A single image may have more.

    Attributes:
        share: the turns of the request in the queue.
    """

    def __init__(self, concurrency: int, max_pixels: float) -> None:
        self.share = Share()
        self._concurrency = concurrency
        self._max_pixels = max_pixels
        self._pixels = 0
        self._freed = asyncio.Event()

    async def run(
        self, items: Sequence[ItemT], process: Callable[[ItemT], Awaitable[ResultT]]
    ) -> list[ResultT]:
        """Process items concurrently. Returns the results in the order of the items.

        The first exception, and a cancellation, cancels what runs.
        """
        if len(items) == 1:
            return [await process(items[0])]
        results: dict[int, ResultT] = {}
        remaining = enumerate(items)
        progress = ProgressLog(len(items), "images")

        async def work() -> None:
            for index, item in remaining:  # shared by all tasks
                results[index] = await process(item)
                progress.advance()

        await run_all(work() for _ in range(min(self._concurrency, len(items))))
        return [results[index] for index in range(len(items))]

    async def enter(self, pixels: int) -> None:
        """Wait until an image fits beside those that are in memory, and count it as one of them.

        Without this, large images of one request would use up the memory for pixels, and be
        rejected because of each other.
        """
        while self._pixels and self._pixels + pixels > self._max_pixels:
            self._freed.clear()
            await self._freed.wait()
        self._pixels += pixels

    def leave(self, pixels: int) -> None:
        """Undo `enter`."""
        self._pixels -= pixels
        self._freed.set()


async def run_all(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines concurrently until all have ended.

    Raises:
        Exception: the first that one of them raised; the others are cancelled.
    """
    try:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(call)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
