"""The two log formats."""

from __future__ import annotations

import json
import logging

import pytest

from app import logs


def record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.INFO, "", 0, message, args, None)
    made.fields = fields
    return made


@pytest.fixture
def request_id() -> str:
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
