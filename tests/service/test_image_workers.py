"""Hostile images against a real service: they cost their own request, and nothing else."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.conftest import Server, encode, nuclei, serving

IMAGE = encode(nuclei(100, 100)[0])
WORKERS = 2


@pytest.fixture(scope="module")
def service(tiny: Path) -> Iterator[Server]:
    with serving("--weights-dir", str(tiny), f"--image-workers={WORKERS}") as running:
        yield running


def post(server: Server, image: bytes, seconds: float = 30) -> httpx.Response:
    headers = {"Content-Type": "image/png", "X-Request-Timeout": str(seconds)}
    return httpx.post(f"{server.url}/segment", content=image, headers=headers, timeout=60)


def worker_pids(server: Server) -> list[int]:
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_workers(server: Server, without: list[int]) -> list[int]:
    """Wait until all workers run, and none of `without`."""
    wait_until(
        lambda: (
            server.metric("unet_image_workers") == WORKERS
            and not set(worker_pids(server)) & set(without)
        )
    )
    return worker_pids(server)


def stop_workers(server: Server) -> list[int]:
    """Stop every worker, like a decoder that never ends, and return their process ids."""
    pids = wait_for_workers(server, [])
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


@contextlib.contextmanager
def probing(server: Server) -> Iterator[None]:
    """Check that /livez answers 200 all the time."""
    end = threading.Event()
    slowest = 0.0

    def probe() -> None:
        nonlocal slowest
        with httpx.Client() as client:
            while not end.is_set():
                start = time.monotonic()
                assert client.get(f"{server.url}/livez").status_code == 200
                slowest = max(slowest, time.monotonic() - start)
                time.sleep(0.02)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(probe)
        try:
            yield
        finally:
            end.set()
        done.result()
    assert slowest < 2  # the test's machine may be busy; without workers it was 28 s


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def progressive_jpeg() -> bytes:
    """Thousands of scans that change nothing about 16 megapixels."""
    buffer = io.BytesIO()
    Image.new("L", (4000, 4000)).save(buffer, "JPEG", progressive=True, quality=50)
    data = buffer.getvalue()
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scan * (1_000_000 // len(scan)) + data[-2:]


def rle8_bmp() -> bytes:
    """One pixel per line; the decoder pads each line in Python."""
    width = height = 5000
    data, palette = b"\1\0\0\0" * height + b"\0\1", bytes(1024)
    offset = 54 + len(palette)
    info = (40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    head = struct.pack("<IHHIIiiHHIIiiII", offset + len(data), 0, 0, offset, *info)
    return b"BM" + head + palette + data


def png_of_chunks() -> bytes:
    size = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    return start + chunk(b"tIME", b"") * 2_600_000 + pixels + chunk(b"IEND", b"")


def jpeg_of_segments() -> bytes:
    """Many small EXIF segments, which are joined one by one."""
    data = encode(nuclei(16, 16)[0], "JPEG")
    segment = b"\xff\xe1\x00\x12Exif\0\0" + bytes(10)
    return data[:2] + segment * 400_000 + data[2:]


@pytest.mark.parametrize(
    "bomb", [progressive_jpeg, rle8_bmp, png_of_chunks, jpeg_of_segments], ids=lambda f: f.__name__
)
def test_hostile_images_do_not_hold_up_others(service: Server, bomb: Callable[[], bytes]) -> None:
    image = bomb()
    with probing(service), ThreadPoolExecutor(WORKERS + 1) as pool:
        hostile = [pool.submit(post, service, image, 2) for _ in range(WORKERS + 1)]
        time.sleep(0.2)
        for _ in range(5):
            assert post(service, IMAGE).status_code == 200
        for each in hostile:
            response = each.result()
            assert response.status_code in (413, 422, 504), response.text
            assert response.elapsed.total_seconds() < 6


def test_image_that_takes_too_long_is_422_and_its_worker_is_replaced(service: Server) -> None:
    kills = service.metric("unet_image_worker_kills_total", reason="time")
    restarts = service.metric("unet_image_worker_restarts_total")
    pids = stop_workers(service)
    with probing(service), ThreadPoolExecutor(WORKERS) as pool:
        stuck = [pool.submit(post, service, IMAGE) for _ in range(WORKERS)]
        wait_until(lambda: service.metric("unet_image_workers_busy") == WORKERS)
        assert post(service, IMAGE).status_code == 200  # waits for the first new worker
        for each in stuck:
            assert each.result().status_code == 422
            assert each.result().json()["detail"] == "decoding the image took longer than 5 s"
    wait_for_workers(service, pids)
    assert service.metric("unet_image_worker_kills_total", reason="time") == kills + WORKERS
    assert service.metric("unet_image_worker_restarts_total") == restarts + WORKERS


def test_deadline_of_a_stuck_image_is_504(service: Server) -> None:
    kills = service.metric("unet_image_worker_kills_total", reason="deadline")
    pids = stop_workers(service)
    with ThreadPoolExecutor(WORKERS) as pool:
        late = [pool.submit(post, service, IMAGE, 0.5).result for _ in range(WORKERS)]
        for each in late:
            assert each().status_code == 504
            assert each().elapsed.total_seconds() < 3
    wait_for_workers(service, without=pids)
    assert post(service, IMAGE).status_code == 200
    assert service.metric("unet_image_worker_kills_total", reason="deadline") == kills + WORKERS


def test_worker_that_is_killed_fails_its_image_alone(service: Server) -> None:
    pids = stop_workers(service)
    with ThreadPoolExecutor(WORKERS + 1) as pool:
        flying = [pool.submit(post, service, IMAGE) for _ in range(WORKERS + 1)]
        wait_until(lambda: service.metric("unet_image_workers_busy") == WORKERS)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        responses = [each.result() for each in flying]
    assert sorted(response.status_code for response in responses) == [200, 422, 422]
    details = {each.json()["detail"] for each in responses if each.status_code == 422}
    assert details == {"decoding the image failed: its process ended (SIGKILL)"}
    wait_for_workers(service, pids)


def leave(server: Server, seconds: float) -> None:
    """Send an image, and disconnect without waiting for the response."""
    headers = {"Content-Type": "image/png"}
    timeout = httpx.Timeout(5, read=seconds)
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/segment", content=IMAGE, headers=headers, timeout=timeout)


def test_clients_that_leave_free_their_workers(service: Server) -> None:
    for _ in range(50):
        leave(service, 0.001)
    kills = service.metric("unet_image_worker_kills_total", reason="cancelled")
    pids = stop_workers(service)
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in range(WORKERS):
            pool.submit(leave, service, 1)
    wait_for_workers(service, without=pids)
    assert service.metric("unet_image_worker_kills_total", reason="cancelled") == kills + WORKERS
    assert post(service, IMAGE).status_code == 200
    for gauge in ("held_pixels", "held_bytes", "windows_reserved", "image_workers_busy"):
        assert service.metric(f"unet_{gauge}") == 0, gauge


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_service(sent: signal.Signals, tiny: Path) -> None:
    with serving("--weights-dir", str(tiny), f"--image-workers={WORKERS}") as running:
        pids = wait_for_workers(running, [])
        assert post(running, IMAGE).status_code == 200
        running.process.send_signal(sent)
        running.process.wait(30)
        end = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert not any("Traceback" in line for line in running.lines)


def test_signal_ends_a_service_whose_decoders_are_stuck(tiny: Path) -> None:
    with serving("--weights-dir", str(tiny), "--image-workers=1", "--drain-s=1") as running:
        (pid,) = worker_pids(running)
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            stuck = pool.submit(post, running, IMAGE)
            wait_until(lambda: running.metric("unet_image_workers_busy") == 1)
            start = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            running.process.wait(30)
            assert time.monotonic() - start < 5
            assert stuck.result().status_code == 503
        assert not Path(f"/proc/{pid}").exists()
