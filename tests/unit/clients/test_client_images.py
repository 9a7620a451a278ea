"""Inputs that count as an image, and how results are decoded."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import decode, encode, nuclei
from tests.unit.clients.fake_server import Connect, FakeServer
from unet_client import SegmentationResult, encode_image

IMAGE = encode(nuclei(40, 50)[0])


def result(content: bytes, content_type: str = "image/png") -> SegmentationResult:
    return SegmentationResult(content, httpx.Headers({"Content-Type": content_type}))


def test_image_may_be_a_path_bytes_or_a_file(
    fake: FakeServer, connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(IMAGE)
    with connect(fake.url) as client:
        for image in (path, str(path), IMAGE, bytearray(IMAGE), memoryview(IMAGE)):
            assert client.segment(image).content == IMAGE
        with path.open("rb") as file:
            assert client.segment(file).content == IMAGE
        assert client.segment(io.BytesIO(IMAGE)).content == IMAGE


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 4), "u1"), ((5, 4, 3), "u1"), ((5, 4), "<u2"), ((5, 4), ">u2")],
)
def test_array_is_sent_without_loss(
    fake: FakeServer, connect: Connect, shape: tuple[int, ...], dtype: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    with connect(fake.url) as client:
        for array in (pixels, pixels[:, ::-1]):
            np.testing.assert_array_equal(decode(client.segment(array).content), array)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "got NoneType"),
        (io.StringIO("text"), "got StringIO"),
        (np.zeros((4, 4, 3), np.uint16), r"got \(4, 4, 3\) of uint16"),
        (np.zeros((4, 4)), "of float64"),
        (np.zeros((4, 4, 4), np.uint8), r"got \(4, 4, 4\)"),
        (np.zeros((0, 4), np.uint8), r"got \(0, 4\)"),
        (np.zeros(4, np.uint8), r"got \(4,\)"),
    ],
)
def test_anything_else_raises_type_error_that_lists_what_is_allowed(
    fake: FakeServer, connect: Connect, image: object, message: str
) -> None:
    with (
        connect(fake.url) as client,
        pytest.raises(TypeError, match=f"an image must be a path.*{message}"),
    ):
        client.segment(image)  # type: ignore[arg-type]
    assert not fake.requests


def test_encoded_image_is_sent_as_it_is() -> None:
    encoded = encode_image(nuclei(40, 50)[0])
    np.testing.assert_array_equal(decode(encoded), nuclei(40, 50)[0])
    assert encode_image(encoded) is encoded


def test_mask_is_read_as_an_array() -> None:
    mask = result(encode(np.eye(4, dtype=np.uint8)))
    assert mask.image().dtype == np.uint8
    assert mask.image().trace() == 4
    with pytest.raises(ValueError, match='output="polygons"'):
        mask.polygons()


def test_16_bit_output_is_read_as_uint16() -> None:
    probability = np.array([[0, 1], [40_000, 65_535]], np.uint16)
    image = result(encode(probability)).image()
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, probability)


def test_palette_png_is_read_as_class_indices() -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    np.testing.assert_array_equal(result(buffer.getvalue()).image(), [[0, 1], [2, 1]])


def test_polygons_are_read_as_geojson() -> None:
    content = b'{"type": "FeatureCollection", "features": []}'
    polygons = result(content, "application/geo+json")
    assert polygons.polygons() == {"type": "FeatureCollection", "features": []}
    with pytest.raises(ValueError, match=r"\.polygons\(\)"):
        polygons.image()


def test_masks_may_be_larger_than_pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    mask = np.full((20, 20), 255, np.uint8)
    np.testing.assert_array_equal(result(encode(mask)).image(), mask)
    assert Image.MAX_IMAGE_PIXELS == 100
