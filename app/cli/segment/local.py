"""Segments images with the service's pipeline in this process. Knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

from app.batching.deadline import Deadline
from app.cli.errors import CommandError
from app.cli.segment.results import ResultFiles, Work, read_image
from app.cli.segment.run import Report, Run
from app.cli.segment.sources import STANDARD, Target
from app.cli.segment.wording import describe_error
from app.errors import ServiceError
from app.inference.image_group import ImageGroup
from app.inference.outputs import Options, Output, Segmentation
from app.inference.registry import ServedModel
from app.inference.service import Service
from app.settings import Settings


async def segment_locally(
    settings: Settings, targets: Sequence[Target], work: Work, files: ResultFiles, report: Report
) -> None:
    """Segment images, and add each to the report.

    Raises:
        UserError: the model or the engine cannot be used, or the model cannot do the work.
    """
    async with open_segmenter(settings, work) as segmenter:

        async def segment(target: Target) -> bool:
            return await segmenter.segment(target, files)

        with contextlib.closing(Run(segment, len(targets), report)) as run:
            await segmenter.group.run(targets, run.process)


@contextlib.asynccontextmanager
async def open_segmenter(settings: Settings, work: Work) -> AsyncIterator[LocalSegmenter]:
    """Start the engine, and stop it when the block ends.

    Raises:
        UserError: the model or the engine cannot be used, or the model cannot do the work.
    """
    service = Service(settings)
    try:
        await _start(service)
        with service.registry.lease(None) as model:
            _check(service, model, work.options)
            yield LocalSegmenter(service, model, service.segmenter.group(model), work)
    finally:
        # Python aborts if it exits while the engine computes.
        while service.batcher.elapsed():  # noqa: ASYNC110 (the batcher has no event for it)
            await asyncio.sleep(0.01)
        await service.stop()


async def _start(service: Service) -> None:
    try:
        await service.start_without_probes()
    except ServiceError as error:
        raise CommandError(f"the model cannot be used: {error}") from error


def _check(service: Service, model: ServedModel, options: Options) -> None:
    """Check that the model can do what is asked for, before the first image."""
    try:
        service.segmenter.check(model, options)
    except ServiceError as error:
        raise CommandError(describe_error(error)) from error


class LocalSegmenter:
    """Segments image files with a service in this process.

    Attributes:
        service: that computes.
        group: in which the images should run.
    """

    def __init__(self, service: Service, model: ServedModel, group: ImageGroup, work: Work) -> None:
        self.service = service
        self.group = group
        self._model = model
        self._work = work

    async def segment(self, target: Target, files: ResultFiles) -> bool:
        """Segment an image, or each page of it, and write its results. See `SegmentImage`."""
        data = await asyncio.to_thread(read_image, target.image)
        if not self._work.all_pages:
            await self._segment_only_page(target, data, self._work.options.page, files)
            return True
        pages = await self.service.segmenter.reader.count_pages(data)
        if files.skip(target, pages):
            return False
        if pages == 1:
            await self._segment_only_page(target, data, 0, files)
        else:
            await self._segment_pages(target, data, pages, files)
        return True

    async def _segment_only_page(
        self, target: Target, data: bytes, page: int | None, files: ResultFiles
    ) -> None:
        result = await self._run(target, data, page)
        await _write(files, target, None, result, self._work.options.outputs)

    async def _segment_pages(
        self, target: Target, data: bytes, pages: int, files: ResultFiles
    ) -> None:
        """Segment each page once, for its own outputs and for stacks.

        Raises:
            CommandError: pages failed; the others have results, but are not joined.
        """
        if self._work.by_page and target.file == STANDARD:
            raise CommandError(f"it has {pages} pages; their results need a folder, not --out -")
        done: list[Segmentation] = []
        failures = []
        for page in range(pages):
            if not self._work.stacked and files.skip_page(target, page):
                continue
            try:
                result = await self._run(target, data, page)
                await _write(files, target, page, result, self._work.by_page)
                done.append(_keep(result, self._work.stacked))
            except ServiceError as error:
                failures.append(f"page {page}: {describe_error(error)}")
                if not self._work.by_page:
                    break
        if failures:
            others = f" (and {len(failures) - 1} other pages)" if len(failures) > 1 else ""
            raise CommandError(failures[0] + others)
        await self._write_stacks(target, done, files)

    async def _write_stacks(
        self, target: Target, pages: Sequence[Segmentation], files: ResultFiles
    ) -> None:
        pixels = sum(page.width * page.height for page in pages)
        for output in self._work.stacked:
            contents = [page.rendered[output].content for page in pages]
            stack = await self.service.segmenter.stack_tiffs(contents, pixels, Deadline.never())
            await asyncio.to_thread(files.write, target, None, {output: stack})

    async def _run(self, target: Target, data: bytes, page: int | None) -> Segmentation:
        name = "image" if target.image == STANDARD else target.image.name
        options = dataclasses.replace(self._work.options, name=name, page=page)
        return await self.service.segmenter.segment(
            self._model, data, options, Deadline.never(), self.group
        )


async def _write(
    files: ResultFiles,
    target: Target,
    page: int | None,
    result: Segmentation,
    outputs: Sequence[Output],
) -> None:
    contents = {output: result.rendered[output].content for output in outputs}
    await asyncio.to_thread(files.write, target, page, contents)


def _keep(result: Segmentation, outputs: Sequence[Output]) -> Segmentation:
    """The result with these outputs alone, so that the others are freed."""
    rendered = {output: result.rendered[output] for output in outputs}
    return dataclasses.replace(result, rendered=rendered)
