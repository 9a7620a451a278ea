"""The traces of a running service: over HTTP in, over OTLP out."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.conftest import Server, encode, nuclei, serving
from tests.otlp import ReceivedSpan, Receiver, receiving
from tests.service.test_lifecycle import wait_until

IMAGE = encode(nuclei(60, 60)[0])
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = {"decode", "queue", "infer", "stitch", "encode"}


def post(server: Server, data: bytes = IMAGE, **headers: str) -> httpx.Response:
    kind = {"Content-Type": "image/png"}
    return httpx.post(
        f"{server.url}/segment?min_area=2", content=data, headers=kind | headers, timeout=60
    )


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture(scope="module")
def traced(receiver: Receiver, tiny: Path) -> Iterator[Server]:
    with serving(
        UNET_WEIGHTS_DIR=str(tiny),
        UNET_MAX_BATCH="4",
        UNET_MAX_WAIT_MS="300",
        UNET_LOG_FORMAT="json",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as server:
        yield server


def wait_for_request(receiver: Receiver, answer: httpx.Response) -> ReceivedSpan:
    """The span that a response names."""
    _, trace, span, _ = answer.headers["traceresponse"].split("-")
    return receiver.wait_for(lambda each: (each.trace, each.id) == (trace, span))[0]


def test_request_continues_the_trace_of_its_caller(traced: Server, receiver: Receiver) -> None:
    answer = post(traced, traceparent=f"00-{TRACE}-{CALLER}-01")
    request = wait_for_request(receiver, answer)
    assert (request.trace, request.parent, request.name) == (TRACE, CALLER, "POST /segment")
    assert request.service["service.name"] == "unet-server"
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["unet.request_id"] == answer.headers["x-request-id"]
    assert request.attributes["unet.model"] == answer.headers["x-model"]
    (image,) = receiver.wait_for(lambda span: span.parent == request.id)
    stages = receiver.wait_for(lambda span: span.parent == image.id, len(STAGES))
    assert {span.name for span in stages} == STAGES
    assert all(image.start <= span.start <= span.end <= image.end for span in stages)


def test_one_batch_links_the_requests_that_it_served(traced: Server, receiver: Receiver) -> None:
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda _: post(traced), range(4)))
    requests = {wait_for_request(receiver, answer).trace for answer in answers}
    assert len(requests) == 4
    batches = receiver.wait_for(
        lambda span: span.name == "batch" and any(trace in requests for trace, _ in span.links)
    )
    linked = {trace for batch in batches for trace, _ in batch.links}
    assert linked >= requests
    assert max(len(batch.links) for batch in batches) > 1
    inferences = [span for span in receiver.spans if span.name == "infer"]
    back = {link for span in inferences if span.trace in requests for link in span.links}
    assert back == {(batch.trace, batch.id) for batch in batches}


def test_failed_image_is_an_error_of_its_stage(traced: Server, receiver: Receiver) -> None:
    answer = post(traced, IMAGE[: len(IMAGE) // 2])
    assert answer.status_code == 422
    request = wait_for_request(receiver, answer)
    assert not request.error  # the client's fault
    (stage,) = (s for s in receiver.spans if s.trace == request.trace and s.name == "decode")
    assert stage.error
    assert stage.attributes["error.type"] == "CorruptImage"


def test_log_lines_have_the_ids_of_the_trace(traced: Server) -> None:
    answer = post(traced)
    _, trace, span, _ = answer.headers["traceresponse"].split("-")

    def own_lines() -> list[dict[str, str]]:
        lines = [json.loads(line) for line in list(traced.lines)]
        return [line for line in lines if line.get("request_id") == answer.headers["x-request-id"]]

    wait_until(lambda: len(own_lines()) > 0)
    assert {(line["trace_id"], line["span_id"]) for line in own_lines()} == {(trace, span)}


def test_log_and_traces_hold_neither_keys_nor_headers_nor_names_of_files(
    traced: Server, receiver: Receiver
) -> None:
    answer = httpx.post(
        f"{traced.url}/segment?threshold=0.123",
        files={"file": ("patient-7.png", IMAGE, "image/png")},
        headers={"Authorization": "Bearer key-123", "Cookie": "session=abc"},
        timeout=60,
    )
    assert answer.status_code == 200
    request = wait_for_request(receiver, answer)
    spans = [span for span in receiver.spans if span.trace == request.trace]
    wait_until(lambda: any(request.trace in line for line in list(traced.lines)))
    lines = "\n".join(traced.lines)
    for secret in ("patient-7", "key-123", "session=abc"):
        assert secret not in lines
        assert all(secret not in str(span.attributes) for span in spans)
    assert "0.123" not in lines  # the query


def test_probes_have_no_traces(traced: Server, receiver: Receiver) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/v2/health/live"):
        assert "traceresponse" not in httpx.get(f"{traced.url}{path}").headers
    wait_for_request(receiver, httpx.get(f"{traced.url}/models"))
    assert not [span for span in receiver.spans if re.search("livez|metrics|health", span.name)]


def test_collector_that_does_not_answer_delays_neither_requests_nor_the_end(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {
            "UNET_WEIGHTS_DIR": str(tiny),
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        with serving(**environment) as server:
            start = time.monotonic()
            assert [post(server).status_code for _ in range(20)] == [200] * 20
            assert time.monotonic() - start < 10
            start = time.monotonic()
            server.stop()
            assert time.monotonic() - start < 8


def test_unsupported_exporter_ends_the_start_with_one_line(tiny: Path) -> None:
    environment = {"UNET_WEIGHTS_DIR": str(tiny), "OTEL_TRACES_EXPORTER": "zipkin"}
    with pytest.raises(AssertionError), serving(ready=False, **environment) as server:
        server.wait_ready()
    assert "OTEL_TRACES_EXPORTER='zipkin': must be otlp or none" in "\n".join(server.lines)
