"""Logging: one line per request, as JSON for machines or as text for people. Knows no HTTP.

Lines go through a bounded queue to a thread that writes them. A log that is not read, for example
through a full pipe, stops that thread alone: requests are still answered, and the lines that do
not fit into the queue are dropped and counted.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

MAX_QUEUED_BYTES = 4_000_000
"""Lines that wait to be written; further ones are dropped."""
_MAX_LINE = 8_000
"""Bytes of one line that a library writes; the rest becomes the next line."""
_COLLECT_S = 0.02
"""Time in which lines are collected to be written together. Waking the thread for each line would
take as long as formatting it."""
_FLUSH_S = 1.0
"""Longest wait, at the end, for a log that is not read."""
_STDERR = 2

log = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that the current task works for; every line it logs shows the id."""
trace_ids: ContextVar[Mapping[str, str]] = ContextVar("trace_ids", default=MappingProxyType({}))
"""`trace_id` and `span_id` of that request, if it has a trace."""


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
        line |= trace_ids.get()
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


_CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class TextFormatter(logging.Formatter):
    """Short lines for a terminal: time, level, message, request id, trace id.

    Control characters are escaped: a message is one line, and a client cannot send escape
    sequences to the terminal through the path of its request.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the base's name
        record.message = _CONTROL_CHARACTER.sub(_escape, record.message.rstrip())
        if identifier := request_id.get():
            record.message += f" [{identifier}]"
        if ids := trace_ids.get():
            record.message += f" [trace {ids['trace_id']}]"
        return super().formatMessage(record)


class QueuedHandler(logging.Handler):
    """Writes lines to a file descriptor on a thread of its own, and never waits for it.

    Args:
        descriptor: that the lines are written to. It is not closed.
        max_bytes: of the lines that wait. A line that would exceed it is dropped.

    Attributes:
        dropped: number of lines dropped since the start.
    """

    def __init__(self, descriptor: int, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        super().__init__()
        self.dropped = 0
        self._descriptor = descriptor
        self._max_bytes = max_bytes
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._reported = 0
        self._changed = threading.Condition()
        # A daemon, so that a log that is not read cannot keep the process from ending.
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Formatted here, because the request's id belongs to the context of the caller.
            line = self.format(record).encode(errors="backslashreplace") + b"\n"
        except Exception:
            self.handleError(record)
            return
        with self._changed:
            if self._bytes + len(line) > self._max_bytes:
                self.dropped += 1
                return
            if not self._lines:  # otherwise the thread takes this line with those that wait
                self._changed.notify_all()
            self._lines.append(line)
            self._bytes += len(line)

    def wait_written(self, seconds: float) -> bool:
        """Wait until every line is written. Returns False if that takes longer than `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._bytes, seconds)

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._lines))
            time.sleep(_COLLECT_S)
            with self._changed:
                lines = b"".join(self._lines)
                self._lines.clear()
            self._write(lines)
            with self._changed:
                self._bytes -= len(lines)
                missing = self.dropped - self._reported
                self._reported = self.dropped
                self._changed.notify_all()
            if missing:
                self._write(self._describe_gap(missing))

    def _describe_gap(self, missing: int) -> bytes:
        message = "%d log lines were dropped, because the log was not read"
        record = log.makeRecord(__name__, logging.WARNING, "", 0, message, (missing,), None)
        return self.format(record).encode() + b"\n"

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:  # another process has made the pipe non-blocking
                time.sleep(0.05)
            except OSError:  # the reader is gone: a service continues without its log
                with self._changed:
                    self.dropped += line.count(b"\n")
                    self._reported += line.count(b"\n")
                return


_handler: QueuedHandler | None = None


def skip_origins() -> None:
    """Leave out of all records, for good, what no line shows: thread, process, place in the code.

    Finding these takes longer than the rest of a record (Python's logging HOWTO, "Optimization").
    """
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


def count_dropped_lines() -> int:
    """Count the lines that were not logged, because the log was not read."""
    return 0 if _handler is None else _handler.dropped


def flush(seconds: float = _FLUSH_S) -> None:
    """Wait until everything logged is written, for `seconds` at most."""
    if _handler is not None:
        _handler.wait_written(seconds)


@contextlib.contextmanager
def logging_to_stderr(format: str, level: str) -> Iterator[None]:
    """Log everything to standard error while the block runs, and nothing else to it.

    What libraries and the interpreter write to the file descriptor themselves becomes lines of the
    log. Standard error is as before when the block ends. A crash in native code is an exception:
    its report by `faulthandler` goes to standard error directly.

    Args:
        format: "json" or "text".
        level: the least severe level that is logged.
    """
    global _handler
    stderr = os.dup(_STDERR)
    handler = _handler = QueuedHandler(stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # Uvicorn's loggers use the handler above. Its access log stays off: the middleware logs more.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"
    threading.excepthook = _log_thread_exception
    if faulthandler.is_enabled():
        faulthandler.enable(stderr)
    reader, writer = os.pipe()
    os.dup2(writer, _STDERR)
    os.close(writer)
    forwarder = threading.Thread(target=_forward_lines, args=(reader,), name="stderr", daemon=True)
    forwarder.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, _STDERR)  # closes the pipe, unless a child process still has it
        forwarder.join(_FLUSH_S / 10)
        flush()
        logging.captureWarnings(False)
        threading.excepthook = threading.__excepthook__
        logging.getLogger().removeHandler(handler)


def _forward_lines(descriptor: int) -> None:
    """Log each line that arrives on a pipe, until its last writer closes it."""
    logger = logging.getLogger("stderr")
    rest = b""
    while data := os.read(descriptor, 65_536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            for start in range(0, len(line), _MAX_LINE):
                logger.warning("%s", line[start : start + _MAX_LINE].decode(errors="replace"))
        if len(rest) > _MAX_LINE:
            logger.warning("%s", rest.decode(errors="replace"))
            rest = b""
    if rest:
        logger.warning("%s", rest.decode(errors="replace"))
    os.close(descriptor)


def _log_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None:
        return
    name = args.thread.name if args.thread else "unknown"
    error = (args.exc_type, args.exc_value, args.exc_traceback)
    log.error("unhandled exception in thread %s", name, exc_info=error)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
