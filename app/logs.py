"""Logging: one line per request, as JSON for machines or as text for people. Knows no HTTP."""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that the current task works for; every line it logs shows the id."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line. The keys of `extra={"fields": {...}}` are added to it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identifier := request_id.get():
            line["request_id"] = identifier
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


_CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class TextFormatter(logging.Formatter):
    """Short lines for a terminal: time, level, message, request id.

    Control characters are escaped: a message is one line, and a client cannot send escape
    sequences to the terminal through the path of its request.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the base's name
        record.message = _CONTROL_CHARACTER.sub(_escape, record.message.rstrip())
        if identifier := request_id.get():
            record.message += f" [{identifier}]"
        return super().formatMessage(record)


def set_up(format: str, level: str) -> None:
    """Log everything to standard error.

    Args:
        format: "json" or "text".
        level: the least severe level that is logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Uvicorn's loggers use the handler above. Its access log stays off: the middleware logs more.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
