"""The two log formats, the queue to the thread that writes, and what libraries write."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from app import logs
from tests.conftest import ROOT


def record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.INFO, "", 0, message, args, None)
    made.fields = fields
    return made


@pytest.fixture
def request_id() -> Iterator[str]:
    token = logs.request_id.set("abc-1")
    yield "abc-1"
    logs.request_id.reset(token)


def test_text_message_is_one_line_without_control_characters() -> None:
    line = logs.TextFormatter().format(record("GET %s", "/\n00:00 ERROR \x1b[2J\x9b"))
    assert len(line.splitlines()) == 1
    assert not {"\x1b", "\x9b"} & set(line)
    assert "\\n00:00 ERROR \\x1b" in line


def test_text_line_shows_the_request_id(request_id: str) -> None:
    assert logs.TextFormatter().format(record("GET /")).endswith(f"GET / [{request_id}]")


def test_text_line_outside_a_request_has_no_id() -> None:
    assert logs.TextFormatter().format(record("ready")).endswith("ready")


def test_json_line_has_id_and_fields(request_id: str) -> None:
    line = json.loads(logs.JsonFormatter().format(record("GET /", status=200)))
    assert (line["request_id"], line["status"], line["level"]) == (request_id, 200, "info")


@pytest.fixture
def trace_ids() -> Iterator[dict[str, str]]:
    ids = {"trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "b7ad6b7169203331"}
    token = logs.trace_ids.set(ids)
    yield ids
    logs.trace_ids.reset(token)


def test_json_line_has_the_ids_of_the_trace(trace_ids: dict[str, str]) -> None:
    line = json.loads(logs.JsonFormatter().format(record("GET /")))
    assert {name: line[name] for name in trace_ids} == trace_ids


def test_text_line_shows_the_trace_id(request_id: str, trace_ids: dict[str, str]) -> None:
    line = logs.TextFormatter().format(record("GET /"))
    assert line.endswith(f"GET / [{request_id}] [trace {trace_ids['trace_id']}]")


def test_log_that_is_not_read_drops_lines_and_delays_no_caller() -> None:
    reader, writer = os.pipe()  # holds 64 KiB on Linux
    handler = logs.QueuedHandler(writer, max_bytes=100_000)
    started = time.monotonic()
    for number in range(2000):
        handler.emit(record("%d %s", number, "x" * 200))
    assert time.monotonic() - started < 2
    assert not handler.wait_written(0.05)
    dropped = handler.dropped
    assert 0 < dropped < 2000
    os.set_blocking(reader, False)
    received = b""
    while b"were dropped" not in received or not handler.wait_written(0):
        time.sleep(0.01)
        with contextlib.suppress(BlockingIOError):
            received += os.read(reader, 1_000_000)
    with contextlib.suppress(BlockingIOError):
        received += os.read(reader, 1_000_000)
    lines = received.decode().splitlines()
    gaps = [int(line.split()[0]) for line in lines if "were dropped" in line]
    assert sum(gaps) == dropped
    assert len(lines) - len(gaps) + dropped == 2000


def test_lines_are_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waking the thread for each line would take as long as formatting it."""
    written: list[bytes] = []
    reader, writer = os.pipe()
    handler = logs.QueuedHandler(writer)
    monkeypatch.setattr(logs, "_COLLECT_S", 0.5)
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(bytes(data)) or len(data))
    for number in range(10):
        handler.emit(record("line %d", number))
    assert handler.wait_written(20)
    monkeypatch.undo()
    os.close(reader)
    assert len(written) == 1
    assert [line.split()[-1] for line in written[0].splitlines()] == [
        b"%d" % number for number in range(10)
    ]


def test_log_whose_reader_is_gone_counts_the_lines() -> None:
    reader, writer = os.pipe()
    handler = logs.QueuedHandler(writer)
    os.close(reader)
    handler.emit(record("lost"))
    assert handler.wait_written(5)
    assert handler.dropped == 1


def test_json_log_contains_nothing_else() -> None:
    """Whatever writes to the descriptor, or leaves a thread or a warning unhandled."""
    program = r"""
import os, threading, warnings
from app import logs
with logs.logging_to_stderr("json", "info"):
    os.write(2, b"libtiff: \x1b[2J bad\nsecond line\nno newline")
    print("print", file=__import__("sys").stderr)
    warnings.warn("careful")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
os.write(2, b"as before\n")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    *lines, last = result.stderr.splitlines()
    assert last == "as before"
    messages = [json.loads(line)["message"] for line in lines]
    assert {"libtiff: \x1b[2J bad", "second line", "no newlineprint"} <= set(messages)
    assert any("careful" in message for message in messages)
    assert any("ZeroDivisionError" in line for line in lines)
