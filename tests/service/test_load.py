"""A real process under load: every request gets its own mask or a rejection, and probes answer."""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import httpx
import pytest

from tests.conftest import Server, encode, nuclei, serving, write_tiny
from tests.service.test_faults import faulty

SMALL = encode(nuclei(60, 60)[0])
PNG = {"Content-Type": "image/png"}


class Crowd:
    """Clients that post one image after the other until `stop`.

    Attributes:
        outcomes: number of responses by status, and of failed connections by error.
        masks: the distinct bodies of responses with status 200.
        models: X-Model of these responses, in order.
    """

    def __init__(self, server: Server, clients: int, image: bytes = SMALL) -> None:
        self.outcomes: Counter[int | str] = Counter()
        self.masks: set[bytes] = set()
        self.models: list[str] = []
        self._address = server.url.removeprefix("http://")
        self._image = image
        self._stopped = False
        self._sending = threading.Lock()
        self._threads = [threading.Thread(target=self._post) for _ in range(clients)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Send nothing more. What was sent is with the server when this returns; the end of the
        block waits for the responses."""
        with self._sending:
            self._stopped = True

    def _post(self) -> None:
        while not self._stopped:
            # One connection per request: the server may close an idle one at any time.
            connection = HTTPConnection(self._address, timeout=30)
            try:
                connection.connect()
                with self._sending:
                    if self._stopped:
                        return
                    connection.request("POST", "/segment", self._image, PNG)
                response = connection.getresponse()
                content = response.read()
            except (OSError, HTTPException) as error:
                # After the end the server may not listen any more: nothing was sent to it.
                if not self._stopped or connection.sock is not None:
                    self.outcomes[type(error).__name__] += 1
                return
            finally:
                connection.close()
            self.outcomes[response.status] += 1
            if response.status == 200:
                self.masks.add(content)
                self.models.append(str(response.headers["x-model"]))


def test_overload_gets_200_or_429_and_nothing_else(tiny: Path) -> None:
    with faulty("slow", tiny, UNET_QUEUE_WINDOWS="4") as server:
        with Crowd(server, 20) as crowd:
            reserved = []
            until = time.monotonic() + 3
            while time.monotonic() < until:
                reserved.append(server.metric("unet_windows_reserved"))
                time.sleep(0.02)
        assert set(crowd.outcomes) == {200, 429}
        assert max(reserved) == 4
        assert len(crowd.masks) == 1
        # The metrics agree with what the clients counted.
        for status, count in crowd.outcomes.items():
            seen = server.metric("unet_requests_total", route="/segment", status=str(status))
            assert seen == count
        assert server.metric("unet_rejected_total", reason="queue_full") == crowd.outcomes[429]
        assert server.metric("unet_images_total", model="nuclei") == crowd.outcomes[200]
        assert server.metric("unet_windows_reserved") == 0


def test_429_has_retry_after(tiny: Path) -> None:
    with faulty("slow", tiny, UNET_QUEUE_WINDOWS="2") as server, Crowd(server, 4):
        for _ in range(1000):
            answer = httpx.post(f"{server.url}/segment", content=SMALL, headers=PNG)
            if answer.status_code == 429:
                break
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 5


def test_full_queue_rejects_before_the_image_is_sent(tiny: Path) -> None:
    """A client with Expect: 100-continue (RFC 9110, section 10.1.1) does not send it at all."""
    with faulty("slow", tiny, UNET_QUEUE_WINDOWS="2") as server, Crowd(server, 4):
        host, port = server.url.removeprefix("http://").split(":")
        answers: Counter[bytes] = Counter()
        until = time.monotonic() + 10
        while not answers[b"429"] and time.monotonic() < until:
            with socket.create_connection((host, int(port)), 5) as connection:
                connection.sendall(
                    f"POST /segment HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n"
                    "Content-Length: 5000000\r\nExpect: 100-continue\r\n\r\n".encode()
                )
                answers[connection.recv(12)[9:]] += 1
        assert answers[b"429"] == 1
        assert set(answers) <= {b"429", b"100"}


def test_deadline_that_cannot_be_met_is_rejected_at_once(tiny: Path) -> None:
    big = encode(nuclei(600, 600)[0])  # dozens of windows, a tenth of a second per batch
    with faulty("slow", tiny) as server:
        httpx.post(f"{server.url}/segment", content=SMALL, headers=PNG)  # measures the rate
        computed = server.metric("unet_batch_windows_sum")
        answer = httpx.post(
            f"{server.url}/segment", content=big, headers=PNG | {"X-Request-Timeout": "0.5"}
        )
        assert answer.status_code == 504
        assert "estimated" in answer.json()["detail"]
        assert server.metric("unet_batch_windows_sum") == computed
        assert server.metric("unet_rejected_total", reason="deadline") == 1
        assert server.metric("unet_windows_reserved") == 0


def _post_and_disconnect(server: Server, image: bytes, seconds: float) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /segment HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n"
        connection.sendall(f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image)
        time.sleep(seconds)


def test_disconnected_clients_free_their_windows_and_memory(tiny: Path) -> None:
    """Some have a window on the device when they disconnect, for others all windows wait."""
    big = encode(nuclei(600, 600)[0])
    with faulty("slow", tiny, UNET_QUEUE_WINDOWS="1000") as server:
        clients = [
            threading.Thread(target=_post_and_disconnect, args=(server, big, 0.6)) for _ in range(4)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        until = time.monotonic() + 5
        while server.metric("unet_windows_reserved") and time.monotonic() < until:
            time.sleep(0.02)
        assert server.metric("unet_windows_reserved") == 0
        assert server.metric("unet_held_pixels") == 0
        dropped = server.metric("unet_dropped_windows_total", reason="cancelled")
        ran = server.metric("unet_batch_windows_sum")
        assert dropped > 50
        assert ran < dropped / 2
        assert server.metric("unet_requests_total", route="/segment", status="499") == 4
        answer = httpx.post(f"{server.url}/segment", content=SMALL, headers=PNG)
        assert answer.status_code == 200


def test_reload_under_load_fails_no_request(tmp_path: Path) -> None:
    path = tmp_path / "nuclei.safetensors"
    first = write_tiny(path, seed=0)
    with (
        serving(UNET_WEIGHTS_DIR=str(tmp_path), UNET_RELOAD="on") as server,
        Crowd(server, 4) as crowd,
    ):
        second = write_tiny(path, seed=1)
        until = time.monotonic() + 20
        while second not in crowd.models and time.monotonic() < until:
            time.sleep(0.05)
        path.write_bytes(b"damaged while it was copied")
        while not server.metric("unet_reloads_total", result="rejected"):
            assert time.monotonic() < until + 10
            time.sleep(0.05)
        time.sleep(0.2)
        crowd.stop()
        model = httpx.get(f"{server.url}/models/nuclei").json()
        assert model["id"] == second
        assert model["ready"]
        assert "nuclei.safetensors" in model["error"]
        write_tiny(tmp_path / "another.safetensors", seed=2)
        while httpx.get(f"{server.url}/models/another").status_code == 404:
            assert time.monotonic() < until + 20
            time.sleep(0.05)
    assert set(crowd.outcomes) == {200}
    assert set(crowd.models) == {first, second}
    assert len(crowd.masks) == 2
    assert crowd.models[-1] == second


def test_probes_answer_while_every_core_is_busy(tiny: Path) -> None:
    """The median counts: on a busy machine a single answer may wait for the scheduler."""
    image = encode(nuclei(500, 500)[0])
    with serving(UNET_WEIGHTS_DIR=str(tiny)) as server, Crowd(server, 8, image) as crowd:
        while not crowd.outcomes[200]:
            time.sleep(0.01)
        seconds = []
        with httpx.Client(base_url=server.url) as client:
            for _ in range(30):
                for probe in ("/livez", "/readyz", "/startupz", "/healthz"):
                    started = time.perf_counter()
                    assert client.get(probe).status_code == 200
                    seconds.append(time.perf_counter() - started)
        assert statistics.median(seconds) < 0.05


@pytest.mark.parametrize("batch", [1, 8])
def test_mask_is_the_same_alone_and_in_a_batch(tiny: Path, batch: int) -> None:
    """Byte for byte: the result of a window does not depend on its batch."""
    images = [encode(nuclei(50 + 30 * n, 180 - 20 * n, seed=n)[0]) for n in range(6)]
    with serving(UNET_WEIGHTS_DIR=str(tiny), UNET_MAX_BATCH=str(batch)) as server:

        def mask(image: bytes) -> bytes:
            answer = httpx.post(f"{server.url}/segment", content=image, headers=PNG, timeout=30)
            assert answer.status_code == 200
            return answer.content

        alone = [mask(image) for image in images]
        with ThreadPoolExecutor(12) as clients:
            crowded = list(clients.map(mask, images * 8))
        assert crowded == alone * 8
        if batch > 1:
            batches = server.metric("unet_batch_windows_count")
            assert server.metric("unet_batch_windows_sum") > batches * 1.2


def test_log_has_one_json_line_per_request(tiny: Path) -> None:
    import json

    with serving(UNET_WEIGHTS_DIR=str(tiny), UNET_LOG_FORMAT="json", ready=False) as server:
        with contextlib.suppress(AssertionError):
            server.wait_ready()
        headers = PNG | {"X-Request-ID": "abc-123"}
        httpx.post(f"{server.url}/segment", content=SMALL, headers=headers)
        httpx.post(f"{server.url}/segment", content=b"nonsense", headers=headers)
        server.stop()  # a line may be written after the answer
    lines = [json.loads(line) for line in server.lines]
    requests = [line for line in lines if line.get("path") == "/segment"]
    assert [line["status"] for line in requests] == [200, 422]
    assert {line["request_id"] for line in requests} == {"abc-123"}
    assert all(line["milliseconds"] > 0 for line in requests)


def test_large_image_does_not_starve_small_ones(tiny: Path) -> None:
    """100 megapixels are thousands of windows, far more than the queue has slots. Meanwhile small
    images are admitted, take turns with it and are done in time."""
    large = encode(nuclei(200, 200)[0].repeat(50, axis=0).repeat(50, axis=1))
    with serving(UNET_WEIGHTS_DIR=str(tiny), UNET_REQUEST_TIMEOUT_S="1000") as server:
        client = threading.Thread(target=_post_and_disconnect, args=(server, large, 15))
        client.start()
        until = time.monotonic() + 30
        while server.metric("unet_batch_windows_sum") < 20:
            assert time.monotonic() < until
            time.sleep(0.02)
        for _ in range(10):
            headers = PNG | {"X-Request-Timeout": "10"}
            answer = httpx.post(f"{server.url}/segment", content=SMALL, headers=headers)
            assert answer.status_code == 200
        assert server.metric("unet_windows_reserved") > 100
        client.join()
