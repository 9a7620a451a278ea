"""The images of one request run at once, within limits, and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from app.inference.image_group import ImageGroup


def run(body: Awaitable[None]) -> None:
    async def scene() -> None:
        before = asyncio.all_tasks()
        await asyncio.wait_for(body, 10)
        assert asyncio.all_tasks() == before

    asyncio.run(scene())


def test_images_run_at_once_up_to_the_limit_and_results_keep_their_order() -> None:
    running, most = 0, 0

    async def process(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002 * (10 - item))
        running -= 1
        return item * item

    async def body() -> None:
        group = ImageGroup(4, 1e6)
        assert await group.run(range(10), process) == [item * item for item in range(10)]

    run(body())
    assert most == 4


def test_error_is_raised_as_it_is_and_cancels_the_others() -> None:
    ended: list[str] = []

    async def process(item: int) -> None:
        try:
            if item == 3:
                raise KeyError("the third")
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def body() -> None:
        with pytest.raises(KeyError, match="the third"):
            await ImageGroup(4, 1e6).run(range(10), process)

    run(body())
    assert ended == ["cancelled"] * 3


def test_cancelling_the_request_cancels_its_images() -> None:
    ended: list[int] = []

    async def process(item: int) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(item)

    async def body() -> None:
        task = asyncio.create_task(ImageGroup(3, 1e6).run(range(10), process))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(body())
    assert sorted(ended) == [0, 1, 2]


def test_large_images_wait_for_each_other() -> None:
    held: list[int] = []

    async def process(pixels: int) -> None:
        await group.enter(pixels)
        held.append(pixels)
        assert sum(held) <= 100 or held == [250]
        await asyncio.sleep(0.002)
        held.remove(pixels)
        group.leave(pixels)

    async def body() -> None:
        nonlocal group
        group = ImageGroup(8, 100)
        await group.run([60, 50, 40, 250, 10, 10, 90, 100], process)

    group: ImageGroup
    run(body())


def test_image_that_is_cancelled_while_it_waits_holds_nothing() -> None:
    async def body() -> None:
        group = ImageGroup(2, 100)
        await group.enter(80)
        waiting = asyncio.create_task(group.enter(30))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        group.leave(80)
        await group.enter(100)

    run(body())
