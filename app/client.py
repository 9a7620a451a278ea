"""A client of the service, for Python programs and for measuring a running service.

with Client("http://localhost:8000") as client:
    mask = client.segment(Path("cells.png")).image()
"""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

_PATIENCE = 10
"""Attempts at a busy service before its answer is passed on."""


class SegmentationFailed(ValueError):
    """The service answered with a problem document.

    Attributes:
        status: of the HTTP answer.
        request_id: to be found in the service's log.
    """

    def __init__(self, status: int, detail: str, request_id: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.request_id = request_id


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back: the PNG and the headers that tell of it."""

    png: bytes
    headers: httpx.Headers

    def image(self) -> npt.NDArray[Any]:
        """The decoded PNG: (H, W) uint8 for a mask, int32 or uint16 for 16-bit outputs."""
        return np.asarray(Image.open(io.BytesIO(self.png)))

    @property
    def coverage(self) -> float:
        return float(self.headers["x-mask-coverage"])


class Client:
    """Speaks to one service; waits, as told, when it is busy.

    Args:
        url: of the service.
        key: API key, if it asks for one.
        timeout: seconds for one image.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def segment(self, image: bytes | Path, **query: str | float) -> Answer:
        """Segment one encoded image.

        Args:
            image: its bytes or its file.
            query: model, threshold, output.

        Raises:
            SegmentationFailed: the service said no.
            httpx.TransportError: it did not answer.
        """
        data = image if isinstance(image, bytes) else image.read_bytes()
        for attempt in range(_PATIENCE):
            response = self._http.post(
                "/segment",
                content=data,
                params=query,
                headers={"Content-Type": "application/octet-stream"},
            )
            if response.status_code not in (429, 503) or attempt == _PATIENCE - 1:
                break
            time.sleep(float(response.headers.get("retry-after", 1)))
        if response.status_code != 200:
            raise _failure(response)
        return Answer(response.content, response.headers)

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
            raise _failure(response)
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


def _failure(response: httpx.Response) -> SegmentationFailed:
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = response.text[:200]
    return SegmentationFailed(
        response.status_code, detail, response.headers.get("x-request-id", "")
    )
