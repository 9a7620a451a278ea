"""A request with many files: it fills batches, shares the device, and leaves nothing behind."""

from __future__ import annotations

import io
import socket
import threading
import time
import zipfile
from pathlib import Path

import httpx

from tests.conftest import Server, encode, nuclei
from tests.service.test_faults import faulty

SMALL = encode(nuclei(60, 60)[0])
PNG = {"Content-Type": "image/png"}


def test_files_share_batches_and_a_bad_one_fails_alone(tiny: Path) -> None:
    images = [encode(nuclei(60, 60, seed=n)[0]) for n in range(24)]
    with faulty("slow", tiny, UNET_MAX_BATCH="8") as server:
        url = f"{server.url}/segment"
        alone = [httpx.post(url, content=image, headers=PNG).content for image in images]
        before = read_batches(server)
        files = [("file", (f"{n}.png", image)) for n, image in enumerate(images)]
        answer = httpx.post(url, files=[*files, ("file", ("bad.png", b"no"))], timeout=60)
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert [archive.read(f"{n}.png") for n in range(24)] == alone
            assert sorted(archive.namelist())[-1] == "errors.json"
            assert b"bad" in archive.read("errors.json")
        windows, batches = read_batches(server)
        assert windows - before[0] == 24
        assert batches - before[1] <= 12


def read_batches(server: Server) -> tuple[float, float]:
    """Windows that were computed, and their batches."""
    return server.metric("unet_batch_windows_sum"), server.metric("unet_batch_windows_count")


def test_many_files_take_turns_with_one_and_are_dropped_on_disconnect(tiny: Path) -> None:
    """A batch takes a tenth of a second, and has one window: the files would take 30 s."""
    form = httpx.Request("POST", "http://here", files=[("file", ("a.png", SMALL))] * 300)
    with faulty("slow", tiny, UNET_MAX_BATCH="1") as server:
        done = threading.Event()
        client = threading.Thread(target=_post_and_disconnect, args=(server, form, done))
        client.start()
        until = time.monotonic() + 20
        while server.metric("unet_windows_waiting") < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        for _ in range(5):
            started = time.monotonic()
            answer = httpx.post(f"{server.url}/segment", content=SMALL, headers=PNG)
            assert answer.status_code == 200
            assert time.monotonic() - started < 2
        computed = server.metric("unet_batch_windows_sum")
        assert computed < 100
        done.set()
        client.join()
        while server.metric("unet_held_bytes"):
            assert time.monotonic() < until + 10
            time.sleep(0.01)
        assert server.metric("unet_windows_reserved") == 0
        assert server.metric("unet_held_pixels") == 0
        assert server.metric("unet_requests_total", route="/segment", status="499") == 1


def _post_and_disconnect(server: Server, form: httpx.Request, done: threading.Event) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = form.read()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /segment HTTP/1.1\r\nHost: {host}\r\n"
            f"Content-Type: {form.headers['content-type']}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        done.wait(60)
