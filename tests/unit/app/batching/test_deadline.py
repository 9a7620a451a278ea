"""Deadlines: how they compare, what remains, and what happens when they pass."""

from __future__ import annotations

import asyncio
import math

import pytest

from app.batching.deadline import Deadline, describe_lateness
from app.errors import DeadlineExceeded


def test_remaining_counts_down_and_turns_negative() -> None:
    assert 9 < Deadline.after(10).remaining() <= 10
    assert Deadline.after(-1).remaining() <= -1
    assert Deadline.never().remaining() == math.inf


def test_check_raises_once_it_has_passed() -> None:
    Deadline.after(10).check()
    Deadline.never().check()
    with pytest.raises(DeadlineExceeded, match="has passed"):
        Deadline.after(-0.1).check()


def test_earlier_is_the_same_whichever_is_asked() -> None:
    soon, late = Deadline.after(1), Deadline.after(2)
    assert soon.earlier(late) == late.earlier(soon) == soon
    assert soon.earlier(Deadline.never()) == soon


def test_block_that_ends_in_time_is_left_alone() -> None:
    async def scene() -> None:
        for deadline in (Deadline.after(10), Deadline.never()):
            async with deadline.enforced("too late"):
                await asyncio.sleep(0)

    asyncio.run(scene())


@pytest.mark.parametrize("seconds", [0.01, -1])
def test_block_is_cancelled_when_the_deadline_passes(seconds: float) -> None:
    events = []

    async def work() -> None:
        async with Deadline.after(seconds).enforced("too late", lambda: events.append("counted")):
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                events.append("cancelled")
                raise

    with pytest.raises(DeadlineExceeded) as raised:
        asyncio.run(work())
    assert str(raised.value) == "too late"
    assert events == ["cancelled", "counted"]


def test_errors_of_the_block_keep_their_type() -> None:
    async def scene() -> None:
        for error in (TimeoutError("of a socket"), DeadlineExceeded("in the queue"), OSError()):
            with pytest.raises(type(error)) as raised:
                async with Deadline.after(10).enforced("too late", pytest.fail):
                    raise error
            assert raised.value is error

    asyncio.run(scene())


def test_cancelling_the_task_is_not_a_missed_deadline() -> None:
    async def scene() -> None:
        async def work() -> None:
            async with Deadline.after(10).enforced("too late", pytest.fail):
                await asyncio.sleep(10)

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("estimated", "remaining", "shown"),
    [
        (35.2, 30, ("35.2", "30.0")),
        (0.71, 0.0096, ("0.71", "0.0096")),
        (0.00031, 0.00002, ("0.0003", "0")),
        (1.26, -0.1, ("1.3", "0")),
    ],
)
def test_short_times_keep_two_digits(
    estimated: float, remaining: float, shown: tuple[str, str]
) -> None:
    text = f"estimated {shown[0]} s exceeds the {shown[1]} s remaining"
    assert describe_lateness(estimated, remaining) == text
