"""Inputs that count as an image, and how results are decoded."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from app.api.body.form import FormParser
from app.imaging.tiff import encode_tiff, stack_tiff
from app.imaging.webp import encode_webp
from tests.conftest import decode, encode, nuclei
from tests.unit.clients.fake_server import Connect, FakeServer, ReceivedRequest
from unet_client import SegmentationResult, encode_image

IMAGE = encode(nuclei(40, 50)[0])


def read_form(request: ReceivedRequest) -> tuple[str, bytes]:
    """Name and content of the only file in a form, as the service reads them."""
    parser = FormParser(request.headers["content-type"])
    parser.feed(request.body)
    parser.finish()
    (part,) = parser.files
    return part.name, b"".join(part.chunks)


def result(content: bytes, output: str = "mask") -> SegmentationResult:
    return SegmentationResult(content, httpx.Headers(), {output: content})


def test_image_may_be_a_path_bytes_or_a_file(
    fake: FakeServer, connect: Connect, tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(IMAGE)
    with connect(fake.url) as client:
        for image in (IMAGE, bytearray(IMAGE), memoryview(IMAGE), io.BytesIO(IMAGE)):
            assert client.segment(image).content == IMAGE
        with path.open("rb") as file:
            for named in (path, str(path), file):
                client.segment(named)
                assert read_form(fake.requests[-1]) == ("image.png", IMAGE)


@pytest.mark.parametrize("name", ["Zelle ä 1.png", 'a"b.png', "スキャン.tif"])
def test_name_of_a_file_is_sent_as_the_service_reads_it(
    fake: FakeServer, connect: Connect, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(IMAGE)
    with connect(fake.url) as client:
        client.segment(tmp_path / name)
    assert read_form(fake.requests[0]) == (name, IMAGE)


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
    polygons = result(content, "polygons")
    assert polygons.polygons() == {"type": "FeatureCollection", "features": []}
    with pytest.raises(ValueError, match=r"\.polygons\(\)"):
        polygons.image()


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_tiff_is_read_with_its_values(kind: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(kind)
    image = result(encode_tiff(values)).image()
    assert image.dtype == kind
    np.testing.assert_array_equal(image, values)


def test_labels_of_32_bits_are_read() -> None:
    labels = np.array([[0, 65_536], [1, 2_000_000]], np.uint32)
    np.testing.assert_array_equal(result(encode_tiff(labels)).image(), labels)


def test_stack_is_read_page_by_page() -> None:
    pages = [np.full((3, 4), value, np.uint8) for value in (1, 2, 3)]
    stack = result(stack_tiff([encode_tiff(page) for page in pages])).image()
    np.testing.assert_array_equal(stack, pages)


def test_color_and_transparency_are_read() -> None:
    cutout = np.full((4, 5, 4), 100, np.uint8)
    for content in (encode(cutout), encode_tiff(cutout), encode_webp(cutout)):
        assert result(content, "cutout").image().shape == (4, 5, 4)


def test_masks_may_be_larger_than_pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    mask = np.full((20, 20), 255, np.uint8)
    np.testing.assert_array_equal(result(encode(mask)).image(), mask)
    assert Image.MAX_IMAGE_PIXELS == 100
