"""BMP of every header, depth and set of masks."""

from __future__ import annotations

import numpy as np
import pytest

from model.pixels import decode_image
from model.readers.base import DamagedImage, MissingPixels, UnsupportedKind
from tests.unit.model.readers.writers import bits_of, bmp

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 31, 3), np.uint8)
ROWS = [row.tobytes() for row in RGB[:, :, ::-1]]
HEADERS = (40, 52, 56, 108, 124)
USUAL = (0xFF0000, 0xFF00, 0xFF)
MASKS = {
    "8888": (32, USUAL),
    "8888 reversed": (32, (0xFF, 0xFF00, 0xFF0000)),
    "8888, red last": (32, (0xFF000000, 0xFF0000, 0xFF00)),
    "101010": (32, (0x3FF00000, 0xFFC00, 0x3FF)),
    "565": (16, (0xF800, 0x7E0, 0x1F)),
    "555": (16, (0x7C00, 0x3E0, 0x1F)),
    "444": (16, (0xF00, 0xF0, 0xF)),
    "332": (16, (0xE0, 0x1C, 0x3)),
}


def packed(values: np.ndarray, masks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (H, W) with 8-bit values (H, W, C) reduced to masks, and the values as read."""
    pixels = np.zeros(values.shape[:2], np.uint64)
    read = []
    for channel, mask in enumerate(masks):
        shift, top = (mask & -mask).bit_length() - 1, mask >> ((mask & -mask).bit_length() - 1)
        reduced = np.rint(values[:, :, channel] / 255 * top).astype(np.uint64)
        pixels |= reduced << np.uint64(shift)
        read.append(reduced * (65535 if top > 255 else 255) // top)
    return pixels.astype(np.uint32), np.dstack(read)


@pytest.mark.parametrize("header", [12, 16, 40, 52, 56, 64, 108, 124])
def test_every_header_is_read(header: int) -> None:
    assert (decode_image(bmp(ROWS, 31, 24, header=header)) == RGB).all()


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_any_layout_are_read(kind: str, header: int) -> None:
    bits, masks = MASKS[kind]
    pixels, read = packed(RGB, masks)
    data = bmp(bits_of(pixels, bits), 31, bits, header=header, compression=3, masks=masks)
    assert (decode_image(data) == read).all()


def test_rows_may_start_at_the_top_later_in_the_file_or_lack_the_last_padding() -> None:
    assert (decode_image(bmp(ROWS, 31, 24, top_down=True)) == RGB).all()
    assert (decode_image(bmp(ROWS, 31, 24, gap=17)) == RGB).all()
    assert (decode_image(bmp(ROWS, 31, 24)[:-3]) == RGB).all()
    assert (decode_image(bmp(ROWS, 31, 24) + b"rest") == RGB).all()


@pytest.mark.parametrize("header", [40, 108, 124])
def test_thirty_two_bits_without_masks_have_no_alpha(header: int) -> None:
    pixels, _ = packed(RGB, USUAL)
    for unused in (0, 0x7F000000, 0xFF000000):
        rows = bits_of(pixels | np.uint32(unused), 32)
        assert (decode_image(bmp(rows, 31, 32, header=header)) == RGB).all()


@pytest.mark.parametrize(("header", "compression"), [(40, 6), (56, 3), (108, 3), (124, 3)])
@pytest.mark.parametrize("masks", [(*USUAL, 0xFF000000), (0xF00, 0xF0, 0xF, 0xF000)])
def test_alpha_counts_unless_it_is_zero_everywhere(
    header: int, compression: int, masks: tuple[int, ...]
) -> None:
    bits = 32 if masks[0] > 0xFFFF else 16

    def decoded(alpha: int) -> tuple[np.ndarray, np.ndarray]:
        values = np.dstack([RGB, np.full(RGB.shape[:2], alpha)])
        pixels, read = packed(values, masks)
        rows = bits_of(pixels, bits)
        options = {"header": header, "compression": compression, "masks": masks}
        return decode_image(bmp(rows, 31, bits, **options)), read[:, :, :3].astype(int)

    for opaque in (0, 255):
        pixels, read = decoded(opaque)
        assert (pixels == read).all()
    pixels, read = decoded(51)
    assert np.abs(pixels - read / 5).max() <= 0.5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("header", [12, 40, 64, 124])
def test_palettes_are_read(bits: int, header: int) -> None:
    colors = RNG.integers(0, 256, (1 << bits, 3), np.uint8)
    size = 3 if header == 12 else 4
    palette = b"".join(bytes(color[::-1]).ljust(size, b"\0") for color in colors)
    indices = RNG.integers(0, 1 << bits, (20, 31))
    data = bmp(bits_of(indices, bits), 31, bits, header=header, palette=palette)
    assert (decode_image(data) == colors[indices]).all()


def test_a_palette_may_be_short_and_a_grey_one_gives_one_channel() -> None:
    indices = RNG.integers(0, 11, (20, 31))
    palette = b"".join(bytes([20 * i, 20 * i, 20 * i, 0]) for i in range(11))
    data = bmp(bits_of(indices, 8), 31, 8, palette=palette, colors=11)
    assert (decode_image(data) == indices * 20).all()
    beyond = bmp(bits_of(indices + 1, 8), 31, 8, palette=palette, colors=11)
    assert (decode_image(beyond) == np.where(indices == 10, 0, indices * 20 + 20)).all()


def run_lengths(indices: np.ndarray) -> bytes:
    """RLE8 with a run of one pixel each."""
    rows = (b"".join(bytes([1, index]) for index in row) + b"\0\0" for row in indices[::-1])
    return b"".join(rows) + b"\0\1"


@pytest.mark.parametrize("header", [40, 64, 108, 124])
def test_run_lengths_are_read(header: int) -> None:
    indices = RNG.integers(0, 8, (20, 31), np.uint8)
    colors = RNG.integers(0, 256, (8, 3), np.uint8)
    palette = b"".join(bytes(color[::-1]) + b"\0" for color in colors)
    rows = bits_of(indices, 8)
    options = {"header": header, "compression": 1, "palette": palette, "colors": 8}
    data = bmp(rows, 31, 8, body=run_lengths(indices), **options)
    assert (decode_image(data) == colors[indices]).all()
    with pytest.raises(ValueError, match="not enough image data"):
        decode_image(bmp(rows, 31, 8, body=run_lengths(indices)[:400], **options))


@pytest.mark.parametrize("header", HEADERS)
def test_incomplete_header_is_damage(header: int) -> None:
    whole = bmp(ROWS, 31, 24, header=header)
    for length in range(2, 50):
        with pytest.raises(DamagedImage, match="the header of the BMP is incomplete"):
            decode_image(whole[:length])


def test_missing_rows_are_counted() -> None:
    whole = bmp(ROWS, 31, 24)
    with pytest.raises(MissingPixels, match="19 of its 20 rows"):
        decode_image(whole[:-20])
    with pytest.raises(MissingPixels, match="0 of its 20 rows"):
        decode_image(whole[:54])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"compression": 4}, "JPEG inside"),
        ({"compression": 5}, "PNG inside"),
        ({"compression": 11}, "compression 11"),
        ({"compression": 4, "header": 64}, "OS/2"),
    ],
)
def test_kinds_that_are_not_read_are_named(options: dict[str, int], name: str) -> None:
    with pytest.raises(UnsupportedKind, match=name):
        decode_image(bmp(ROWS, 31, 24, **options))
    with pytest.raises(UnsupportedKind, match="64 bits per pixel"):
        decode_image(bmp(ROWS, 31, 64))
