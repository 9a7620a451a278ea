"""Segments images through a running service, by the Python client. Knows no engines."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import math
import time
from collections.abc import Mapping, Sequence
from typing import cast

from app.cli.errors import CommandError
from app.cli.segment.results import ResultFiles, Work, read_image
from app.cli.segment.run import Report, Run, RunStopped
from app.cli.segment.sources import STANDARD, Target
from app.cli.segment.wording import describe_error, name_flags
from app.cli.service_errors import WRONG_KEY, describe_refusal
from app.errors import ServiceError
from app.imaging.decode import count_pages
from app.inference.image_group import ImageGroup
from app.inference.outputs import Output
from model.config import PreprocessConfig
from unet_client import (
    AsyncClient,
    ConnectionFailed,
    SegmentationError,
    SegmentationResult,
    SegmentQuery,
    UnetClientError,
)

_RECONNECT_S = 1.0
"""Pause before a request is sent again because the connection failed."""
_SHARED_STATUSES = (WRONG_KEY, 404)
"""The key is wrong, or the model does not exist: all images would fail."""

_OWN = {"model", "output", "page"}
"""Parameters of the service that are not options of the same name."""


@dataclasses.dataclass(frozen=True)
class Connection:
    """How to reach a service.

    Attributes:
        url: of the service.
        key: API key.
        model: name; None is the service's default.
        timeout: seconds for one image, including the time to wait while the service is busy.
        concurrency: images in flight.
    """

    url: str
    key: str | None
    model: str | None
    timeout: float
    concurrency: int


async def segment_remotely(
    connection: Connection,
    targets: Sequence[Target],
    work: Work,
    files: ResultFiles,
    report: Report,
) -> None:
    """Segment images, and add each to the report.

    Raises:
        CommandError: the service cannot be reached, or the model cannot do the work.
    """
    try:
        client = AsyncClient(connection.url, key=connection.key, timeout=connection.timeout)
    except ValueError as error:  # the URL, the key or the timeout
        raise CommandError(str(error)) from error
    async with client:
        try:
            _check_model(await client.models(), connection, work)
        except SegmentationError as error:
            raise CommandError(f"{error.status}: {_describe(error)}") from error
        except UnetClientError as error:
            raise CommandError(str(error)) from error
        segmenter = _RemoteSegmenter(client, connection, work, files)
        group = ImageGroup(connection.concurrency, math.inf)
        with contextlib.closing(Run(segmenter.segment, len(targets), report)) as run:
            await group.run(targets, run.process)


def _check_model(listing: Mapping[str, object], connection: Connection, work: Work) -> None:
    """Check that the model exists and can do the work, before the first image is sent.

    A model that is still loading is not checked: the service answers 503 until it is ready.

    Raises:
        CommandError: it does not exist, or cannot.
    """
    models = listing.get("models")
    if not isinstance(models, list):
        raise CommandError(f"{connection.url} did not list its models; is it unet-server?")
    name = connection.model or listing.get("default")
    names = [model["name"] for model in models]
    if name not in names:
        raise CommandError(f"{connection.url} has no model {name}; it has {', '.join(names)}")
    preprocessing = models[names.index(name)].get("preprocessing")
    if preprocessing is not None:
        try:
            work.options.check(PreprocessConfig.from_json(preprocessing))
        except ServiceError as error:
            raise CommandError(describe_error(error)) from error


class _RemoteSegmenter:
    def __init__(
        self, client: AsyncClient, connection: Connection, work: Work, files: ResultFiles
    ) -> None:
        self._client = client
        self._connection = connection
        self._work = work
        self._files = files

    async def segment(self, target: Target) -> bool:
        """Segment an image, or all pages of it, with one request. See `SegmentImage`."""
        data = await asyncio.to_thread(read_image, target.image)
        if self._work.all_pages and self._work.skip_existing:
            # The service has limits of its own.
            pages = await asyncio.to_thread(count_pages, data, max_pixels=2**63)
            if self._files.skip(target, pages):
                return False
        result = await self._request(target, data)
        failures = await asyncio.to_thread(self._write, target, result)
        if failures:
            raise CommandError("; ".join(failures))
        return True

    async def _request(self, target: Target, data: bytes) -> SegmentationResult:
        """Send an image; again while the service cannot be reached, as during a restart.

        Raises:
            CommandError: the image failed.
            RunStopped: all other images would fail as well.
        """
        end = time.monotonic() + self._connection.timeout
        while True:
            file = io.BytesIO(data)
            if target.image != STANDARD:
                file.name = target.image.name
            try:
                return await self._client.segment(file, **self._query())
            except ConnectionFailed as error:
                if time.monotonic() + _RECONNECT_S >= end:
                    raise RunStopped(str(error)) from error
                await asyncio.sleep(_RECONNECT_S)
            except SegmentationError as error:
                stopped = error.status in _SHARED_STATUSES
                raise (RunStopped if stopped else CommandError)(_describe(error)) from error
            except UnetClientError as error:
                raise CommandError(str(error)) from error

    def _query(self) -> SegmentQuery:
        """The parameters of the service, which are named like the options."""
        options = self._work.options
        query = {
            name: getattr(options, name) for name in SegmentQuery.__annotations__.keys() - _OWN
        }
        query["output"] = [str(output) for output in options.outputs]
        query["page"] = "all" if self._work.all_pages else options.page
        query["model"] = self._connection.model
        return cast(SegmentQuery, query)

    def _write(self, target: Target, result: SegmentationResult) -> list[str]:
        """Write the outputs of the file and of its pages. Returns the pages that failed."""
        failures = [
            f"page {page.number}: {_describe(page.error)}" for page in result.pages if page.error
        ]
        if target.file == STANDARD and len(result.pages) > 1:
            raise CommandError(
                f"it has {result.page_count} pages; their results need a folder, not --out -"
            )
        self._files.write(target, None, _by_output(result.outputs))
        if len(result.pages) > 1:
            for page in result.pages:
                self._files.write(target, page.number, _by_output(page.outputs))
        return failures


def _describe(error: SegmentationError) -> str:
    """The message of a service, with flags in place of parameters and headers."""
    return name_flags(describe_refusal(error))


def _by_output(outputs: Mapping[str, bytes]) -> dict[Output, bytes]:
    return {Output(name): content for name, content in outputs.items()}
