"""Traces through a real collector: the service sends OTLP to it, and it forwards what it got.

The collector is Rotel, because PyPI has it. The OpenTelemetry project's own is not on PyPI, npm or
in Debian.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.conftest import encode, nuclei, serving
from tests.otlp import Receiver, receiving
from tests.scale.ports import free_port

IMAGE = encode(nuclei(60, 60)[0])
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
COUNT = 50


@contextlib.contextmanager
def collecting(target: Receiver, folder: Path) -> Iterator[str]:
    """Run a collector that forwards traces to `target`, and return the address it listens on."""
    spec = importlib.util.find_spec("rotel")
    assert spec, "the collector is missing: pip install 'unet-server[scale]'"
    assert spec.origin
    port = free_port()
    command = [
        str(Path(spec.origin).parent / "rotel-agent"),
        "start",
        f"--pid-file={folder / 'rotel.pid'}",
        f"--log-file={folder / 'rotel.log'}",
        f"--otlp-http-endpoint=127.0.0.1:{port}",
        f"--otlp-grpc-endpoint=127.0.0.1:{free_port()}",
        "--exporter=otlp",
        "--otlp-exporter-protocol=http",
        f"--otlp-exporter-endpoint={target.url}",
        "--otlp-exporter-compression=gzip",
        "--batch-timeout=200ms",
    ]
    log = folder / "collector.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/")
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def test_every_span_of_a_loaded_service_passes_the_collector(tiny: Path, tmp_path: Path) -> None:
    with receiving() as receiver, collecting(receiver, tmp_path) as collector:
        environment = {
            "UNET_WEIGHTS_DIR": str(tiny),
            "UNET_MAX_BATCH": "4",
            "UNET_MAX_WAIT_MS": "20",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
            "OTEL_SERVICE_NAME": "masks",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with serving(**environment) as server, ThreadPoolExecutor(8) as clients:

            def post(number: int) -> int:
                return httpx.post(
                    f"{server.url}/segment",
                    content=IMAGE,
                    headers={
                        "Content-Type": "image/png",
                        "traceparent": f"00-{number:032x}-{CALLER}-01",
                        "tracestate": "vendor=1",
                    },
                    timeout=60,
                ).status_code

            assert set(clients.map(post, range(1, COUNT + 1))) == {200}
            server.stop()  # the last spans are sent before the process ends
        requests = receiver.wait_for(lambda span: span.name == "POST /segment", COUNT)
        receiver.wait_for(lambda span: span.name == "encode", COUNT)
        receiver.wait_for(lambda span: span.name == "image", COUNT)
        spans = list(receiver.spans)
    assert {span.service["service.name"] for span in spans} == {"masks"}
    assert {span.trace for span in requests} == {f"{n:032x}" for n in range(1, COUNT + 1)}
    assert {span.parent for span in requests} == {CALLER}
    for request in requests:
        (image,) = (span for span in spans if span.parent == request.id)
        stages = {span.name for span in spans if span.parent == image.id}
        assert stages == {"decode", "queue", "infer", "stitch", "encode"}
    served = {link for span in spans if span.name == "batch" for link in span.links}
    assert served == {(span.trace, span.id) for span in spans if span.name == "image"}
    assert len([span for span in spans if span.name == "batch"]) < COUNT
