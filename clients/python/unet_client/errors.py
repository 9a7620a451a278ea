"""Errors that a call can raise.

UnetClientError
├── ConnectionFailed    no usable response: unreachable host, broken connection, unusable proxy
├── ResponseTimeout     no complete response within the timeout
└── SegmentationError   the service responded with an error

All of them can be pickled, so they can be raised in a worker process.
"""

from __future__ import annotations


class UnetClientError(Exception):
    """Base class of all errors below."""


class ConnectionFailed(UnetClientError):
    """The service cannot be reached, or the connection broke before the response was complete."""


class ResponseTimeout(UnetClientError):
    """The timeout of a call passed before its response was complete."""


class SegmentationError(UnetClientError):
    """The service responded with an error.

    Attributes:
        status: HTTP status code.
        detail: what was wrong and what would be right.
        request_id: identifies the request in the log of the service; empty if there is none.
    """

    def __init__(self, status: int, detail: str, request_id: str = "") -> None:
        super().__init__(status, detail, request_id)  # pickle calls the class with these arguments
        self.status = status
        self.detail = detail
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"
