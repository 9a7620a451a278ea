"""The Python client, against a service that answers what a test wants of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import email.utils
import io
import itertools
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from app.client import Answer, Client, SegmentationFailed
from tests.conftest import decode, encode, nuclei

IMAGE = encode(nuclei(40, 50)[0])


@dataclasses.dataclass
class Request:
    """What the service was sent."""

    body: bytes
    timeout: float


Reply = tuple[int, dict[str, str], bytes | Iterator[bytes]]


class Fake(ThreadingHTTPServer):
    """Answers each request by `reply`; this one gives back what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[Request] = []
        self.reply: Callable[[Request], Reply] = lambda request: (200, {}, request.body)

    def handle_error(self, *_: object) -> None:
        """A client that left is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        request = Request(body, float(self.headers["x-request-timeout"]))
        self.server.requests.append(request)
        status, headers, content = self.server.reply(request)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for part in [content] if isinstance(content, bytes) else content:
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.01,))
        thread.start()
        yield service
        service.shutdown()
        thread.join()


def busy(retry_after: str | None) -> Reply:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return 429, headers, b'{"detail": "the queue is full"}'


def test_a_failure_comes_back_from_another_process() -> None:
    """One that does not ends a pool of processes, or hangs it."""
    failure = SegmentationFailed(422, "not an image", "id")
    for twin in (pickle.loads(pickle.dumps(failure)), copy.copy(failure)):
        assert type(twin) is SegmentationFailed
        assert str(twin) == "422: not an image"
        assert vars(twin) == {"status": 422, "detail": "not an image", "request_id": "id"}


def test_a_busy_service_is_asked_again_until_the_timeout_and_no_longer(fake: Fake) -> None:
    fake.reply = lambda _: busy("0.4")
    with Client(fake.url, timeout=1.5) as client:
        began = time.monotonic()
        # the last attempt may be one that is not answered in time
        with pytest.raises(
            (SegmentationFailed, httpx.TimeoutException), match=r"timeout of 1\.5 s"
        ):
            client.segment(IMAGE)
        assert time.monotonic() - began < 3
    assert 1 < len(fake.requests) < 5
    for before, after in itertools.pairwise(fake.requests):
        assert after.timeout <= before.timeout - 0.4 + 0.001


def test_nobody_waits_for_an_attempt_that_would_be_too_late(fake: Fake) -> None:
    fake.reply = lambda _: busy("60")
    began = time.monotonic()
    with Client(fake.url, timeout=20) as client, pytest.raises(SegmentationFailed, match="no time"):
        client.segment(IMAGE)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("0.5", 0.5),
        (None, 1),
        ("soon", 1),
        ("nan", 1),
        ("-1", 1),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.1),
        (email.utils.formatdate(time.time() + 3600, usegmt=True), 60),
    ],
)
def test_retry_after_is_a_number_or_a_date(
    fake: Fake, retry_after: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("app.client.time.sleep", slept.append)
    fake.reply = lambda _: busy(retry_after) if len(fake.requests) == 1 else (200, {}, b"mask")
    late = pytest.raises(SegmentationFailed) if seconds == 60 else contextlib.nullcontext()
    with Client(fake.url, timeout=30) as client, late:
        assert client.segment(IMAGE).png == b"mask"
    assert slept == ([] if seconds == 60 else [seconds])


def test_an_answer_that_drips_is_given_up_at_the_timeout(fake: Fake) -> None:
    def drip() -> Iterator[bytes]:
        for _ in range(100):
            time.sleep(0.05)
            yield b"."

    fake.reply = lambda _: (200, {}, drip())
    with Client(fake.url, timeout=1) as client:
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout, match="timeout of 1 s"):
            client.segment(IMAGE)
        assert time.monotonic() - began < 3


def test_an_image_may_be_given_in_many_ways(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(IMAGE)
    with Client(fake.url) as client:
        given = (path, str(path), IMAGE, bytearray(IMAGE), memoryview(IMAGE), io.BytesIO(IMAGE))
        for image in given:
            assert client.segment(image).content == IMAGE
        with path.open("rb") as file:
            assert client.segment(file).content == IMAGE


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((5, 4), "u1"), ((5, 4, 3), "u1"), ((5, 4), "<u2"), ((5, 4), ">u2")],
)
def test_pixels_are_sent_as_they_are(fake: Fake, shape: tuple[int, ...], kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape).astype(kind)
    with Client(fake.url) as client:
        np.testing.assert_array_equal(decode(client.segment(pixels).content), pixels)
        np.testing.assert_array_equal(decode(client.segment(pixels[:, ::-1]).png), pixels[:, ::-1])


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (None, "not NoneType"),
        (io.StringIO("text"), "not StringIO"),
        (np.zeros((4, 4, 3), np.uint16), "colour of 16 bits cannot be sent as pixels"),
        (np.zeros((4, 4)), "of float64"),
        (np.zeros((4, 4, 4), np.uint8), r"not \(4, 4, 4\)"),
        (np.zeros((0, 4), np.uint8), r"not \(0, 4\)"),
    ],
)
def test_what_is_no_image_is_told_what_one_is(fake: Fake, image: object, says: str) -> None:
    with Client(fake.url) as client, pytest.raises(TypeError, match=f"an image is a path.*{says}"):
        client.segment(image)  # type: ignore[arg-type]
    assert not fake.requests


def test_an_answer_is_an_image_or_outlines() -> None:
    mask = Answer(encode(np.eye(4, dtype=np.uint8)), httpx.Headers({"content-type": "image/png"}))
    assert mask.image().trace() == 4
    with pytest.raises(ValueError, match="polygons"):
        mask.polygons()
    content = b'{"images": [{"polygons": {"type": "FeatureCollection", "features": []}}]}'
    outlines = Answer(content, httpx.Headers({"content-type": "application/json"}))
    assert outlines.polygons() == {"type": "FeatureCollection", "features": []}
    with pytest.raises(ValueError, match=r"\.polygons\(\)"):
        outlines.image()


def test_masks_may_be_larger_than_pillow_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    mask = np.full((20, 20), 255, np.uint8)
    np.testing.assert_array_equal(Answer(encode(mask), httpx.Headers()).image(), mask)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_many_images_come_back_with_their_answers_a_few_at_a_time(fake: Fake) -> None:
    taken, most = 0, 0

    def images() -> Iterator[bytes]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield b"%d" % number

    def reply(request: Request) -> Reply:
        if request.body == b"7":
            return 422, {}, b'{"detail": "not an image"}'
        return 200, {}, b"mask of " + request.body

    fake.reply = reply
    outcomes: dict[bytes, Answer | SegmentationFailed] = {}
    with Client(fake.url) as client:
        for image, outcome in client.segment_many(images(), workers=4):
            most = max(most, taken - len(outcomes))
            outcomes[image] = outcome
    assert most <= 4
    assert len(outcomes) == 20
    failed = outcomes.pop(b"7")
    assert isinstance(failed, SegmentationFailed)
    assert failed.detail == "not an image"
    for image, outcome in outcomes.items():
        assert isinstance(outcome, Answer)
        assert outcome.content == b"mask of " + image


def test_leaving_many_images_early_leaves_nothing_running(fake: Fake) -> None:
    before = set(threading.enumerate())
    with Client(fake.url) as client:
        many = client.segment_many([IMAGE] * 50, workers=2)
        next(many)
        mine = [each for each in set(threading.enumerate()) - before if "Pool" in each.name]
        assert len(mine) == 2
        many.close()  # type: ignore[attr-defined]
        assert not any(each.is_alive() for each in mine)
        assert len(fake.requests) < 10
