"""Both clients retry while the service is busy, as Retry-After says."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import time
from collections.abc import Callable

import pytest

from tests.unit.clients.fake_server import Connect, FakeServer, ReceivedRequest, Reply
from unet_client import ResponseTimeout, SegmentationError


def busy(retry_after: str | None, status: int = 429) -> Reply:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Reply(status, headers, b'{"detail": "queue full"}')


def busy_once(fake: FakeServer, reply: Reply) -> Callable[[ReceivedRequest], Reply]:
    return lambda request: reply if len(fake.requests) == 1 else Reply(body=request.body or b"{}")


@pytest.mark.parametrize("status", [429, 503])
def test_busy_service_is_tried_again(fake: FakeServer, connect: Connect, status: int) -> None:
    with connect(fake.url) as client:
        for call in (lambda: client.segment(b"image").content == b"image", client.models):
            fake.requests.clear()
            fake.respond = busy_once(fake, busy("0.1", status))
            call()
            assert len(fake.requests) == 2


@pytest.mark.parametrize("status", [401, 422, 500, 504])
def test_other_errors_are_not_tried_again(fake: FakeServer, connect: Connect, status: int) -> None:
    fake.respond = lambda _: busy("0.1", status)
    with connect(fake.url) as client, pytest.raises(SegmentationError, match=f"{status}: "):
        client.segment(b"image")
    assert len(fake.requests) == 1


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client sleeps, which pass at once."""
    delays: list[float] = []

    async def async_sleep(seconds: float) -> None:
        delays.append(seconds)

    monkeypatch.setattr(time, "sleep", delays.append)
    monkeypatch.setattr(asyncio, "sleep", async_sleep)
    return delays


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("0.5", 0.5),
        ("7", 7),
        ("0", 0.1),
        (None, 1),
        ("soon", 1),
        ("nan", 1),
        ("-1", 1),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.1),
    ],
)
def test_client_waits_as_long_as_retry_after_says(
    fake: FakeServer,
    connect: Connect,
    delays: list[float],
    retry_after: str | None,
    seconds: float,
) -> None:
    fake.respond = busy_once(fake, busy(retry_after))
    with connect(fake.url) as client:
        client.segment(b"image")
    assert [delay for delay in delays if delay] == [seconds]


def test_retry_after_may_be_a_date(fake: FakeServer, connect: Connect, delays: list[float]) -> None:
    date = time.time() + 30
    fake.respond = busy_once(fake, busy(email.utils.formatdate(date, usegmt=True)))
    with connect(fake.url) as client:
        client.segment(b"image")
    (delay,) = (delay for delay in delays if delay)
    assert 15 < delay <= 30


@pytest.mark.parametrize(
    "retry_after",
    ["60", email.utils.formatdate(time.time() + 3600, usegmt=True)],
    ids=["seconds", "date"],
)
def test_client_does_not_wait_for_an_attempt_after_the_timeout(
    fake: FakeServer, connect: Connect, retry_after: str
) -> None:
    fake.respond = lambda _: busy(retry_after)
    start = time.monotonic()
    with (
        connect(fake.url, timeout=20) as client,
        pytest.raises(SegmentationError, match=r"queue full .*20 s leaves no time") as caught,
    ):
        client.segment(b"image")
    assert caught.value.status == 429
    assert time.monotonic() - start < 10


def test_one_timeout_covers_all_attempts(fake: FakeServer, connect: Connect) -> None:
    fake.respond = lambda _: busy("0.4")
    start = time.monotonic()
    # On a busy machine the last attempt may time out.
    with (
        connect(fake.url, timeout=1.5) as client,
        pytest.raises((SegmentationError, ResponseTimeout), match=r"timeout of 1\.5 s"),
    ):
        client.segment(b"image")
    assert time.monotonic() - start < 3
    assert 1 < len(fake.requests) < 5
    for before, after in itertools.pairwise(fake.requests):
        assert after.timeout <= before.timeout - 0.4 + 0.001
