"""The blocking client."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
from unet_client.transport import DEADLINE, DeadlineTransport

ImageT = TypeVar("ImageT", bound=ImageInput)


class Client:
    """Client of one service. Threads may share it.

    When the service is busy (429, 503), a call waits as long as `Retry-After` says and tries again
    until its timeout.

    Args:
        url: base URL of the service, for example http://localhost:8000. Loopback addresses are
            reached directly, others through the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY
            unless NO_PROXY lists them.
        key: API key.
        timeout: seconds for one call, including all attempts and the whole response.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60) -> None:
        self._calls = Calls(url, key, timeout)
        self._http = httpx.Client(transport=DeadlineTransport(self._calls.proxy))

    def segment(self, image: ImageInput, **query: Unpack[SegmentQuery]) -> SegmentationResult:
        """Segment one image.

        Args:
            image: a path, the bytes of a file, a binary file object, or an array: (H, W) of uint8
                or uint16, or (H, W, 3) of uint8.
            query: parameters of POST /segment: see `SegmentQuery`.

        Raises:
            SegmentationError: the service responded with an error, or was busy until the timeout.
            ResponseTimeout: no complete response within the timeout.
            ConnectionFailed: the service cannot be reached, or the connection broke.
            TypeError: the image is not an `ImageInput`.
            ValueError: a parameter cannot be encoded.
            OSError: the file cannot be read.
            RuntimeError: the client is closed.
        """
        return self._run(self._calls.segment(encode_image(image), name_image(image), query))

    def segment_many(
        self, images: Iterable[ImageT], *, concurrency: int = 3, **query: Unpack[SegmentQuery]
    ) -> Generator[tuple[ImageT, Outcome], None, None]:
        """Segment images concurrently.

        Images are taken from `images` only when a request can start. Closing the iterator early
        waits for the requests in flight.

        Args:
            images: as for `segment`.
            concurrency: number of requests in flight.
            query: as for `segment`.

        Yields:
            Each image with its result, or with its error (`UnetClientError` or `OSError`), in the
            order of completion.

        Raises:
            TypeError: an image is not an `ImageInput`.
            ValueError: `concurrency` is below 1.
            RuntimeError: the client is closed.
        """
        check_concurrency(concurrency)
        remaining = iter(images)
        pending: dict[Future[SegmentationResult], ImageT] = {}
        with ThreadPoolExecutor(concurrency) as pool:
            while True:
                for image in itertools.islice(remaining, concurrency - len(pending)):
                    pending[pool.submit(self.segment, image, **query)] = image
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), outcome_of(future.result)

    def models(self) -> dict[str, Any]:
        """Return the models of the service.

        Raises:
            UnetClientError, RuntimeError: as for `segment`.
        """
        return self._run(self._calls.models())

    def model(self, name: str) -> dict[str, Any]:
        """Return one model: architecture, preprocessing, metrics and engine.

        Raises:
            SegmentationError: the service has no model of this name (status 404), or responded with
                another error.
            ResponseTimeout, ConnectionFailed, RuntimeError: as for `segment`.
        """
        return self._run(self._calls.model(name))

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, call: Call[ResultT]) -> ResultT:
        try:
            attempt = next(call)
            while True:
                time.sleep(attempt.delay)
                attempt = call.send(self._send(attempt))
        except StopIteration as stop:
            result: ResultT = stop.value
            return result

    def _send(self, attempt: Attempt) -> httpx.Response:
        attempt.request.extensions[DEADLINE] = attempt.deadline
        with self._calls.translate_errors():
            return self._http.send(attempt.request)
