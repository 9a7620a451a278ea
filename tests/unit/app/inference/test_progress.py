"""Lines in the log about requests that take long."""

from __future__ import annotations

import logging

import pytest

from app.inference import progress
from app.inference.progress import ProgressLog


class Clock:
    """Time that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def run(clock: Clock, parts: int, seconds: float) -> None:
    """Do parts that take so many seconds each."""
    log = ProgressLog(parts, "windows")
    for _ in range(parts):
        clock.now += seconds
        log.advance()


def test_long_work_is_logged_at_intervals(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(clock, 10, 3.0)
    assert caplog.messages == [
        "4 of 10 windows done after 12 s, about 18 s left",
        "8 of 10 windows done after 24 s, about 6 s left",
    ]


def test_short_work_and_the_last_part_are_not_logged(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(clock, 100, 0.09)
        run(clock, 1, 60.0)
    assert caplog.messages == []
