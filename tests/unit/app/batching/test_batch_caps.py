"""Batch limits after a lack of memory: how they fall, and when they rise again."""

from __future__ import annotations

import pytest

from app.batching.batch_caps import BatchCaps


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_limit_is_halved_down_to_what_fits(clock: Clock) -> None:
    caps = BatchCaps(clock)
    assert caps.limit("k") is None
    for failed, limit in ((8, 4), (4, 2), (3, 1)):
        caps.lower("k", failed)
        assert caps.limit("k") == limit
    assert caps.limit("other") is None


def test_limit_is_raised_step_by_step_and_then_removed(clock: Clock) -> None:
    caps = BatchCaps(clock)
    caps.lower("k", 8)
    caps.lower("k", 4)
    caps.record_success("k", 2)
    assert caps.limit("k") == 2  # it is too early
    for limit in (4, None):
        clock.now += 10
        caps.record_success("k", 2)
        assert caps.limit("k") == limit
    caps.record_success("k", 8)
    caps.lower("k", 8)
    assert caps.limit("k") == 4  # as at the first time


def test_limit_is_raised_more_and_more_rarely_while_memory_is_short(clock: Clock) -> None:
    caps = BatchCaps(clock)
    caps.lower("k", 8)
    waits = []
    for _ in range(9):
        start = clock.now
        while caps.limit("k") is not None:
            clock.now += 1
            caps.record_success("k", 4)
        waits.append(clock.now - start)
        caps.lower("k", 8)
    assert waits == [10, 20, 40, 80, 160, 320, 600, 600, 600]


def test_forgotten_keys_have_no_limit(clock: Clock) -> None:
    caps = BatchCaps(clock)
    for key in ("gone", "stays"):
        caps.lower(key, 8)
    caps.forget(lambda key: key == "gone")
    assert (caps.limit("gone"), caps.limit("stays")) == (None, 4)
