"""No request causes a 5xx, an unbounded allocation, or a leak of another request's data."""

from __future__ import annotations

import base64
import gzip
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.cli.bench.serving import RunningServer
from tests.conftest import Post, Server, encode, nuclei, serving, tiff


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, body: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", body)
        + png_chunk(b"IEND", b"")
    )


def decompression_bomb() -> bytes:
    """745 KB that decompress to 768 MB: 16,000 × 16,000 black pixels."""
    compressor = zlib.compressobj(9)
    row = b"\0" * (16_000 * 3 + 1)
    return png(
        16_000,
        16_000,
        b"".join(compressor.compress(row) for _ in range(16_000)) + compressor.flush(),
    )


def wrong_crc() -> bytes:
    data = bytearray(encode(nuclei(32, 32)[0]))
    data[data.index(b"IDAT") + 10] ^= 0xFF
    return bytes(data)


def psd_head() -> bytes:
    return b"8BPS\x00\x01" + b"\x00" * 100


JPEG = encode(np.asarray(Image.fromarray(nuclei(64, 64)[0]).convert("RGB")), "JPEG")

CASES: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 422),
    "text": (b"this is not an image, whatever its name says", 422),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], 422),
    "png with a wrong crc": (wrong_crc(), 422),
    "png without its last chunk": (encode(nuclei(32, 32)[0])[:-12], 422),
    "png cut after its header": (png(64, 64, b"")[:40], 422),
    "20,000 x 20,000 declared": (png(20_000, 20_000, zlib.compress(b"\0")), 413),
    "random bytes": (np.random.default_rng(0).bytes(5000), 422),
    "a format that is not accepted": (encode(nuclei(16, 16)[0], "PPM"), 415),
    "a document of layers": (psd_head(), 415),
    "a tiff of complex numbers": (tiff(np.ones((9, 9), np.complex64)), 415),
    "a tiff with a compression that is not read": (tiff(np.ones((9, 9)), t259=33003), 415),
    "a tiff of two channels": (tiff(np.zeros((9, 9, 2), np.uint16)), 422),
    "a tiff that ends early": (tiff(np.ones((9, 9)))[:-20], 422),
    "a drawing": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', 415),
}


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert problem["status"] == status
    assert problem["request_id"] == response.headers["x-request-id"]
    assert len(problem["detail"]) > 10
    assert "Traceback" not in problem["detail"]
    return problem


@pytest.mark.parametrize("case", CASES)
def test_invalid_image_is_a_problem(post: Post, case: str) -> None:
    data, status = CASES[case]
    assert_problem(post(data), status)


def test_415_names_the_format_and_lists_supported_ones(post: Post) -> None:
    detail = assert_problem(
        post(psd_head(), headers={"Content-Type": "image/vnd.adobe.photoshop"}), 415
    )["detail"]
    assert all(name in detail for name in ("PSD", "JPEG", "PNG", "TIFF", "WebP", "BMP", "GIF"))


def test_decompression_bomb_takes_no_memory(tiny: Path) -> None:
    """The peak is measured: not even for a moment."""
    data = decompression_bomb()
    assert 700_000 < len(data) < 800_000
    kind = {"Content-Type": "image/png"}
    with serving(UNET_WEIGHTS_DIR=str(tiny)) as server:
        url = f"{server.url}/segment"
        httpx.post(url, content=encode(nuclei(32, 32)[0]), headers=kind)
        process = RunningServer(server.url, server.process.pid, 0)
        process.reset_peak()
        before = process.memory()
        assert_problem(httpx.post(url, content=data, headers=kind, timeout=60), 413)
        after = process.memory()
    assert before is not None
    assert after is not None
    assert after.peak - before.now < 50e6


def test_animation_gives_its_first_frame(post: Post) -> None:
    frames = [Image.fromarray(nuclei(48, 40, seed)[0]) for seed in (0, 1)] * 500
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    response = post(buffer.getvalue())
    assert response.status_code == 200
    alone = io.BytesIO()
    frames[0].save(alone, "GIF")
    assert response.content == post(alone.getvalue()).content


@pytest.mark.parametrize(
    ("query", "status", "word"),
    [
        ({"model": "../nuclei"}, 404, "nuclei"),
        ({"model": "no-such"}, 404, "nuclei"),
        ({"threshold": "1.5"}, 422, "threshold"),
        ({"threshold": "half"}, 422, "threshold"),
        ({"threshold": "nan"}, 422, "threshold"),
        ({"output": "hologram"}, 422, "output"),
        ({"treshold": "0.5"}, 422, "available: model, threshold, output"),
        ({"threshold": ""}, 422, "threshold"),
        ({"threshold": ["0.2", "0.8"]}, 422, "threshold"),
        ({"output": "mask,overlay"}, 422, "output"),
        ({"page": "-1"}, 422, "page: must be the number of a page, from 0, or 'all'"),
        ({"channel": "-1"}, 422, "channel"),
        ({"format": "jpeg"}, 422, "'png', 'tiff' or 'webp'"),
        ({"min_area": "-1"}, 422, "min_area"),
        ({"exclude_edges": "some"}, 422, "exclude_edges"),
        ({"percentiles": "99,1"}, 422, "percentiles: must be LOW,HIGH"),
        ({"percentiles": ["1,99", "2,98"]}, 422, "percentiles is given 2 times"),
        ({"pixel_size": "0"}, 422, "pixel_size"),
        ({"background": "white"}, 422, "background: must be RRGGBB"),
        ({"output": ["mask", "mask"]}, 422, "given twice"),
        ({"model": ""}, 404, "nuclei"),
    ],
)
def test_invalid_parameter_is_named(
    post: Post, query: dict[str, Any], status: int, word: str
) -> None:
    problem = assert_problem(post(encode(nuclei(16, 16)[0]), **query), status)
    assert word in problem["detail"]


@pytest.mark.parametrize(
    "value",
    [
        *("0", "0.0", "-1", "", ".", "soon", "nan", "inf", "1e", "0x10", "1,5"),
        *("9" * 400, "\u0663", "1\u00b2"),
    ],
)
def test_invalid_timeout_is_422(post: Post, value: str) -> None:
    headers = {"X-Request-Timeout": value.encode()}
    problem = assert_problem(post(encode(nuclei(16, 16)[0]), headers=headers), 422)
    assert "X-Request-Timeout" in problem["detail"]


@pytest.mark.parametrize("value", ["20", "20.5", "20.", "2e1", "1000000"])
def test_timeout_is_a_number_of_seconds(post: Post, value: str) -> None:
    headers = {"X-Request-Timeout": value}
    assert post(encode(nuclei(16, 16)[0]), headers=headers).status_code == 200


def test_request_without_a_file_is_422(server: Server) -> None:
    url = f"{server.url}/segment"
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_problem(httpx.post(url, content=b"--x--\r\n", headers=boundary), 422)
    assert_problem(httpx.post(url, data={"file": "text"}, files={"other": b"x"}), 422)
    assert_problem(httpx.post(url, content=b"garbage", headers=boundary), 422)
    no_boundary = {"Content-Type": "multipart/form-data"}
    assert_problem(httpx.post(url, content=b"x", headers=no_boundary), 422)
    assert_problem(httpx.post(url), 422)
    assert_problem(httpx.post(url, json={"file": "x"}), 422)
    assert_problem(httpx.post(url, data={"file": "x"}), 422)


def test_empty_file_is_named_as_such_however_it_is_sent(server: Server) -> None:
    part = {"file": ("a.png", b"", "image/png")}
    answers = [
        httpx.post(f"{server.url}/segment", content=b""),
        httpx.post(f"{server.url}/segment", files=part),
        httpx.post(f"{server.url}/segment", files={"file": (None, b"")}),
        httpx.post(f"{server.url}/segment", params={"page": "all"}, files=part),
        httpx.post(f"{server.url}/api/remove", files=part),
    ]
    details = [assert_problem(answer, 422)["detail"] for answer in answers]
    assert set(details) == {
        "empty file (0 bytes); send JPEG, PNG, TIFF, WebP, BMP, GIF, AVIF or JPEG 2000"
    }


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"json": {"image": base64.b64encode(JPEG).decode()}}, ": JSON; send the image itself"),
        ({"content": base64.b64encode(JPEG)}, ": base64 text; send the bytes that it encodes"),
        ({"content": b"data:image/jpeg;base64," + base64.b64encode(JPEG)}, ": a data URL; send "),
        ({"data": {"file": "cells.png"}}, ": a URL-encoded form; send the image itself"),
        ({"files": {"file": (None, b"cells.png")}}, "with curl as -F file=@cells.png"),
        ({"files": {"file": (None, base64.b64encode(JPEG))}}, "has no file name and is base64 "),
    ],
)
def test_body_that_is_not_the_image_itself_is_named(
    server: Server, body: dict[str, Any], name: str
) -> None:
    answer = httpx.post(f"{server.url}/segment", **body)
    assert name in assert_problem(answer, 422)["detail"]


def test_field_without_a_file_name_does_not_affect_other_files(server: Server) -> None:
    parts = [("file", (None, b"cells.png")), ("file", ("good.jpg", JPEG))]
    answer = httpx.post(
        f"{server.url}/segment", files=parts, headers={"Accept": "application/json"}
    )
    first, second = answer.json()["images"]
    assert first["error"]["status"] == 422
    assert "has no file name" in first["error"]["detail"]
    assert second["name"] == "good"
    assert "error" not in second


def test_truncated_multipart_body_is_422(server: Server) -> None:
    """Even if some of its parts are complete: the client meant to send more."""
    image = encode(nuclei(16, 16)[0])
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    whole = part + image + b"\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (b"--x", part, part + image, whole, whole + part + image[:50], whole + b"--x"):
        answer = httpx.post(f"{server.url}/segment", content=body, headers=headers)
        assert "incomplete" in assert_problem(answer, 422)["detail"], body
    answer = httpx.post(f"{server.url}/segment", content=whole + b"--x--", headers=headers)
    assert answer.status_code == 200
    answer = httpx.post(f"{server.url}/segment", content=b"--x--\r\n", headers=headers)
    assert "no part named 'file'" in assert_problem(answer, 422)["detail"]


@pytest.fixture(scope="module")
def limited(tiny: Path) -> Iterator[Server]:
    """A service that accepts bodies of up to 32 MB."""
    with serving(UNET_WEIGHTS_DIR=str(tiny), UNET_MAX_UPLOAD_MB="32") as running:
        yield running


def send_to(server: Server, data: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    kind = {"Content-Type": "application/octet-stream"}
    return httpx.post(
        f"{server.url}/segment", content=data, headers=kind | (headers or {}), timeout=60
    )


def test_too_many_bytes_are_rejected_while_reading(limited: Server) -> None:
    """With Content-Length or chunked, raw or multipart. The client can read the response."""
    big = b"\0" * 40_000_000
    before = limited.metric("process_resident_memory_bytes")
    assert_problem(send_to(limited, big), 413)

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"\0" * 1_000_000

    url = f"{limited.url}/segment"
    headers = {"Content-Type": "application/octet-stream"}
    assert_problem(httpx.post(url, content=chunks(), headers=headers, timeout=30), 413)
    assert_problem(httpx.post(url, files={"file": ("x.png", big)}, timeout=30), 413)
    assert limited.metric("process_resident_memory_bytes") - before < 120e6


@pytest.mark.parametrize(
    "coding", ["br", "zstd", "compress", "gzip, gzip", "identity, br", "?" * 500]
)
def test_unsupported_content_encoding_lists_supported_ones(server: Server, coding: str) -> None:
    """Even if the body is a valid image as it is: it contradicts its header."""
    image = encode(nuclei(32, 32)[0])
    url, headers = f"{server.url}/segment", {"Content-Encoding": coding}
    raw = {**headers, "Content-Type": "image/png"}
    for answer in (
        httpx.post(url, content=image, headers=raw),
        httpx.post(url, files={"file": ("x.png", image)}, headers=headers),
    ):
        assert coding[:100] in assert_problem(answer, 415)["detail"]
        assert answer.headers["accept-encoding"] == "gzip, deflate"
    twice = [
        ("Content-Encoding", "gzip"),
        ("Content-Encoding", "br"),
        ("Content-Type", "image/png"),
    ]
    assert_problem(httpx.post(url, content=gzip.compress(image), headers=twice), 415)


@pytest.mark.parametrize(
    ("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_body_has_the_same_limits(
    limited: Server, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    image = encode(nuclei(32, 32)[0])
    compressed, headers = compress(image), {"Content-Encoding": coding}
    for damaged in (compressed[:-9], compressed + b"more", image, b""):
        assert coding in assert_problem(send_to(limited, damaged, headers=headers), 422)["detail"]
    assert (
        "empty" in assert_problem(send_to(limited, compress(b""), headers=headers), 422)["detail"]
    )
    before = limited.metric("process_resident_memory_bytes")
    bomb = compress(bytes(300_000_000))
    assert "decompresses" in assert_problem(send_to(limited, bomb, headers=headers), 413)["detail"]
    assert_problem(
        send_to(limited, compress(np.random.default_rng(0).bytes(33_000_000)), headers=headers), 413
    )
    assert limited.metric("process_resident_memory_bytes") - before < 120e6
    form = {**headers, "Content-Type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    bomb = compress(part + bytes(300_000_000))
    answer = httpx.post(f"{limited.url}/segment", content=bomb, headers=form, timeout=30)
    assert "decompresses" in assert_problem(answer, 413)["detail"]
    assert limited.metric("unet_held_bytes") == 0


def test_unknown_routes_and_methods_are_problems(server: Server) -> None:
    detail = assert_problem(httpx.get(f"{server.url}/nowhere"), 404)["detail"]
    assert detail == "/nowhere not found; see /docs"
    assert_problem(httpx.get(f"{server.url}/segment"), 405)
    assert_problem(httpx.get(f"{server.url}/models/..%2Fnuclei"), 404)
    assert_problem(httpx.get(f"{server.url}/models/no-such-model"), 404)
    assert_problem(httpx.get(f"{server.url}/models/"), 404)  # not redirected
    assert_problem(httpx.options(f"{server.url}/segment"), 405)
    assert len(httpx.get(f"{server.url}/{'a' * 5000}").content) < 1000
    text = httpx.get(f"{server.url}/metrics").text
    assert "nowhere" not in text  # a client cannot choose a label


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/segment", "POST"),
        ("HEAD", "/segment", "POST"),
        ("OPTIONS", "/segment", "POST"),
        ("PUT", "/segment", "POST"),
        ("POST", "/models", "GET, HEAD"),
        ("DELETE", "/models/nuclei", "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("POST", "/docs", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
        ("POST", "/static/app.js", "GET, HEAD"),
    ],
)
def test_405_lists_allowed_methods(server: Server, method: str, path: str, allowed: str) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    if method != "HEAD":
        assert allowed in assert_problem(answer, 405)["detail"]


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz", "/models", "/metrics"])
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    get, head = httpx.get(server.url + path), httpx.head(server.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_no_request_above_was_a_500(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    assert 'status="500"' not in text
    assert server.metric("unet_windows_reserved") == 0
    assert server.metric("unet_held_pixels") == 0
