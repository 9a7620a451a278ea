"""Bytes that are not an image are named, if they are nothing or text of a known kind."""

from __future__ import annotations

import base64
import random
import time

import numpy as np
import pytest

from app.errors import CorruptImage
from app.imaging import decode
from app.imaging.no_image import check_not_empty, name_text
from tests.conftest import encode

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "JPEG2000")
PNG = encode(RGB)
BASE64 = base64.b64encode(PNG)
FORM = b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + PNG
NAMES = {
    b"data:image/png;base64," + BASE64: "a data URL",
    b"data:;base64," + BASE64: "a data URL",
    BASE64: "base64 text",
    base64.encodebytes(PNG): "base64 text",
    base64.urlsafe_b64encode(encode(RGB, "JPEG")): "base64 text",
    b'"' + BASE64 + b'"': "base64 text",
    b'{"image": "' + BASE64 + b'"}': "JSON",
    b'\xef\xbb\xbf [\n  "a"]': "JSON",
    b"[[0, 255]]": "JSON",
    b"{}": "JSON",
    FORM: "a multipart form",
    b"<!DOCTYPE html>\n<title>404</title>": "an HTML page",
    b"file=%89PNG%0D%0A": "a URL-encoded form",
    b"output=polygons&file=" + BASE64: "a URL-encoded form",
    b"cells.png": "the text 'cells.png'",
    "Zellkörper.png\n".encode(): "the text 'Zellkörper.png'",
    b"x" * 100: f"the text '{'x' * 60}...'",
}


@pytest.mark.parametrize("data", NAMES, ids=lambda data: repr(data[:12]))
def test_text_is_named(data: bytes) -> None:
    name = NAMES[data]
    assert name_text(data) == name
    with pytest.raises(CorruptImage) as caught:
        decode.inspect(data, max_pixels=10**8)
    assert str(caught.value).startswith(
        f"not a recognised image ({len(data)} bytes): {name}; send "
    )


@pytest.mark.parametrize("format", FORMATS)
def test_base64_of_every_accepted_format_is_named(format: str) -> None:
    assert name_text(base64.b64encode(encode(RGB, format))) == "base64 text"


@pytest.mark.parametrize("format", FORMATS)
def test_images_are_not_text(format: str) -> None:
    assert name_text(encode(RGB, format)) is None


@pytest.mark.parametrize("data", [b"\x1b[0m", b"\xff\xfe1\0", b"two\nlines", b"x = 1\n" * 100])
def test_other_bytes_are_only_not_an_image(data: bytes) -> None:
    assert name_text(data) is None
    with pytest.raises(
        CorruptImage, match=r"^not a recognised image \(\d+ bytes\); send JPEG, PNG"
    ):
        decode.inspect(data, max_pixels=10**8)


def test_noise_is_not_text() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        assert name_text(rng.randbytes(600)) is None


def test_empty_file_is_named() -> None:
    for check in (check_not_empty, lambda data: decode.inspect(data, max_pixels=10**8)):
        with pytest.raises(CorruptImage, match=r"^empty file \(0 bytes\); send JPEG, PNG"):
            check(b"")
    check_not_empty(b".")


@pytest.mark.parametrize(
    "beginning", [b" ", b"{ ", b"--", b"a", b"a=", b"iVBORw0KGgo", b"data:", b"<html"]
)
def test_time_does_not_grow_with_the_file(beginning: bytes) -> None:
    data = beginning * (30_000_000 // len(beginning))
    started = time.perf_counter()
    name_text(data)
    assert time.perf_counter() - started < 0.1
