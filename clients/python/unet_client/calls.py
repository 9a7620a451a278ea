"""The calls of both clients: requests, retries, deadlines and errors. Performs no I/O.

A call is a generator. It yields each attempt, receives the response of the attempt, and returns
the result of the call. `Client` and `AsyncClient` only send what it yields. What an attempt raises
is translated by `Calls.translate_errors`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeAlias, TypeVar

import httpcore
import httpx

from unet_client.errors import (
    ConnectionFailed,
    ResponseTimeout,
    SegmentationError,
    UnetClientError,
)
from unet_client.proxies import choose_proxy
from unet_client.query import encode_query
from unet_client.results import SegmentationResult, read_result

ResultT = TypeVar("ResultT")
Outcome: TypeAlias = SegmentationResult | UnetClientError | OSError

_RETRIED = (429, 503)
_DEFAULT_DELAY, _MIN_DELAY = 1.0, 0.1
"""Seconds before the next attempt: without Retry-After, and at least."""

_KEY = re.compile(r"[!-~]+")
"""Characters that a header carries unchanged (VCHAR of RFC 9110, section 5.5)."""
_TIMEOUTS = (TimeoutError, httpx.TimeoutException, httpcore.TimeoutException)
_FAILURES = (
    httpx.RequestError,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One request to send.

    Attributes:
        request: what to send.
        deadline: when its response must be complete, in seconds of `time.monotonic`.
        delay: seconds to wait before sending.
    """

    request: httpx.Request
    deadline: float
    delay: float


Call: TypeAlias = Generator[Attempt, httpx.Response, ResultT]


class Calls:
    """The calls to one service.

    Args:
        url: base URL of the service.
        key: API key.
        timeout: seconds for one call, including all attempts.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self._url = _parse_url(url)
        self._headers = {"User-Agent": "unet-client", "Accept": "*/*"}
        if key:
            self._headers["Authorization"] = f"Bearer {_check_key(key)}"
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        self._timeout = timeout
        self._choice = choose_proxy(self._url)

    @property
    def proxy(self) -> httpx.Proxy | None:
        """The proxy to send requests through."""
        return self._choice.proxy

    def segment(self, data: bytes, name: str, query: Mapping[str, Any]) -> Call[SegmentationResult]:
        """POST /segment with the bytes of one image.

        Args:
            name: of its file, which some outputs state; "" if it has none.
        """
        headers, content = _build_body(data, name)
        response = yield from self._exchange(
            "POST", "/segment", params=encode_query(query), headers=headers, content=content
        )
        return read_result(response.content, response.headers, query)

    def models(self) -> Call[dict[str, Any]]:
        """GET /models."""
        response = yield from self._exchange("GET", "/models")
        return _parse_json(response)

    def model(self, name: str) -> Call[dict[str, Any]]:
        """GET /models/{name}."""
        path = f"/models/{urllib.parse.quote(name, safe='')}"
        response = yield from self._exchange("GET", path)
        return _parse_json(response)

    @contextlib.contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Raise timeouts and transport errors as errors of this package.

        Raises:
            ResponseTimeout: instead of any timeout.
            ConnectionFailed: instead of any other transport error.
        """
        try:
            yield
        except _TIMEOUTS as error:
            raise ResponseTimeout(
                f"no response from {self._address} within the timeout of {self._timeout:g} s"
            ) from error
        except _FAILURES as error:
            cause = str(error) or type(error).__name__
            raise ConnectionFailed(f"cannot reach {self._address}: {cause}") from error

    def _exchange(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Sequence[str]] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Call[httpx.Response]:
        """Attempt a request until the service accepts it, fails it, or the timeout passes."""
        if self._choice.error:
            raise ConnectionFailed(
                f"cannot reach {self._address}: {self._choice.source} is not a usable proxy: "
                f"{self._choice.error}"
            )
        url = self._url.copy_with(path=self._url.path.rstrip("/") + path)
        deadline = time.monotonic() + self._timeout
        delay = 0.0
        while True:
            remaining = deadline - time.monotonic() - delay
            timeout_header = {"X-Request-Timeout": f"{max(0.001, remaining):.3f}"}
            request = httpx.Request(
                method,
                url,
                params=params,
                headers={
                    **self._headers,
                    **(headers or {}),
                    **timeout_header,
                    **_trace_headers(),
                },
                content=content,
            )
            response = yield Attempt(request, deadline, delay)
            if response.status_code == 200:
                return response
            error = _parse_error(response)
            if response.status_code not in _RETRIED:
                raise error
            delay = _parse_retry_after(response.headers.get("retry-after", ""))
            if time.monotonic() + delay >= deadline:
                too_late = f"the timeout of {self._timeout:g} s leaves no time for another attempt"
                raise SegmentationError(
                    error.status, f"{error.detail} ({too_late})", error.request_id
                )

    @property
    def _address(self) -> str:
        """The service in messages, without credentials of the URL."""
        address = f"{self._url.scheme}://{self._url.netloc.decode()}"
        proxy = self._choice.proxy
        if proxy is None:
            return address
        return f"{address} through {proxy.url.netloc.decode()} ({self._choice.source})"


def _trace_headers() -> dict[str, str]:
    """The trace context of the caller's span (W3C Trace Context), if it uses OpenTelemetry.

    A program that did not import OpenTelemetry has no span.
    """
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import propagate

        propagate.inject(headers)
    return headers


def _build_body(data: bytes, name: str) -> tuple[dict[str, str], bytes]:
    """Headers and body of a request: a form if the image has a name, otherwise its bytes."""
    if not name:
        return {"Content-Type": "application/octet-stream"}, data
    form = httpx.Request("POST", "http://form", files={"file": (name, data)})
    return {"Content-Type": form.headers["Content-Type"]}, form.read()


def outcome_of(result: Callable[[], SegmentationResult]) -> Outcome:
    """Return what `result` returns, or the error of the image that it raises."""
    try:
        return result()
    except (UnetClientError, OSError) as error:
        return error


def check_concurrency(concurrency: int) -> None:
    """Reject a number of concurrent requests below 1.

    Raises:
        ValueError: it is below 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")


def _parse_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"invalid server URL {url!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(
            f"invalid server URL {url!r}; expected, for example, http://localhost:8000"
        )
    return parsed


def _check_key(key: str) -> str:
    """Check that a header can carry a key, by the rule of the service. Errors do not repeat it."""
    if not _KEY.fullmatch(key):
        raise ValueError("the API key must be visible ASCII characters without spaces")
    return key


def _parse_retry_after(value: str) -> float:
    """Seconds until Retry-After, a number or a date (RFC 9110, section 10.2.3)."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return max(_MIN_DELAY, float(value))
    try:
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return _DEFAULT_DELAY
    return max(_MIN_DELAY, seconds)


def _parse_error(response: httpx.Response) -> SegmentationError:
    """Read a problem document (RFC 9457), or the beginning of any other body."""
    try:
        detail = str(json.loads(response.content)["detail"])
    except (ValueError, KeyError, TypeError):
        detail = response.content[:200].decode(errors="replace").strip()
    detail = detail or response.reason_phrase
    request_id = response.headers.get("x-request-id", "")
    return SegmentationError(response.status_code, detail, request_id)


def _parse_json(response: httpx.Response) -> dict[str, Any]:
    try:
        document = json.loads(response.content)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise SegmentationError(
            response.status_code,
            f"{response.request.url} did not respond with JSON; is it unet-server?",
        )
    return document
