"""Files, pixels and probabilities on their way to image workers and back, in shared memory.

A copy that takes long is made on a thread, so that the event loop does not wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from app.imaging.workers.shared import BlockCache, SharedBlock, StoredArray
from app.inference.steps import EncodedImage
from model.arrays import AnyArray

T = TypeVar("T")

_QUICK_COPY = 1 << 21
"""Bytes that the event loop copies itself: it takes less time than a change of thread."""


class Blocks:
    """Shared blocks, and copies to and from them.

    Args:
        pool: threads for what takes long.
    """

    def __init__(self, pool: Executor) -> None:
        self._cache = BlockCache()
        self._pool = pool

    def borrow(self) -> AbstractContextManager[SharedBlock]:
        """A block with any content. See `BlockCache.borrow`."""
        return self._cache.borrow()

    def close(self) -> None:
        """Free the memory that is kept for reuse. It is not used after this."""
        self._cache.close()

    async def share(
        self, source: bytes | AnyArray, block: SharedBlock
    ) -> EncodedImage | StoredArray:
        """Copy an encoded image, or pixels, to a block."""
        if isinstance(source, bytes):
            await self.copy(len(source), block.write, source)
            return EncodedImage(block, len(source))
        return await self.copy(source.nbytes, block.store, source)

    async def load(self, stored: StoredArray) -> AnyArray:
        """Copy an array from its block, or map a large one."""
        return await self.copy(stored.nbytes, stored.load)

    async def copy(self, size: int, function: Callable[..., T], *args: Any) -> T:
        """Call a function that copies `size` bytes: on a thread if that takes long."""
        return await self.call(size <= _QUICK_COPY, function, *args)

    async def call(self, is_quick: bool, function: Callable[..., T], *args: Any) -> T:
        """Call a function: on a thread unless it is quick."""
        if is_quick:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
