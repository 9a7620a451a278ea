"""`unet segment --server`: what it sends, and how it waits, resumes and stops."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from app import cli
from app.api.schemas import SegmentQuery
from app.cli.segment import local, remote
from app.inference.outputs import FileFormat, Options, Output
from tests.conftest import encode, nuclei
from tests.unit.clients.fake_server import FakeServer, ReceivedRequest, Reply

MODELS = {"default": "nuclei", "models": [{"name": "nuclei"}, {"name": "person"}]}
MASK = Reply(200, {"Content-Type": "image/png", "X-Image-Pages": "1"}, b"mask")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNET_KEY", raising=False)
    monkeypatch.setattr(local, "Service", None)
    Path("in").mkdir()
    for seed in range(6):
        Path(f"in/{seed}.png").write_bytes(encode(nuclei(20, 20, seed)[0]))


@pytest.fixture
def service() -> Iterator[FakeServer]:
    with FakeServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        answer(running, lambda _: MASK)
        yield running
        running.stopped.set()
        running.shutdown()
        thread.join()


def answer(service: FakeServer, respond: Callable[[ReceivedRequest], Reply]) -> None:
    """Answer /models, and images by `respond`."""

    def route(request: ReceivedRequest) -> Reply:
        if request.method == "GET":
            return Reply(body=json.dumps(MODELS).encode())
        return respond(request)

    service.respond = route


def segment(service: FakeServer, *arguments: str) -> int:
    return cli.main(["segment", "in", "-o", "out", "--server", service.url, *arguments])


def posts(service: FakeServer) -> list[ReceivedRequest]:
    return [request for request in service.requests if request.method == "POST"]


def test_query_name_key_and_deadline_are_sent(
    service: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_KEY", "secret")
    flags = "--format webp --min-area 7 --exclude-edges --percentiles 1,99 --pixel-size 0.5"
    more = "--background 10ff00 --channel 0 --threshold 0.25 --page 0 --model person"
    assert segment(service, "--output", "cutout", *flags.split(), *more.split()) == 0
    request = posts(service)[0]
    sent = parse_qs(urlsplit(request.path).query, strict_parsing=True)
    parsed = SegmentQuery(**{k: v if k == "output" else v[0] for k, v in sent.items()})
    assert parsed.model == "person"
    assert parsed.options == Options(
        (Output.CUTOUT,),
        threshold=0.25,
        page=0,
        channel=0,
        percentiles=(1, 99),
        min_area=7,
        exclude_edges=True,
        pixel_size=0.5,
        background=(16, 255, 0),
        format=FileFormat.WEBP,
    )
    assert request.headers["authorization"] == "Bearer secret"
    assert 590 < request.timeout <= 600
    assert b'filename="' in request.body
    assert sorted(Path("out").iterdir()) == [Path(f"out/{seed}.webp") for seed in range(6)]


def test_flag_for_the_key_precedes_the_variable(
    service: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_KEY", "of the environment")
    assert segment(service, "--key", "given") == 0
    assert {request.headers["authorization"] for request in service.requests} == {"Bearer given"}


def test_busy_service_is_waited_for(service: FakeServer) -> None:
    busy = {429: "0.2", 503: "0.2"}
    times: list[float] = []

    def respond(_: ReceivedRequest) -> Reply:
        times.append(time.monotonic())
        if busy:
            status, seconds = busy.popitem()
            return Reply(status, {"Retry-After": seconds}, b'{"detail": "busy"}')
        return MASK

    answer(service, respond)
    assert segment(service, "--concurrency", "1") == 0
    assert len(times) == 8
    assert times[1] - times[0] >= 0.2
    assert len(list(Path("out").iterdir())) == 6


def test_image_fails_when_the_service_stays_busy(
    service: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(service, lambda _: Reply(429, {"Retry-After": "1"}, b'{"detail": "queue full"}'))
    assert segment(service, "--timeout", "0.5") == 1
    *failures, last = capsys.readouterr().err.splitlines()
    assert len(failures) == 6
    assert failures[0].startswith("unet: in/")
    assert "queue full" in failures[0]
    assert last == "0 written to out/, 6 failed"


@pytest.mark.parametrize("concurrency", [1, 3])
def test_images_in_flight_are_bounded(service: FakeServer, concurrency: int) -> None:
    lock = threading.Lock()
    now = most = 0

    def respond(_: ReceivedRequest) -> Reply:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with lock:
            now -= 1
        return MASK

    answer(service, respond)
    assert segment(service, "--concurrency", str(concurrency)) == 0
    assert most == concurrency


def test_failed_images_are_reported_and_sent_again_alone(
    service: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path("in/3.png").read_bytes()
    answer(
        service,
        lambda request: Reply(422, body=b'{"detail": "damaged"}') if bad in request.body else MASK,
    )
    assert segment(service) == 1
    assert capsys.readouterr().err == "unet: in/3.png: damaged\n5 written to out/, 1 failed\n"
    assert not Path("out/3.png").exists()
    answer(service, lambda _: MASK)
    assert segment(service, "--skip-existing") == 0
    assert capsys.readouterr().err == "1 written to out/, 5 skipped\n"
    assert len(posts(service)) == 7
    assert segment(service, "--skip-existing") == 0
    assert len(posts(service)) == 7


def test_broken_connection_is_tried_again(
    service: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_RECONNECT_S", 0.01)
    broken = [Reply(body=[b""], raw=True)] * 3
    answer(service, lambda _: broken.pop() if broken else MASK)
    assert segment(service) == 0
    assert len(posts(service)) == 9


@pytest.mark.parametrize(
    ("reply", "flags"),
    [
        (Reply(body=[b""], raw=True), ["--timeout", "0.5"]),
        (Reply(401, body=b'{"detail": "wrong key"}'), []),
    ],
)
def test_run_stops_when_all_images_would_fail(
    service: FakeServer, capsys: pytest.CaptureFixture[str], reply: Reply, flags: list[str]
) -> None:
    first = Path("in/0.png").read_bytes()
    answer(service, lambda request: MASK if first in request.body else reply)
    assert segment(service, "--concurrency", "1", *flags) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "1 written to out/, 1 failed, 4 not tried"


def test_error_of_the_service_names_the_request(
    service: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(service, lambda _: Reply(500, {"X-Request-ID": "id-7"}, b'{"detail": "internal"}'))
    assert segment(service) == 1
    assert "internal (request id-7)" in capsys.readouterr().err


def test_errors_of_the_service_name_flags_and_not_parameters(
    service: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    detail = "the image has 3 pages; choose page=0 to page=2 for one of them, or page=all"
    answer(service, lambda _: Reply(422, body=json.dumps({"detail": detail}).encode()))
    assert segment(service) == 1
    line = capsys.readouterr().err.splitlines()[0]
    assert line.endswith("choose --page 0 to --page 2 for one of them, or --page all")
    answer(service, lambda _: Reply(401, body=b'{"detail": "send it as X-API-Key"}'))
    assert segment(service) == 1
    assert "the API key is missing or wrong; set --key or UNET_KEY" in capsys.readouterr().err


def test_pages_that_failed_name_flags_and_not_parameters(
    service: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("0-page0.png", b"mask")
        failure = {"status": 422, "detail": "65536 objects: use format=tiff"}
        file.writestr("errors.json", json.dumps({"0-page1": failure}))
    answer(service, lambda _: Reply(200, {"Content-Type": "application/zip"}, archive.getvalue()))
    assert segment(service, "--page", "all") == 1
    assert "page 1: 65536 objects: use --format tiff" in capsys.readouterr().err


def test_service_that_cannot_be_used_is_one_line(
    service: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for flags, says in (
        (["--server", nowhere], f"cannot reach {nowhere}"),
        (["--server", "localhost"], "invalid server URL 'localhost'"),
        (["--model", "cells"], "has no model cells; it has nuclei, person"),
    ):
        assert segment(service, *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("unet: error: ")
        assert says in line
    service.respond = lambda _: Reply(body=b"{}")
    assert segment(service) == 2
    assert "is it unet-server?" in capsys.readouterr().err
    assert not posts(service)
