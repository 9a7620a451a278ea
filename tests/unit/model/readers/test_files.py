"""Pictures that other programs wrote: cjpeg, OpenJPEG, Netpbm, pypng and libraries of codecs."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import png as pypng
import pytest
from PIL import Image

from model.pixels import decode_image
from tests.conftest import FIXTURES

FOLDER = FIXTURES / "formats"
REFERENCE = np.asarray(Image.open(FOLDER / "reference.png"))
GREY = np.asarray(Image.open(FOLDER / "reference.png").convert("L"))
DEEP, DEEP_GREY = (values.astype(np.uint16) * 255 + 37 for values in (REFERENCE, GREY))

EXACT = {
    "windows.bmp": REFERENCE,
    "os2.bmp": REFERENCE,
    "metadata.png": REFERENCE,
    "plain.jp2": REFERENCE,
    "tiles.j2k": REFERENCE,
    "grey-2-bits.png": GREY // 64 * 85,
    "interlaced-16-bits.png": DEEP,
    "16-bits.j2k": DEEP,
    "grey-12-bits.jp2": np.rint(GREY * 16.0 * 65535 / 4095),
    "grey-alpha-16-bits.png": np.floor(DEEP_GREY.astype(float) ** 2 / 65535 + 0.5),
}
NEAR = {
    **dict.fromkeys(
        [
            *("baseline.jpg", "progressive.jpg", "arithmetic.jpg", "arithmetic-progressive.jpg"),
            *("rgb.jpg", "subsampled-4x2.jpg", "subsampled-3x1.jpg", "restart-intervals.jpg"),
            *("three-scans.jpg", "optimized.jpg", "grey-2x2.jpg", "lossy.jp2", "sycc-420.jp2"),
        ],
        2.7,
    ),
    **dict.fromkeys(
        [
            *("os2-palette.bmp", "palette-4-bits.bmp", "interlaced-palette.png"),
            *("plain.gif", "interlaced.gif"),
        ],
        4.6,
    ),
}
"""Mean difference from the reference that compression or 14 colors may cause."""


@pytest.mark.parametrize("name", EXACT)
def test_a_lossless_file_is_read_exactly(name: str) -> None:
    pixels = decode_image((FOLDER / name).read_bytes())
    assert pixels.shape == EXACT[name].shape
    assert (pixels == EXACT[name]).all()


@pytest.mark.parametrize("name", NEAR)
def test_a_lossy_file_is_near_the_reference(name: str) -> None:
    pixels = decode_image((FOLDER / name).read_bytes())
    expected = GREY if name.startswith("grey") else REFERENCE
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(float) - expected).mean() < NEAR[name]


def test_bilevel_files_of_two_formats_agree() -> None:
    pixels = decode_image((FOLDER / "bilevel.png").read_bytes())
    *_, rows, _ = pypng.Reader(bytes=(FOLDER / "bilevel.png").read_bytes()).read()
    assert (pixels == np.vstack(list(rows)) * 255).all()
    assert (pixels == decode_image((FOLDER / "bilevel.bmp").read_bytes())).all()


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_png_of_pypng_is_read_exactly(
    bits: int, grey: bool, alpha: bool, interlace: bool
) -> None:
    height, width = GREY.shape
    colors = (GREY[:, :, None] if grey else REFERENCE).astype(np.uint16)
    if bits == 16:
        colors = colors * 255 + 37
    full = (1 << bits) - 1
    opacity = np.full((height, width, 1), full, np.uint16)
    opacity[: height // 2] = full // 3
    samples = np.dstack([colors, opacity]) if alpha else colors
    buffer = io.BytesIO()
    writer = pypng.Writer(
        width, height, greyscale=grey, alpha=alpha, bitdepth=bits, interlace=interlace
    )
    writer.write(buffer, samples.reshape(height, -1).tolist())
    pixels = decode_image(buffer.getvalue())
    assert pixels.dtype == (np.uint16 if bits == 16 else np.uint8)
    laid = np.floor(colors * (opacity / full) + 0.5) if alpha else colors
    assert (pixels.reshape(height, width, -1) == laid).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_palette_of_few_bits_is_read_exactly(bits: int) -> None:
    indices = GREY >> (8 - bits)
    palette = [(7 * i, 255 - 5 * i, i) for i in range(1 << bits)]
    buffer = io.BytesIO()
    writer = pypng.Writer(GREY.shape[1], GREY.shape[0], bitdepth=bits, palette=palette)
    writer.write(buffer, indices.tolist())
    expected = np.array(palette, np.uint8)[indices]
    assert (decode_image(buffer.getvalue()) == expected).all()


def test_lossless_and_twelve_bit_jpegs_are_read_at_full_depth() -> None:
    assert (decode_image(imagecodecs.jpeg8_encode(REFERENCE, lossless=True)) == REFERENCE).all()
    assert (decode_image(imagecodecs.jpeg8_encode(DEEP, lossless=True)) == DEEP).all()
    data = imagecodecs.jpeg8_encode(REFERENCE.astype(np.uint16) * 16, bitspersample=12, level=98)
    pixels = decode_image(data)
    assert pixels.dtype == np.uint16
    assert np.abs(pixels / 257 - REFERENCE * (4080 / 4095)).mean() < 1.5
