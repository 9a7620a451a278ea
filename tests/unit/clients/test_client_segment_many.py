"""segment_many of both clients: pairs, order, concurrency, and leaving early."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.clients.fake_server import Connect, FakeServer, ReceivedRequest, Reply
from unet_client import AsyncClient, Client, ConnectionFailed, SegmentationError, SegmentationResult


class Meter:
    """Counts requests in flight."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = 0

    def change(self, by: int) -> None:
        with self._lock:
            self.now += by
            self.most = max(self.most, self.now)


@pytest.fixture
def meter(fake: FakeServer) -> Meter:
    meter = Meter()

    def respond(request: ReceivedRequest) -> Reply:
        meter.change(1)
        time.sleep(0.05)
        meter.change(-1)
        return Reply(body=b"mask of " + request.body)

    fake.respond = respond
    return meter


def test_each_image_comes_with_its_result_or_error(
    fake: FakeServer, connect: Connect, tmp_path: Path
) -> None:
    def respond(request: ReceivedRequest) -> Reply:
        if request.body == b"bad":
            return Reply(422, body=b'{"detail": "not an image"}')
        if request.body == b"broken":
            return Reply(body=[b""], raw=True)
        return Reply(body=b"mask of " + request.body)

    fake.respond = respond
    missing = tmp_path / "missing.png"
    images: list[bytes | Path] = [b"1", b"bad", b"2", b"broken", missing, b"3"]
    with connect(fake.url) as client:
        outcomes = dict(client.segment_many(images, concurrency=2, model="nuclei"))
    assert set(outcomes) == set(images)
    error = outcomes.pop(b"bad")
    assert isinstance(error, SegmentationError)
    assert error.detail == "not an image"
    assert isinstance(outcomes.pop(b"broken"), ConnectionFailed)
    assert isinstance(outcomes.pop(missing), FileNotFoundError)
    for image, outcome in outcomes.items():
        assert isinstance(image, bytes)
        assert isinstance(outcome, SegmentationResult)
        assert outcome.content == b"mask of " + image
    assert {request.path for request in fake.requests} == {"/segment?model=nuclei"}


def test_results_come_in_the_order_of_completion(fake: FakeServer, connect: Connect) -> None:
    others_done = threading.Event()

    def respond(request: ReceivedRequest) -> Reply:
        if request.body == b"0":
            others_done.wait(10)
        return Reply()

    fake.respond = respond
    images = [b"0", b"1", b"2", b"3", b"4"]
    order: list[bytes] = []
    with connect(fake.url) as client:
        for image, _ in client.segment_many(images):
            order.append(image)
            if len(order) == 4:
                others_done.set()
    assert order[-1] == b"0"
    assert sorted(order) == images


@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrency_is_reached_and_not_exceeded(
    fake: FakeServer, connect: Connect, meter: Meter, concurrency: int
) -> None:
    images = [b"%d" % number for number in range(8)]
    with connect(fake.url) as client:
        assert len(list(client.segment_many(images, concurrency=concurrency))) == 8
    assert meter.most == concurrency


@pytest.mark.usefixtures("meter")
def test_images_are_taken_when_a_request_can_start(fake: FakeServer, connect: Connect) -> None:
    taken = 0

    def images() -> Iterator[bytes]:
        nonlocal taken
        for number in range(12):
            taken += 1
            yield b"%d" % number

    with connect(fake.url) as client:
        for yielded, _ in enumerate(client.segment_many(images(), concurrency=3)):
            assert taken - yielded <= 3
    assert taken == 12


@pytest.mark.parametrize("concurrency", [0, -1])
def test_concurrency_below_one_is_rejected(
    fake: FakeServer, connect: Connect, concurrency: int
) -> None:
    with connect(fake.url) as client, pytest.raises(ValueError, match="concurrency must be"):
        list(client.segment_many([b"image"], concurrency=concurrency))


def test_object_that_is_not_an_image_ends_the_iteration(fake: FakeServer, connect: Connect) -> None:
    with connect(fake.url) as client, pytest.raises(TypeError, match="got NoneType"):
        list(client.segment_many([b"image", None, b"image"], concurrency=1))  # type: ignore[type-var]
    assert len(fake.requests) == 1


def test_no_images_give_no_results(fake: FakeServer, connect: Connect) -> None:
    with connect(fake.url) as client:
        assert list(client.segment_many([])) == []


@pytest.mark.usefixtures("meter")
def test_closing_the_iterator_waits_for_the_requests_in_flight(fake: FakeServer) -> None:
    before = set(threading.enumerate())
    with Client(fake.url) as client:
        many = client.segment_many([b"image"] * 50, concurrency=2)
        next(many)
        many.close()
        left = [each for each in set(threading.enumerate()) - before if "Pool" in each.name]
    assert not left
    assert len(fake.requests) <= 4


async def leave_early(fake: FakeServer) -> None:
    async with AsyncClient(fake.url) as client:
        many = client.segment_many([b"image"] * 50, concurrency=2)
        async with contextlib.aclosing(many):
            async for _ in many:
                break
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.usefixtures("meter")
def test_closing_the_async_iterator_cancels_the_requests_in_flight(fake: FakeServer) -> None:
    asyncio.run(leave_early(fake))
    assert len(fake.requests) <= 4
