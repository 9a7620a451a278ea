"""TIFFs of every kind -> pixels: each kind is read rightly, or rejected by name."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.errors import DataError
from model.pixels import decode_image
from model.tiff.colors import UnsupportedTiff
from model.tiff.reader import TiffReader
from model.training.images import read_image
from tests.conftest import set_tag, tiff

HEIGHT, WIDTH = 20, 30
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
DEEP = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 109).astype(np.uint16)
DEEP_RGB = np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]])

Order = Literal["<", ">"]
ORDERS: tuple[Order, ...] = ("<", ">")


def read(data: bytes) -> np.ndarray:
    image = TiffReader(data).select()
    pixels = image.read()
    layout = image.layout()
    assert pixels.shape[:2] == (layout.height, layout.width)
    return pixels


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


def damage(data: bytes) -> str:
    """The message of the error that a damaged TIFF raises."""
    try:
        TiffReader(data).select().read()
    except UnsupportedTiff as error:
        pytest.fail(f"not damaged, but {error}")
    except ValueError as error:
        return str(error)
    pytest.fail("not damaged")


def spread(values: np.ndarray) -> np.ndarray:
    """Spread numbers over 16 bits, in the plainest way."""
    low, high = float(values.min()), float(values.max())
    return np.rint((values.astype(np.float64) - low) / (high - low) * 65535).astype(np.uint16)


# --- numbers, orders, layouts ---


def numbers(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of a type that fill (H, W), and the pixels they should become."""
    wide = DEEP.astype(np.float64) - 20_000
    values = {
        "u1": GREY,
        "u2": DEEP,
        "i1": GREY.view(np.int8),
        "i2": wide.astype("i2"),
        "u4": DEEP.astype("u4") * 50_000,
        "i4": wide.astype("i4") * 30_000,
        "u8": DEEP.astype("u8") << np.uint64(40),
        "i8": wide.astype("i8") * 2**40,
        "f2": (wide / 9).astype("f2"),
        "f4": wide.astype("f4"),
        "f8": wide * 1e300,
    }[kind]
    return values, values if kind in ("u1", "u2") else spread(values)


KINDS = ("u1", "u2", "i1", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deflate": {"compression": "zlib"},
    "lzw": {"compression": "lzw"},
    "BigTIFF": {"big": True},
    "planes": {"planes": True},
    "planes, lzw": {"planes": True, "compression": "lzw"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_type_are_read_in_grey_and_in_color(
    kind: str, order: Order, layout: str
) -> None:
    values, expected = numbers(kind)
    options = LAYOUTS[layout]
    if not options.get("planes"):
        assert (read(tiff(values, order=order, **options)) == expected).all()
    rgb = [np.dstack([each, each[::-1], each[:, ::-1]]) for each in (values, expected)]
    assert (read(tiff(rgb[0], 2, order=order, **options)) == rgb[1]).all()


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "u4", "f4"])
def test_white_is_zero_is_inverted(kind: str) -> None:
    values, expected = numbers(kind)
    full = 255 if kind == "u1" else 65535
    assert (read(tiff(values, 0)) == full - expected).all()


def test_integers_within_sixteen_bits_keep_their_values() -> None:
    for kind in ("i2", "u4", "i4", "u8"):
        values = (DEEP // 4).astype(kind)
        assert (read(tiff(values)) == DEEP // 4).all()
        assert (read(tiff(values, 0)) == 65535 - DEEP // 4).all()


def test_floats_that_are_not_finite_are_black() -> None:
    values = np.linspace(-2, 3, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    values[0, :3] = np.nan, np.inf, -np.inf
    for photometric, brightest in ((1, (-1, -1)), (0, (0, 3))):
        pixels = read(tiff(values, photometric))
        assert (pixels[0, :3] == 0).all()
        assert pixels[brightest] == pixels.max() == 65535
    assert (read(tiff(np.full((4, 4), np.inf, np.float32))) == 0).all()
    assert (read(tiff(np.full((4, 4), 0.5, np.float32))) == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 10, 12, 14])
def test_samples_of_odd_depths(bits: int) -> None:
    values = RNG.integers(0, 1 << bits, (HEIGHT, WIDTH)).astype(np.uint8 if bits < 8 else np.uint16)
    buffer = io.BytesIO()
    stored = values.astype(bool) if bits == 1 else values
    tifffile.imwrite(buffer, stored, bitspersample=bits, photometric="minisblack")
    top = (1 << bits) - 1
    expected = np.rint(values * ((255 if bits < 8 else 65535) / top))
    assert (read(buffer.getvalue()) == expected).all()


# --- compressions ---


LOSSLESS = [
    *((name, predictor) for name in ("lzw", "zlib", "lzma", "zstd") for predictor in (False, True)),
    *((name, False) for name in ("packbits", "jpeg2000", "jpegxl", "png", "lerc")),
]


@pytest.mark.parametrize("layout", [{"rowsperstrip": 7}, {"tile": (16, 16)}], ids=str)
@pytest.mark.parametrize(("compression", "predictor"), LOSSLESS)
def test_lossless_compressions(compression: str, predictor: bool, layout: dict[str, Any]) -> None:
    for image in (GREY, RGB, DEEP, DEEP_RGB):
        buffer = io.BytesIO()
        tifffile.imwrite(
            buffer,
            image,
            photometric="minisblack" if image.ndim == 2 else "rgb",
            compression=compression,
            predictor=predictor,
            **layout,
        )
        assert (read(buffer.getvalue()) == image).all()


@pytest.mark.parametrize("compression", ["jpeg", "webp"])
def test_lossy_compressions_are_read_as_by_pillow(compression: str) -> None:
    photo = np.asarray(Image.fromarray(RGB[:4, :6]).resize((60, 48)))
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, photo, photometric="rgb", compression=compression, tile=(32, 32))
    difference = np.abs(read(buffer.getvalue()) - photo.astype(int))
    assert difference.mean() < 6
    if compression == "jpeg":
        assert (read(buffer.getvalue()) == np.asarray(Image.open(buffer).convert("RGB"))).all()


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt", "tiff_raw_16"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_fax_compressions(compression: str, photometric: int) -> None:
    page = np.kron(GREY[:8, :10] > 128, np.ones((5, 7), bool))
    data = saved(Image.fromarray(page), compression=compression, tiffinfo={262: photometric})
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image)
    assert (read(data) == expected * 255).all()
    assert compression == "tiff_raw_16" or (expected == page).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", ["zlib", "zstd", "packbits", "lzw"])
def test_a_last_strip_longer_than_the_image_is_cut(kind: type, compression: str) -> None:
    image = DEEP.astype(kind)
    padded = np.vstack([image, image[:4]])  # three strips of 8 rows for 20
    data = tiff(padded, compression=compression, rows=8, t257=HEIGHT)
    assert (read(data) == image).all()


def test_ycbcr_at_half_the_resolution_without_jpeg() -> None:
    y, x = np.mgrid[:32, :48]
    rgb = np.dstack([y * 7, x * 5, (x + y) * 3]).astype(np.uint8)
    ycbcr = np.asarray(Image.fromarray(rgb).convert("YCbCr")).astype(int)
    units = bytearray()
    for top in range(0, 32, 2):
        for left in range(0, 48, 2):
            block = ycbcr[top : top + 2, left : left + 2]
            units += bytes(block[..., 0].ravel().tolist())
            units += bytes(block[..., channel].sum() // 4 for channel in (1, 2))
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        iter([zlib.compress(bytes(units))]),
        shape=rgb.shape,
        dtype=rgb.dtype,
        photometric="ycbcr",
        compression="zlib",
        rowsperstrip=32,
        metadata=None,
    )
    data = set_tag(buffer.getvalue(), 530, 0x00020002)  # YCbCrSubSampling: 2 and 2
    assert np.abs(read(data) - rgb.astype(int)).mean() < 3


def test_a_compression_that_is_not_read_is_named() -> None:
    for code, name in ((34713, "NIKON_NEF"), (34677, "SGILOG24"), (12345, "12345")):
        with pytest.raises(UnsupportedTiff, match=f"with the compression {name}"):
            TiffReader(tiff(GREY, t259=code)).select()


# --- colors ---


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "YCbCr", "LAB", "1", "RGBA", "RGBX"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_eight_bit_colors_are_those_of_pillow(mode: str, compression: str | None) -> None:
    rgb = Image.fromarray(RGB)
    image = Image.frombytes("LAB", rgb.size, rgb.tobytes()) if mode == "LAB" else rgb.convert(mode)
    data = saved(image, compression=compression)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(opened.convert("L" if mode in "1L" else "RGB"))
    assert np.abs(read(data) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_transparency_is_laid_on_black(kind: type) -> None:
    full = int(np.iinfo(kind).max)
    colors, grey = DEEP_RGB.astype(kind), DEEP.astype(kind)
    alpha = np.full((HEIGHT, WIDTH), full, kind)
    alpha[:5], alpha[5:10] = 0, full // 3
    opacity = (alpha / full)[:, :, None]
    for planes in (False, True):
        straight = read(tiff(np.dstack([colors, alpha]), 2, extra=(2,), planes=planes))
        assert np.abs(straight - colors * opacity).max() <= 0.5
        multiplied = np.rint(colors * opacity).astype(kind)
        associated = read(tiff(np.dstack([multiplied, alpha]), 2, extra=(1,), planes=planes))
        assert (associated == multiplied).all()
        ignored = read(tiff(np.dstack([colors, alpha]), 2, extra=(0,), planes=planes))
        assert (ignored == colors).all()
        two = read(tiff(np.dstack([grey, alpha]), 1, extra=(2,), planes=planes))
        assert two.shape == grey.shape
        assert np.abs(two - grey * opacity[:, :, 0]).max() <= 0.5


def test_transparency_of_floats_is_laid_on_black() -> None:
    values = np.dstack([DEEP_RGB / 65535, np.full((HEIGHT, WIDTH), 0.5)]).astype(np.float32)
    values[:5, :, 3] = 0
    pixels = read(tiff(values, 2, extra=(2,)))
    assert (pixels[:5] == 0).all()
    assert pixels.max() == 65535


def test_sixteen_bit_cmyk_is_eight_bit_cmyk_in_finer_steps() -> None:
    inks = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
    coarse, fine = read(tiff(inks, 5)), read(tiff(inks.astype(np.uint16) * 257, 5))
    assert np.abs(fine / 257 - coarse).max() <= 1
    assert (read(tiff(inks, 5, compression="lzw")) == coarse).all()


def test_three_channels_without_a_color_space_are_rgb() -> None:
    assert (read(tiff(DEEP_RGB, 1, extra=(0, 0))) == DEEP_RGB).all()


REJECTED = {
    "complex": (tiff(DEEP.astype("c8")), "of 64-bit complex floats"),
    "a camera's mosaic": (tiff(GREY, t262=32803), "photometric interpretation CFA"),
    "16-bit LAB": (tiff(DEEP_RGB, 8), "of 16-bit unsigned integers in CIELAB"),
    "float CMYK": (tiff(np.dstack([DEEP] * 4).astype("f4"), 5), "of 32-bit floats in SEPARATED"),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_a_kind_that_is_not_read_is_named(kind: str) -> None:
    data, message = REJECTED[kind]
    with pytest.raises(UnsupportedTiff, match=message):
        TiffReader(data).select()


# --- the file ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_orientation_is_applied(orientation: int, compression: str | None) -> None:
    picture = Image.fromarray(RGB[:2, :3]).resize((60, 40), Image.Resampling.NEAREST)
    data = saved(picture, compression=compression, tiffinfo={274: orientation})
    with Image.open(io.BytesIO(data)) as image:  # which turns it
        expected = np.asarray(image.convert("RGB"))
    assert read(data).shape == expected.shape
    assert (read(data) == expected).all()


def test_a_tiff_that_ends_early_is_damaged() -> None:
    for whole in (
        tiff(RGB, 2),
        tiff(DEEP, compression="zlib"),
        tiff(DEEP, compression="lzw"),
        tiff(DEEP, big=True),
        saved(Image.fromarray(RGB), compression="tiff_lzw"),  # its directory comes last
    ):
        for length in range(4, len(whole) - 2, 3):
            assert damage(whole[:length])


@pytest.mark.parametrize(
    ("code", "value"),
    [(256, 0), (257, 0), (258, 0), (258, 5000), (273, 10**9), (277, 0), (339, 99), (279, 0)],
)
def test_impossible_tags_are_damage(code: int, value: int) -> None:
    assert damage(set_tag(tiff(DEEP.astype("f8"), compression="zlib"), code, value))


@pytest.mark.parametrize(
    "compression", ["jpeg", "jpeg2000", "webp", "png", "jpegxl", "lerc", "jpegxr"]
)
def test_a_strip_that_decodes_to_another_size_is_not_decoded(compression: str) -> None:
    """A TIFF of 16 x 16 pixels whose only strip is an image of 64 x 64."""
    buffer = io.BytesIO()
    large = np.dstack([np.kron(RGB[:8, :8, 0], np.ones((8, 8), np.uint8))] * 3)
    tifffile.imwrite(buffer, large, photometric="rgb", compression=compression, metadata=None)
    data = buffer.getvalue()
    for code in (256, 257, 278):
        data = set_tag(data, code, 16)
    with pytest.raises(ValueError, match=r"size|out\.shape"):
        read(data)


def test_training_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(DEEP_RGB, 2, compression="lzw"))
    assert (read_image(path) == DEEP_RGB).all()
    assert (decode_image(path.read_bytes()) == DEEP_RGB).all()
    path.write_bytes(tiff(GREY, t259=34677))
    with pytest.raises(DataError, match=r"image.tif cannot be read: .*SGILOG24"):
        read_image(path)


def test_libraries_for_tiff_are_imported_with_the_first_tiff() -> None:
    code = """
import sys
from app.imaging import decode
from tests.conftest import encode
import numpy as np
grey = np.zeros((9, 9), np.uint8)
for format, library in (("BMP", "numpy"), ("JPEG", "simplejpeg"), ("PNG", "imagecodecs")):
    data = encode(grey, format)
    decode.decode(data, decode.inspect(data, max_pixels=100))
    assert library in sys.modules
    later = {"BMP": {"simplejpeg", "imagecodecs"}, "JPEG": {"imagecodecs"}}.get(format, set())
    assert not later & set(sys.modules)
assert "tifffile" not in sys.modules
data = encode(grey, "TIFF")
decode.decode(data, decode.inspect(data, max_pixels=100))
assert {"tifffile", "imagecodecs"} <= set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
