"""The probabilities of an image's windows -> those of the image, in a shared block.

Knows arrays and futures; no queue and no engines.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import ExitStack

import numpy as np

from app.imaging.workers.shared import StoredArray
from app.inference.blocks import Blocks
from app.inference.job import ImageJob
from app.inference.progress import ProgressLog
from model.arrays import Probabilities
from model.windows import Stitcher, WindowPlan

_QUICK_BLEND = 1 << 18
"""Bytes of a window that the event loop blends itself. Blending takes several times as long as
copying."""


class WindowBlender:
    """Blends windows as they are computed: small ones on the event loop, others on a thread.

    Args:
        blocks: hands out the block of the result, and blends large windows on its threads.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    async def blend(
        self,
        job: ImageJob,
        plan: WindowPlan,
        futures: deque[asyncio.Future[Probabilities]],
        held: ExitStack,
    ) -> StoredArray:
        """Blend the probabilities of the windows into a block, which `held` frees.

        Those of a single window keep their type; see `Probabilities`.

        Args:
            futures: one per window of the plan, in their order.
        """
        probabilities = await futures.popleft()
        job.timer.restart()
        shape = (job.channels, plan.rows.length, plan.columns.length)
        block = held.enter_context(self._blocks.borrow())
        if plan.count == 1:  # stored as the engine returned it
            part = probabilities[: shape[0], : shape[1], : shape[2]]
            stored = StoredArray(block, shape, part.dtype.str)
            # Mapped, because the block keeps its mapping: copying takes half as long as writing.
            await self._blocks.copy(part.nbytes, np.copyto, stored.map(), part)
            return stored
        stored = StoredArray(block, shape, "<f4")
        blended = None
        if stored.is_large:  # it is blended in shared memory; a small one is copied there
            block.clear()
            blended = stored.map()
        stitcher = Stitcher(plan, job.channels, blended)
        progress = ProgressLog(plan.count, "windows")
        for window in plan.windows:
            job.timer.restart()
            is_quick = probabilities.nbytes <= _QUICK_BLEND
            await self._blocks.call(is_quick, stitcher.add, window, probabilities)
            progress.advance()
            if futures:
                probabilities = await futures.popleft()
        if blended is None:
            await self._blocks.copy(stored.nbytes, block.store, stitcher.result())
        return stored
