"""A cancelled call of AsyncClient leaves no task and no connection, and the client usable."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.unit.clients.fake_server import FakeServer, ReceivedRequest, Reply
from unet_client import AsyncClient


@pytest.fixture
def blocked(fake: FakeServer) -> FakeServer:
    """A server whose responses have no end."""
    fake.respond = lambda _: Reply(body=fake.drip())
    return fake


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def cancel(call: Awaitable[object], condition: Callable[[], bool]) -> None:
    """Cancel a call once the condition holds, and check that no task remains."""
    task = asyncio.ensure_future(call)
    await until(condition)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_cancelled_call_closes_its_connection(blocked: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(blocked.url) as client:
            await cancel(client.segment(b"image"), lambda: len(blocked.requests) == 1)
            await until(lambda: blocked.open_connections == 0)
            blocked.respond = lambda _: Reply(body=b"mask")
            assert (await client.segment(b"image")).content == b"mask"

    asyncio.run(main())


def test_cancelled_wait_for_another_attempt_ends_at_once(fake: FakeServer) -> None:
    fake.respond = lambda _: Reply(429, {"Retry-After": "30"})

    async def main() -> None:
        async with AsyncClient(fake.url) as client:
            start = time.monotonic()
            await cancel(client.segment(b"image"), lambda: len(fake.requests) == 1)
            assert time.monotonic() - start < 10

    asyncio.run(main())


def test_cancelled_segment_many_cancels_all_requests(blocked: FakeServer) -> None:
    async def consume(results: AsyncIterator[object]) -> None:
        async for _ in results:
            pass

    async def main() -> None:
        async with AsyncClient(blocked.url) as client:
            many = client.segment_many([b"image"] * 9, concurrency=3)
            await cancel(consume(many), lambda: len(blocked.requests) == 3)
            await until(lambda: blocked.open_connections == 0)

    asyncio.run(main())
    assert len(blocked.requests) == 3


def test_timeout_of_the_caller_is_not_taken_for_the_clients(blocked: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(blocked.url) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.segment(b"image")

    asyncio.run(main())


def test_event_loop_is_free_during_a_call(fake: FakeServer) -> None:
    def respond(request: ReceivedRequest) -> Reply:
        fake.pause(0.5)
        return Reply()

    fake.respond = respond

    async def main() -> None:
        async with AsyncClient(fake.url) as client:
            call = asyncio.ensure_future(client.segment(b"image"))
            ticks = 0
            while not call.done():
                await asyncio.sleep(0.01)
                ticks += 1
            assert ticks > 5

    asyncio.run(main())
