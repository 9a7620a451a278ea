"""An actor of Ray Data that segments images: one engine and its image workers in a process of the
cluster. Knows no Ray; `ray_driver.py` creates it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from app.cli.errors import CommandError
from app.cli.segment.folder import Folder
from app.cli.segment.local import open_segmenter
from app.cli.segment.results import ResultFiles, Work
from app.cli.segment.sources import Target
from app.cli.segment.storage import parse_location
from app.cli.segment.wording import describe_error
from app.errors import ServiceError
from app.settings import Settings

log = logging.getLogger(__name__)

WRITTEN, SKIPPED, FAILED = "written", "skipped", "failed"
"""Outcomes of an image."""
ONLY_PAGE = -1
"""Stands for the only page of an image."""
_ENGINE_FAILED = 70
"""Exit status after an engine failure, as of `unet serve`."""
_CHECK_SECONDS = 1.0

ResultT = TypeVar("ResultT")


class SegmentActor:
    """Segments the images of a table. Several threads may call it at once: while the last images of
    one table are rendered, the engine computes those of the next.

    Args:
        settings: of the engine.
        source, out: the folder of the images and that of the results, as paths or addresses.
        keep_suffix: as for `Folder`.

    Raises:
        UserError: the model or the engine cannot be used on this machine.
    """

    def __init__(
        self, settings: Settings, work: Work, source: str, out: str, keep_suffix: bool
    ) -> None:
        self._work = work
        self._folder = Folder(parse_location(source), parse_location(out), keep_suffix)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="segment", daemon=True).start()
        self._opened = contextlib.AsyncExitStack()  # Ray ends the process without closing it
        opening = self._opened.enter_async_context(open_segmenter(settings, work))
        self._segmenter = self._run(opening)
        asyncio.run_coroutine_threadsafe(self._exit_on_engine_failure(), self._loop)

    def __call__(self, names: pa.Table) -> pa.Table:
        """Segment images, and write their results.

        Args:
            names: column "name" with the names of images, relative to the folder, as bytes.

        Returns:
            For each image: name, outcome, reason of a failure, and the pages with measurements.
        """
        targets = [self._folder.target(os.fsdecode(name.as_py())) for name in names["name"]]
        files = ResultFiles(self._work, targets)
        outcomes = self._run(self._segment_all(targets, files))
        measured = [
            [ONLY_PAGE if page is None else page for page in files.measured_pages(target)]
            for target in targets
        ]
        return pa.table(
            {
                "name": names["name"],
                "outcome": pa.array([outcome for outcome, _ in outcomes], pa.string()),
                "reason": pa.array([reason for _, reason in outcomes], pa.string()),
                "measured": pa.array(measured, pa.list_(pa.int64())),
            }
        )

    async def _segment_all(
        self, targets: Sequence[Target], files: ResultFiles
    ) -> list[tuple[str, str]]:
        async def segment(target: Target) -> tuple[str, str]:
            try:
                return await self._segment(target, files), ""
            except ServiceError as error:
                return FAILED, describe_error(error)
            except CommandError as error:
                return FAILED, str(error)

        return await self._segmenter.group.run(targets, segment)

    async def _segment(self, target: Target, files: ResultFiles) -> str:
        # The driver leaves out what was done before. What is done now, another actor did before it
        # died: Ray has given its images to this one.
        if not self._work.all_pages and await asyncio.to_thread(files.skip, target):
            return WRITTEN
        return WRITTEN if await self._segmenter.segment(target, files) else SKIPPED

    def _run(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _exit_on_engine_failure(self) -> None:
        """End the process when the engine hangs or its device is lost: Ray starts another one, and
        gives the images to it."""
        while (error := self._segmenter.service.liveness_error()) is None:  # noqa: ASYNC110
            await asyncio.sleep(_CHECK_SECONDS)
        log.critical("exiting: %s", error)
        os._exit(_ENGINE_FAILED)
