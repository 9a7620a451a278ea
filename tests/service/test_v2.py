"""The Open Inference Protocol against a real process, without a client library."""

from __future__ import annotations

import base64
import gzip
import json
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.checkpoint import load_checkpoint
from tests.conftest import (
    ROOT,
    Post,
    Server,
    decode,
    decode_tensors,
    encode,
    nuclei,
    serving,
    write_tiny,
)
from tests.service.test_timeouts import connected, wait_for

GREY = nuclei(90, 130)[0]
IMAGE = np.repeat(GREY[:, :, None], 3, axis=2)
PNG = encode(GREY)
LENGTH = "Inference-Header-Content-Length"
SLOW = ("-m", "tools.prove.faulty")


def tensor(image: np.ndarray, **changes: Any) -> dict[str, Any]:
    """An input in JSON: one image (H, W, C), or several (N, H, W, C)."""
    batch = image if image.ndim == 4 else image[None]
    return {
        "name": "image",
        "datatype": "UINT8",
        "shape": list(batch.shape),
        "data": batch.ravel().tolist(),
        **changes,
    }


def files(*images: bytes) -> dict[str, Any]:
    """An input in JSON: encoded images."""
    texts = [base64.b64encode(image).decode() for image in images]
    return {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": texts}


def wait_for_images(server: Server, count: int) -> None:
    """Wait until so many images are segmented."""
    until = time.monotonic() + 60
    while server.metric("unet_images_total", model="nuclei") < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def infer(
    server: Server,
    given: dict[str, Any] | list[Any],
    data: bytes | None = None,
    *,
    path: str = "nuclei",
    headers: dict[str, str] | None = None,
    **more: Any,
) -> httpx.Response:
    """POST an inference request, with binary data after its JSON if there is any."""
    inputs = given if isinstance(given, list) else [given]
    body = json.dumps({"inputs": inputs, **more}).encode()
    announced = {} if data is None else {LENGTH: str(len(body))}
    return httpx.post(
        f"{server.url}/v2/models/{path}/infer",
        content=body + (data or b""),
        headers={**announced, **(headers or {})},
        timeout=60,
    )


def binary(kind: str, shape: list[int], data: bytes) -> tuple[dict[str, Any], bytes]:
    """An input whose values are binary data, and that data."""
    size = {"binary_data_size": len(data)}
    return {"name": "image", "datatype": kind, "shape": shape, "parameters": size}, data


def outputs(response: httpx.Response) -> dict[str, np.ndarray]:
    """The tensors of a response by name."""
    assert response.status_code == 200, response.text
    length = response.headers.get(LENGTH)
    return decode_tensors(response.content, int(length) if length else None)[1]


def assert_rejected(response: httpx.Response, status: int, word: str = "") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "request_id", "error"}
    assert problem["error"] == problem["detail"]
    assert word in problem["error"]


@pytest.fixture(scope="module")
def small(tiny: Path) -> Iterator[Server]:
    with serving(UNET_WEIGHTS_DIR=str(tiny)) as running:
        yield running


def test_server_and_model_metadata(server: Server) -> None:
    checkpoint = load_checkpoint(ROOT / "weights" / "nuclei.safetensors")
    metadata = httpx.get(f"{server.url}/v2").json()
    assert (metadata["name"], metadata["extensions"]) == (
        "unet-server",
        ["binary_tensor_data", "model_configuration", "statistics"],
    )
    assert metadata["version"]
    url = f"{server.url}/v2/models/nuclei"
    model = httpx.get(url).json()
    (version,) = model["versions"]
    assert model == httpx.get(f"{url}/versions/{version}").json()
    assert f"nuclei@{version}" == checkpoint.id
    assert model["name"] == "nuclei"
    assert model["platform"] in ("openvino", "torch")
    assert model["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    channels = checkpoint.architecture.out_channels
    assert model["outputs"] == [
        {"name": "mask", "datatype": "UINT8", "shape": [-1, -1, -1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, channels, -1, -1]},
    ]
    for each in (url, f"{url}/versions/{version}"):
        assert httpx.get(f"{each}/ready").json() == {"name": "nuclei", "ready": True}
    for unknown in (
        f"{url}/versions/1",
        "/v2/models/no-such-model",
        f"{url}/trace",
        "/v2/nowhere",
    ):
        for more in ("", "/ready"):
            assert_rejected(httpx.get(httpx.URL(server.url).join(unknown + more)), 404)


def test_index_lists_every_model(server: Server) -> None:
    """Triton's clients send an empty body. The specification of the extension has `ready`."""
    url = f"{server.url}/v2/repository/index"
    until = time.monotonic() + 60
    while (index := httpx.post(url).json())[1]["state"] == "LOADING":
        assert time.monotonic() < until
        time.sleep(0.05)
    assert [(each["name"], each["state"]) for each in index] == [
        ("nuclei", "READY"),
        ("person", "READY"),
    ]
    for each in index:
        metadata = httpx.get(f"{server.url}/v2/models/{each['name']}").json()
        assert metadata["versions"] == [each["version"]]
    assert httpx.post(url, content=b'{"ready": true}').json() == index
    assert httpx.post(url, json={}).json() == index
    assert_rejected(httpx.post(url, content=b'{"ready": 1}'), 422, "ready")
    assert_rejected(httpx.post(url, content=b'{"steady": true}'), 422, "unknown parameter 'steady'")
    assert_rejected(httpx.post(url, content=b"{"), 422, "Invalid JSON")
    assert_rejected(httpx.post(url, content=b" " * 20_000), 413)


def test_model_that_cannot_be_served_is_in_the_index(tmp_path: Path) -> None:
    write_tiny(tmp_path / "nuclei.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no checkpoint")
    with serving(UNET_WEIGHTS_DIR=str(tmp_path)) as server:
        url = f"{server.url}/v2/repository/index"
        until = time.monotonic() + 30
        while (broken := httpx.post(url).json()[0])["state"] == "LOADING":
            assert time.monotonic() < until
            time.sleep(0.05)
        assert (broken["name"], broken["state"]) == ("broken", "UNAVAILABLE")
        assert broken["reason"]
        assert "version" not in broken
        (ready,) = httpx.post(url, json={"ready": True}).json()
        assert ready["name"] == "nuclei"


def test_configuration_has_the_tensors_of_the_metadata(server: Server) -> None:
    url = f"{server.url}/v2/models/nuclei"
    metadata, config = httpx.get(url).json(), httpx.get(f"{url}/config").json()
    assert config == httpx.get(f"{url}/versions/{metadata['versions'][0]}/config").json()
    assert config["name"] == "nuclei"
    assert config["max_batch_size"] == 0
    for ours, theirs in (("inputs", "input"), ("outputs", "output")):
        assert config[theirs] == [
            {
                "name": tensor["name"],
                "data_type": f"TYPE_{tensor['datatype']}",
                "dims": tensor["shape"],
            }
            for tensor in metadata[ours]
        ]
    assert_rejected(httpx.get(f"{url}/versions/1/config"), 404, "unknown version '1'")
    assert_rejected(httpx.get(f"{server.url}/v2/models/no/config"), 404, "unknown model 'no'")


def test_statistics_count_images_and_failures(tiny: Path) -> None:
    with serving(UNET_WEIGHTS_DIR=str(tiny)) as server:
        url = f"{server.url}/v2/models/nuclei/stats"

        def read() -> dict[str, Any]:
            (only,) = httpx.get(url).json()["model_stats"]
            return only

        first = read()
        assert (first["name"], first["inference_count"], first["last_inference"]) == (
            "nuclei",
            0,
            0,
        )
        assert infer(server, files(PNG, PNG)).status_code == 200
        assert infer(server, files(b"no image")).status_code == 422
        post_one = httpx.post(f"{server.url}/segment", content=PNG)
        assert post_one.status_code == 200
        assert httpx.post(f"{server.url}/segment", content=b"no image").status_code == 422
        after = read()
        assert after["inference_count"] == after["execution_count"] == 3
        assert abs(after["last_inference"] / 1000 - time.time()) < 60
        stages = after["inference_stats"]
        assert stages["fail"]["count"] == 1  # /v2 reads the size of its images first
        for stage in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
            assert stages[stage]["count"] == 3
        parts = sum(stages[stage]["ns"] for stage in ("compute_input", "compute_infer"))
        assert 0 < stages["compute_infer"]["ns"] < parts
        assert stages["success"]["ns"] > stages["compute_output"]["ns"] > 0
        everything = httpx.get(f"{server.url}/v2/models/stats").json()
        assert everything == {"model_stats": [after]}
        version = f"{server.url}/v2/models/nuclei/versions/{after['version']}/stats"
        assert httpx.get(version).json() == everything


def test_health_matches_the_probes(tiny: Path) -> None:
    with (
        serving(ready=False, program=SLOW, FAULT="slow", UNET_WEIGHTS_DIR=str(tiny)) as server,
        ThreadPoolExecutor(1) as client,
    ):
        assert httpx.get(f"{server.url}/v2/health/live").json() == {"live": True}
        server.wait_ready()
        assert httpx.get(f"{server.url}/v2/health/ready").json() == {"ready": True}
        accepted = client.submit(infer, server, files(*[PNG] * 40))  # the drain waits for it
        wait_for_images(server, 1)
        server.process.terminate()
        answer = httpx.get(f"{server.url}/v2/health/ready")
        while answer.status_code == 200:
            answer = httpx.get(f"{server.url}/v2/health/ready")
        assert answer.status_code == 503
        assert answer.json()["ready"] is False
        assert "draining" in answer.json()["error"]
        assert int(answer.headers["retry-after"]) >= 1
        assert accepted.result().status_code == 200


def test_mask_equals_that_of_segment_in_every_form(server: Server, post: Post) -> None:
    segmented = post(PNG)
    mask = decode(segmented.content)
    pixels = binary("UINT8", [1, *IMAGE.shape], IMAGE.tobytes())
    file = binary("BYTES", [1], len(PNG).to_bytes(4, "little") + PNG)
    everything = {"binary_data_output": True}
    answers = [
        infer(server, tensor(IMAGE)),
        infer(server, tensor(IMAGE, data=[IMAGE.tolist()])),
        infer(server, files(PNG)),
        infer(server, *pixels),
        infer(server, *file),
        infer(server, *pixels, parameters=everything),
        infer(server, *file, outputs=[{"name": "mask"}], parameters=everything),
    ]
    for answer in answers:
        found = outputs(answer)
        assert found["mask"].shape == (1, 90, 130)
        assert np.array_equal(found["mask"][0], mask)
        for header in ("x-model", "x-engine"):
            assert answer.headers[header] == segmented.headers[header]
    kinds = [answer.headers["content-type"] for answer in answers]
    assert kinds == ["application/json"] * 5 + ["application/octet-stream"] * 2
    exact = outputs(answers[5])["probabilities"]
    assert exact.shape == (1, 2, 90, 130)
    threshold = httpx.get(server.url + "/models/nuclei").json()["preprocessing"]["threshold"]
    assert np.array_equal((exact[:, 0] >= threshold) * 255, mask[None])
    assert np.array_equal(outputs(answers[0])["probabilities"], exact)
    assert "probabilities" not in outputs(answers[6])


def test_response_repeats_id_version_and_outputs(small: Server) -> None:
    version = httpx.get(f"{small.url}/v2/models/nuclei").json()["versions"][0]
    wanted = [
        {"name": "probabilities", "parameters": {"binary_data": False}},
        {"name": "mask", "parameters": {"binary_data": True}},
    ]
    path = f"nuclei/versions/{version}"
    answer = infer(small, tensor(IMAGE), id="a\u00e9\n", path=path, outputs=wanted)
    document = json.loads(answer.content[: int(answer.headers[LENGTH])])
    assert (document["id"], document["model_name"]) == ("a\u00e9\n", "nuclei")
    assert document["model_version"] == version
    assert [each["name"] for each in document["outputs"]] == ["probabilities", "mask"]
    assert document["outputs"][1]["parameters"] == {"binary_data_size": 90 * 130}
    assert len(answer.content) == int(answer.headers[LENGTH]) + 90 * 130
    assert outputs(answer)["mask"].shape == (1, 90, 130)
    assert "id" not in json.loads(infer(small, tensor(IMAGE)).content)


def test_batch_equals_single_images(small: Server) -> None:
    images = [nuclei(70, 50, seed)[0] for seed in range(3)]
    batch = outputs(infer(small, files(*map(encode, images))))
    pixels = np.repeat(np.stack(images)[..., None], 3, axis=3)
    for name, values in outputs(infer(small, tensor(pixels))).items():
        assert np.array_equal(values, batch[name])
    for index, image in enumerate(images):
        for name, values in outputs(infer(small, files(encode(image)))).items():
            assert np.array_equal(values[0], batch[name][index])


def test_threshold_applies_to_the_mask(small: Server) -> None:
    probability = outputs(infer(small, tensor(IMAGE)))["probabilities"][:, 0]
    for threshold in (0, 0.25, 0.75, 1):
        mask = outputs(infer(small, tensor(IMAGE), parameters={"threshold": threshold}))["mask"]
        assert np.array_equal(mask, (probability >= np.float32(threshold)) * 255)


def test_multiclass_model(tmp_path: Path) -> None:
    write_tiny(tmp_path / "nuclei.safetensors", classes=3)
    with serving(UNET_WEIGHTS_DIR=str(tmp_path)) as server:
        found = outputs(infer(server, files(PNG)))
        assert found["probabilities"].shape == (1, 3, 90, 130)
        assert np.allclose(found["probabilities"].sum(axis=1), 1, atol=1e-4)
        assert np.array_equal(found["mask"], found["probabilities"].argmax(axis=1))
        kind = {"Content-Type": "image/png"}
        png = httpx.post(f"{server.url}/segment", content=PNG, headers=kind).content
        assert np.array_equal(found["mask"][0], decode(png))
        given = {"threshold": 0.5}
        assert_rejected(infer(server, files(PNG), parameters=given), 422, "binary models")


ONE_PIXEL = np.zeros((1, 1, 1, 3), np.uint8)

REJECTED: dict[str, tuple[dict[str, Any] | list[Any], dict[str, Any], int, str]] = {
    "no input": ([], {}, 422, "image"),
    "another name": (tensor(IMAGE, name="input__0"), {}, 422, "input__0"),
    "one more": ([tensor(ONE_PIXEL), tensor(ONE_PIXEL, name="b")], {}, 422, "one input"),
    "twice": ([tensor(ONE_PIXEL), tensor(ONE_PIXEL)], {}, 422, "twice"),
    "channels": (tensor(GREY[:, :, None]), {}, 422, "(N, H, W, 3)"),
    "channels first": (tensor(IMAGE.transpose(2, 0, 1)), {}, 422, "(N, H, W, 3)"),
    "another output": (tensor(ONE_PIXEL), {"outputs": [{"name": "logits"}]}, 422, "probabilities"),
    "output twice": (tensor(ONE_PIXEL), {"outputs": [{"name": "mask"}] * 2}, 422, "twice"),
    "unknown parameter": (
        tensor(ONE_PIXEL),
        {"parameters": {"treshold": 1}},
        422,
        "available: thr",
    ),
    "threshold of 2": (tensor(ONE_PIXEL), {"parameters": {"threshold": 2}}, 422, "equal to 1"),
    "threshold of a text": (tensor(ONE_PIXEL), {"parameters": {"threshold": "1"}}, 422, "number"),
    "threshold of true": (tensor(ONE_PIXEL), {"parameters": {"threshold": True}}, 422, "number"),
    "timeout of a text": (tensor(ONE_PIXEL), {"parameters": {"timeout": "1"}}, 422, "timeout"),
    "timeout below 0": (tensor(ONE_PIXEL), {"parameters": {"timeout": -1}}, 422, "timeout"),
    "timeout too short": (tensor(ONE_PIXEL), {"parameters": {"timeout": 1}}, 504, ""),
    "huge shape": (tensor(ONE_PIXEL, shape=[1, 2**31, 2**31, 3]), {}, 422, "shape"),
    "huge batch": (tensor(ONE_PIXEL, shape=[10**9, 1, 1, 3]), {}, 413, "batch"),
    "not an image": (files(b"text"), {}, 422, ""),
    "empty file": (files(b""), {}, 422, ""),
    "one of them not an image": (files(PNG, b"text"), {}, 422, "image 1"),
    "one of them truncated": (files(PNG, PNG[:-200]), {}, 422, "image 1"),
    "an unsupported format": (files(encode(GREY, "PPM")), {}, 415, "PPM"),
    "sizes that differ": (files(PNG, encode(GREY[:50])), {}, 422, "130 x 90"),
    "not that model": (tensor(ONE_PIXEL), {"path": "no-such-model"}, 404, "nuclei"),
    "not that version": (tensor(ONE_PIXEL), {"path": "nuclei/versions/1"}, 404, "version"),
    "no timeout": (tensor(ONE_PIXEL), {"headers": {"X-Request-Timeout": "soon"}}, 422, "Timeout"),
    "no length": (tensor(ONE_PIXEL), {"headers": {LENGTH: "-1"}}, 422, LENGTH),
    "long length": (tensor(ONE_PIXEL), {"headers": {LENGTH: "9" * 5000}}, 422, LENGTH),
    "length beyond": (tensor(ONE_PIXEL), {"headers": {LENGTH: "100000"}}, 422, "100000"),
    "compressed": (tensor(ONE_PIXEL), {"headers": {"Content-Encoding": "br"}}, 415, "br"),
    "surrogate": (tensor(ONE_PIXEL, name="\ud800"), {}, 422, "hex escape"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_invalid_request_is_named(small: Server, case: str) -> None:
    given, more, status, word = REJECTED[case]
    assert_rejected(infer(small, given, **more), status, word)
    assert small.metric("unet_windows_reserved") == 0


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"inputs": NaN}', b"[" * 100_000])
def test_malformed_body_is_422(small: Server, body: bytes) -> None:
    assert_rejected(httpx.post(f"{small.url}/v2/models/nuclei/infer", content=body), 422)


@pytest.mark.parametrize(
    ("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_request_may_be_compressed(
    small: Server, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    given, data = binary("UINT8", [1, *IMAGE.shape], IMAGE.tobytes())
    text = json.dumps({"inputs": [given]}).encode()
    url = f"{small.url}/v2/models/nuclei/infer"
    headers = {"Content-Encoding": coding, LENGTH: str(len(text))}
    compressed = compress(text + data)
    plain = outputs(infer(small, given, data))["mask"]
    answer = httpx.post(url, content=compressed, headers=headers)
    assert np.array_equal(outputs(answer)["mask"], plain)
    for damaged in (compressed[:-9], compressed + b"more", text + data, b""):
        assert_rejected(httpx.post(url, content=damaged, headers=headers), 422, coding)
    bomb = compress(bytes(129_000_000))
    assert_rejected(httpx.post(url, content=bomb, headers=headers), 413, "decompresses")


def test_too_large_is_rejected_before_it_takes_memory(tiny: Path) -> None:
    limits = {"UNET_MAX_UPLOAD_MB": "1", "UNET_QUEUE_MB": "1", "UNET_MAX_MEGAPIXELS": "0.1"}
    wide = np.zeros((300, 400, 3), np.uint8)
    with serving(UNET_WEIGHTS_DIR=str(tiny), **limits) as server:
        for given in (files(encode(wide)), binary("UINT8", [1, *wide.shape], wide.tobytes())):
            sent = given if isinstance(given, tuple) else (given,)
            assert_rejected(infer(server, *sent), 413, "megapixels")
        assert_rejected(infer(server, files(b"\0" * 800_000)), 413, "MB")
        fits = np.zeros((240, 400), np.uint8)
        assert_rejected(infer(server, files(encode(fits))), 413, "response")
        only = [{"name": "mask", "parameters": {"binary_data": True}}]
        assert outputs(infer(server, files(encode(fits)), outputs=only))["mask"].size == 96_000
        many = b'{"inputs": [' + b"[]," * 300_000 + b"[]]}"
        url = f"{server.url}/v2/models/nuclei/infer"
        assert_rejected(httpx.post(url, content=many[:900_000]), 413, "JSON")
        assert server.metric("unet_images_total", model="nuclei") == 1
        wait_for(server, "unet_held_bytes", 0)
        wait_for(server, "unet_held_pixels", 0)


def test_api_keys_apply_to_v2(tiny: Path) -> None:
    with serving(UNET_WEIGHTS_DIR=str(tiny), UNET_API_KEYS="sesame") as closed:
        for path in ("", "/models/nuclei", "/models/nuclei/ready", "/models/no-such-model"):
            assert_rejected(httpx.get(f"{closed.url}/v2{path}"), 401)
        assert_rejected(infer(closed, tensor(ONE_PIXEL)), 401)
        for path in ("/health/live", "/health/ready"):
            assert httpx.get(f"{closed.url}/v2{path}").status_code == 200
        key = {"X-API-Key": "sesame"}
        assert httpx.get(f"{closed.url}/v2/models/nuclei", headers=key).status_code == 200
        assert infer(closed, tensor(ONE_PIXEL), headers=key).status_code == 200


def test_client_disconnect_frees_everything(tiny: Path) -> None:
    body = json.dumps({"inputs": [files(*[PNG] * 40)]}).encode()
    head = (
        f"POST /v2/models/nuclei/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with serving(program=SLOW, FAULT="slow", UNET_WEIGHTS_DIR=str(tiny)) as server:
        with connected(server) as leaving:
            leaving.sendall(head.encode() + body)
            wait_for_images(server, 1)
        for gauge in ("windows_reserved", "held_bytes", "held_pixels"):
            wait_for(server, f"unet_{gauge}", 0)
        assert server.metric("unet_images_total", model="nuclei") < 40


def test_drain_waits_for_an_accepted_request(tiny: Path) -> None:
    with serving(UNET_WEIGHTS_DIR=str(tiny)) as server, ThreadPoolExecutor(1) as client:
        asked = client.submit(infer, server, files(*[PNG] * 100))
        wait_for_images(server, 3)
        server.process.terminate()
        assert outputs(asked.result())["mask"].shape == (100, 90, 130)
        assert server.process.wait(10) is not None


def test_metrics_count_images_by_route_template(small: Server) -> None:
    route = "/v2/models/{name}/infer"
    before = small.metric("unet_images_total", model="nuclei")
    answered = small.metric("unet_requests_total", route=route, status="200")
    infer(small, files(PNG, PNG))
    assert small.metric("unet_images_total", model="nuclei") == before + 2
    assert small.metric("unet_requests_total", route=route, status="200") == answered + 1
    assert small.metric("unet_stage_seconds_count", stage="stitch") >= 2
    text = httpx.get(f"{small.url}/metrics").text
    assert "no-such-model" not in text
    assert 'status="500"' not in text
