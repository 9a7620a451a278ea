"""The asyncio client."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from unet_client.calls import (
    Attempt,
    Call,
    Calls,
    Outcome,
    ResultT,
    check_concurrency,
    outcome_of,
)
from unet_client.images import ImageInput, encode_image, name_image
from unet_client.query import SegmentQuery
from unet_client.results import SegmentationResult

ImageT = TypeVar("ImageT", bound=ImageInput)


class AsyncClient:
    """Client of one service for asyncio, with the methods of `Client`.

    Create and use it within one event loop. Tasks may share it. A cancelled call closes its
    connection, at which the service drops the request.

    Args:
        url: as for `Client`.
        key: as for `Client`.
        timeout: as for `Client`.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60) -> None:
        self._calls = Calls(url, key, timeout)
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(proxy=self._calls.proxy, limits=unlimited),
            timeout=None,  # `_send` bounds the whole exchange
        )

    async def segment(self, image: ImageInput, **query: Unpack[SegmentQuery]) -> SegmentationResult:
        """Segment one image. Arguments and errors are those of `Client.segment`.

        Files are read, and arrays encoded, on another thread.
        """
        data = await asyncio.to_thread(encode_image, image)
        return await self._run(self._calls.segment(data, name_image(image), query))

    async def segment_many(
        self, images: Iterable[ImageT], *, concurrency: int = 3, **query: Unpack[SegmentQuery]
    ) -> AsyncGenerator[tuple[ImageT, Outcome], None]:
        """Segment images concurrently. Arguments, results and errors are those of
        `Client.segment_many`.

        Closing the iterator early cancels the requests in flight. Use `contextlib.aclosing` to
        close it when leaving the loop.
        """
        check_concurrency(concurrency)
        remaining = iter(images)
        pending: dict[asyncio.Task[SegmentationResult], ImageT] = {}
        try:
            while True:
                for image in itertools.islice(remaining, concurrency - len(pending)):
                    pending[asyncio.create_task(self.segment(image, **query))] = image
                if not pending:
                    return
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield pending.pop(task), outcome_of(task.result)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def models(self) -> dict[str, Any]:
        """Return the models of the service. Errors are those of `Client.models`."""
        return await self._run(self._calls.models())

    async def model(self, name: str) -> dict[str, Any]:
        """Return one model. Errors are those of `Client.model`."""
        return await self._run(self._calls.model(name))

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, call: Call[ResultT]) -> ResultT:
        try:
            attempt = next(call)
            while True:
                await asyncio.sleep(attempt.delay)
                attempt = call.send(await self._send(attempt))
        except StopIteration as stop:
            result: ResultT = stop.value
            return result

    async def _send(self, attempt: Attempt) -> httpx.Response:
        with self._calls.translate_errors():
            async with asyncio.timeout(attempt.deadline - time.monotonic()):
                return await self._http.send(attempt.request)
