"""A client of the service, for Python programs and for measuring a running service.

with Client("http://localhost:8000") as client:
    mask = client.segment("cells.png").image()
    for path, answer in client.segment_many(Path("cells").glob("*.png")):
        ...
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import httpx
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from model.arrays import AnyArray

Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | AnyArray
"""An image as it may be given: its file, its bytes, or its pixels."""
P = TypeVar("P", bound=Picture)

_ALLOWED = (
    "an image is a path, its bytes, a file opened as binary, or an array: "
    "(H, W) of uint8 or uint16, or (H, W, 3) of uint8"
)
_BUSY = (429, 503)
_PAUSE, _SHORTEST_PAUSE = 1.0, 0.1
"""Seconds before another attempt: where the service does not say, and at least."""


class SegmentationFailed(ValueError):
    """The service answered with a problem document.

    Attributes:
        status: of the HTTP answer.
        detail: what was wrong and what would be right.
        request_id: to be found in the service's log.
    """

    def __init__(self, status: int, detail: str, request_id: str) -> None:
        super().__init__(status, detail, request_id)  # as which it is copied to other processes
        self.status = status
        self.detail = detail
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        content: a PNG; of `output="polygons"` the service's JSON.
        headers: that tell of it.
    """

    content: bytes
    headers: httpx.Headers

    @property
    def png(self) -> bytes:
        return self.content

    def image(self) -> AnyArray:
        """The decoded PNG: (H, W) uint8 for a mask, int32 or uint16 for 16-bit outputs.

        Raises:
            ValueError: polygons were asked for.
        """
        if self._is_json:
            raise ValueError("the answer is no image but outlines; .polygons() reads them")
        # Not Image.open: it distrusts images as large as the service takes.
        return np.asarray(PngImageFile(io.BytesIO(self.content)))

    def polygons(self) -> dict[str, Any]:
        """The GeoJSON FeatureCollection, in pixels from the upper left corner.

        Raises:
            ValueError: an image was asked for.
        """
        if not self._is_json:
            raise ValueError('the answer is an image; output="polygons" asks for outlines')
        (image,) = json.loads(self.content)["images"]
        return image["polygons"]  # type: ignore[no-any-return]

    @property
    def _is_json(self) -> bool:
        return str(self.headers.get("content-type")).startswith("application/json")

    @property
    def coverage(self) -> float:
        return float(self.headers["x-mask-coverage"])


class Client:
    """Speaks to one service; waits, as told, when it is busy. Threads may share one.

    Args:
        url: of the service.
        key: API key, if it asks for one.
        timeout: seconds for one image, all attempts together.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self._timeout = timeout

    def segment(self, image: Picture, **query: str | float) -> Answer:
        """Segment one image.

        Args:
            image: its path, its bytes, a file opened as binary, or its pixels: (H, W) uint8 or
                uint16, or (H, W, 3) uint8.
            query: model, threshold, output.

        Raises:
            SegmentationFailed: the service said no, or was busy until the timeout.
            httpx.TransportError: it did not answer in time, or not at all.
            TypeError: no such image can be sent.
            OSError: the file cannot be read.
        """
        data = encoded(image)
        deadline = time.monotonic() + self._timeout
        while True:
            status, headers, content = self._post(data, query, deadline)
            if status == 200:
                return Answer(content, headers)
            failure = _failure(status, headers, content)
            if status not in _BUSY:
                raise failure
            pause = _pause(headers)
            if time.monotonic() + pause >= deadline:
                late = f"the timeout of {self._timeout:g} s leaves no time for another attempt"
                raise SegmentationFailed(status, f"{failure.detail} ({late})", failure.request_id)
            time.sleep(pause)

    def segment_many(
        self, images: Iterable[P], *, workers: int = 3, **query: str | float
    ) -> Iterator[tuple[P, Answer | SegmentationFailed]]:
        """Segment images, `workers` at a time, which are taken from `images` as they are needed.

        Leaving the iteration early waits for those that are on their way.

        Yields:
            Each image as it was given, with its answer or why there is none, as they are ready.

        Raises:
            httpx.TransportError, TypeError, OSError: as `segment`; no more images are asked for.
        """
        waiting = iter(images)
        asked: dict[Future[Answer], P] = {}
        with ThreadPoolExecutor(workers) as pool:
            while True:
                for image in itertools.islice(waiting, workers - len(asked)):
                    asked[pool.submit(self.segment, image, **query)] = image
                if not asked:
                    return
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    image = asked.pop(future)
                    try:
                        outcome: Answer | SegmentationFailed = future.result()
                    except SegmentationFailed as error:
                        outcome = error
                    yield image, outcome

    def _post(
        self, data: bytes, query: dict[str, str | float], deadline: float
    ) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of the answer to one attempt.

        Args:
            deadline: on the monotonic clock.
        """
        left = max(0.001, deadline - time.monotonic())
        try:
            with self._http.stream(
                "POST",
                "/segment",
                content=data,
                params=query,
                headers={
                    "Content-Type": "application/octet-stream",
                    "X-Request-Timeout": f"{left:.3f}",
                },
                timeout=left,
            ) as response:
                content = b"".join(_in_time(response.iter_bytes(), deadline))
                return response.status_code, response.headers, content
        except httpx.TimeoutException as error:
            text = f"no answer within the timeout of {self._timeout:g} s"
            raise type(error)(text) from error

    def models(self) -> dict[str, Any]:
        """What is in service."""
        return self._get("/models")

    def model(self, name: str) -> dict[str, Any]:
        """One model: architecture, preprocessing, metrics, engine.

        Raises:
            SegmentationFailed: the service has no such model.
        """
        return self._get(f"/models/{name}")

    def _get(self, path: str) -> dict[str, Any]:
        response = self._http.get(path)
        if response.status_code != 200:
            raise _failure(response.status_code, response.headers, response.content)
        return response.json()  # type: ignore[no-any-return]

    def close(self) -> None:
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


def encoded(image: Picture) -> bytes:
    """What is sent of an image: its bytes as they are; of pixels a PNG, which loses nothing.

    Raises:
        TypeError: it is none of what `Picture` lists.
    """
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, np.ndarray):
        return _png(image)
    data = image.read() if hasattr(image, "read") else image
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"{_ALLOWED}; not {type(image).__name__}")
    return bytes(data)


def _png(pixels: AnyArray) -> bytes:
    native = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    kind = native.dtype.name, pixels.ndim, pixels.shape[2:]
    if kind == ("uint16", 3, (3,)):
        raise TypeError(f"{_ALLOWED}; colour of 16 bits cannot be sent as pixels, but as a file")
    allowed = (("uint8", 2, ()), ("uint16", 2, ()), ("uint8", 3, (3,)))
    if kind not in allowed or not pixels.size:
        raise TypeError(f"{_ALLOWED}; not {pixels.shape} of {pixels.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(native).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _in_time(chunks: Iterator[bytes], deadline: float) -> Iterator[bytes]:
    """httpx limits what each chunk may take; this, what all of them may."""
    for chunk in chunks:
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("")
        yield chunk


def _pause(headers: httpx.Headers) -> float:
    """Seconds until Retry-After, which is a number or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return max(_SHORTEST_PAUSE, float(value))
    try:
        return max(_SHORTEST_PAUSE, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return _PAUSE


def _failure(status: int, headers: httpx.Headers, content: bytes) -> SegmentationFailed:
    try:
        detail = str(json.loads(content)["detail"])
    except (ValueError, KeyError, TypeError):
        detail = content[:200].decode(errors="replace")
    return SegmentationFailed(status, detail, headers.get("x-request-id", ""))
