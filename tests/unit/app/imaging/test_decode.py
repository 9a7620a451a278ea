"""Bytes -> pixels and back: modes, orientation, ranges, limits, damage."""

from __future__ import annotations

import contextlib
import io
import random
import resource
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from app.errors import (
    CorruptImage,
    ImageError,
    ImageTooLarge,
    InsufficientBitDepth,
    UnsupportedImage,
)
from app.imaging import decode, png, render
from tests.conftest import FIXTURES, encode, nuclei, tiff

LIMIT = 100_000_000
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)


def read(data: bytes) -> np.ndarray:
    return decode.decode(data, decode.inspect(data, max_pixels=LIMIT))


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_lossless_formats_give_the_same_pixels(format: str) -> None:
    assert (read(encode(RGB, format)) == RGB).all()
    assert (read(encode(GREY, format)) == GREY).all()


def test_transparency_is_laid_on_black() -> None:
    alpha = np.zeros((20, 30, 1), np.uint8)
    alpha[:10] = 255
    pixels = read(encode(np.dstack([RGB, alpha])))
    assert (pixels[:10] == RGB[:10]).all()
    assert (pixels[10:] == 0).all()


def test_palette_with_a_transparent_colour() -> None:
    image = Image.fromarray(GREY // 128).convert("P")
    image.putpalette([200, 100, 50, 10, 20, 30])
    pixels = read(saved(image, transparency=0))
    assert (pixels[GREY < 128] == 0).all()
    assert (pixels[GREY >= 128] == (10, 20, 30)).all()


def test_cmyk_and_bilevel_become_what_they_show() -> None:
    cmyk = read(saved(Image.new("CMYK", (9, 8), (0, 255, 255, 0)), "JPEG"))
    assert cmyk.shape == (8, 9, 3)
    assert cmyk[0, 0, 0] > 200 > 60 > cmyk[0, 0, 1]  # red
    bilevel = read(saved(Image.fromarray(GREY > 128), "PNG"))
    assert set(np.unique(bilevel)) == {0, 255}


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(format: str) -> None:
    values = RNG.integers(200, 5000, (20, 30)).astype(np.uint16)
    pixels = read(encode(values, format))
    assert pixels.dtype == np.uint16
    assert (pixels == values).all()


def test_a_dark_sixteen_bit_picture_is_shown_over_its_real_range() -> None:
    pixels = read((FIXTURES / "img2d.tif").read_bytes())
    assert pixels.dtype == np.uint16
    assert pixels.max() < 256  # so dark that a division by 256 would leave nothing of it
    shown = render.overlay(pixels, np.zeros(pixels.shape, np.uint8))
    assert shown.max() == 255


def test_floats_are_spread_over_their_finite_range() -> None:
    values = np.linspace(-2, 3, 600, dtype=np.float32).reshape(20, 30)
    values[0, 0] = np.nan
    pixels = read(encode(values, "TIFF"))
    assert pixels[-1, -1] == 65535
    assert pixels[0, 0] == pixels.min() == 0
    assert (np.diff(pixels.ravel()[1:].astype(int)) >= 0).all()
    nothing = read(encode(np.full((4, 4), np.inf, np.float32), "TIFF"))
    assert (nothing == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(RGB), "PNG", exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    header = decode.inspect(data, max_pixels=LIMIT)
    assert (header.height, header.width) == expected.shape[:2]
    assert (read(data) == expected).all()


def test_a_jpeg_may_be_decoded_smaller_when_that_is_enough() -> None:
    data = encode(np.asarray(Image.fromarray(RGB).resize((1600, 1200))), "JPEG")
    header = decode.inspect(data, max_pixels=LIMIT)
    reduced = decode.decode(data, header, at_least=(256, 384))
    assert (256, 384) <= reduced.shape[:2] < (1200, 1600)
    # a PNG has no such shortcut: all of it comes
    png = encode(RGB)
    assert (
        decode.decode(png, decode.inspect(png, max_pixels=LIMIT), at_least=(4, 4)).shape
        == RGB.shape
    )


def test_limits_and_formats() -> None:
    with pytest.raises(ImageTooLarge, match="30 x 20"):
        decode.inspect(encode(RGB), max_pixels=599)
    assert decode.inspect(encode(RGB), max_pixels=600).width == 30
    with pytest.raises(UnsupportedImage, match="PPM"):
        decode.inspect(encode(RGB, "PPM"), max_pixels=LIMIT)
    with pytest.raises(CorruptImage, match="not an image"):
        decode.inspect(b"hello", max_pixels=LIMIT)


def kinds() -> dict[str, bytes]:
    """One small file of every format that is accepted, in the ways it is usually written."""
    grey = Image.fromarray(nuclei(40, 50)[0])
    colour, wide = grey.convert("RGB"), Image.fromarray(np.asarray(grey).astype(np.uint16) * 150)
    frames = {"save_all": True, "append_images": [Image.eval(grey, lambda value: 255 - value)] * 3}
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {format: saved(colour, format) for format in ("PNG", "JPEG", "TIFF", "BMP", "GIF")}
    files |= {f"{format} grey": saved(grey, format) for format in ("PNG", "JPEG", "TIFF", "GIF")}
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[f"TIFF {compression}"] = saved(colour, "TIFF", compression=compression)
    return files | {
        "PNG 16 bits": saved(wide),
        "PNG palette": saved(grey.convert("P"), transparency=3),
        "PNG alpha": saved(colour.convert("RGBA")),
        "PNG turned": saved(colour, exif=turned.tobytes()),
        "JPEG progressive": saved(colour, "JPEG", progressive=True, exif=turned.tobytes()),
        "JPEG CMYK": saved(colour.convert("CMYK"), "JPEG"),
        "TIFF 16 bits": saved(wide, "TIFF"),
        "TIFF float": saved(grey.convert("F"), "TIFF"),
        "TIFF fax": saved(grey.convert("1"), "TIFF", compression="group4"),
        "TIFF pages": saved(grey, "TIFF", **frames),
        "GIF frames": saved(grey, "GIF", **frames),
        "WEBP": saved(colour, "WEBP", exif=turned.tobytes()),
        "WEBP lossless": saved(colour, "WEBP", lossless=True),
        "MPO": saved(colour, "MPO", save_all=True, append_images=[colour]),
    }


def wounded(whole: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off, put in; rather in the header, where they do most."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(min(len(data), rng.choice((64, 256, len(data)))))
        data[at] = rng.choice((0, 127, 128, 255, rng.randrange(256)))
    if rng.random() < 0.15:
        del data[rng.randrange(len(data)) :]
    elif rng.random() < 0.1:
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randint(1, 50))
    return bytes(data)


def with_right_sums(png: bytes) -> bytes:
    """Its chunks with the checksums that they should have, so that a decoder goes on to read."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(data)


@pytest.mark.parametrize("kind", kinds())
def test_damage_is_an_image_error_and_nothing_else(kind: str) -> None:
    """150 random wounds; none may be another exception, or take memory beyond the limit."""
    rng = random.Random(kind)
    whole = kinds()[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(150):
        data = wounded(whole, rng)
        if kind.startswith("PNG") and rng.random() < 0.7:
            data = with_right_sums(data)
        enough = (8, 8) if rng.random() < 0.3 else None
        try:
            header = decode.inspect(data, max_pixels=1_000_000)
            pixels = decode.decode(data, header, at_least=enough)
        except ImageError:
            continue
        assert enough or pixels.shape[:2] == (header.height, header.width)
        assert pixels.dtype in (np.uint8, np.uint16)
        assert pixels.shape[2:] in ((), (3,))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_a_png_has_its_end_and_what_stands_behind_it_does_not_matter() -> None:
    """Also where the pixels are all there: the client meant to send more."""
    # Comments of 300 bytes behind the pixels, so that there are chunks to go through.
    comment = b"tEXt" + b"a\0" * 150
    chunk = (300).to_bytes(4, "big") + comment + zlib.crc32(comment).to_bytes(4, "big")
    for whole in (encode(RGB), encode(RGB)[:-12] + chunk * 3 + encode(RGB)[-12:]):
        for behind in (b"", b"\n", b"IEND", bytes(1000), whole):
            assert (read(whole + behind) == RGB).all()
        for missing in range(1, 17):
            with pytest.raises(CorruptImage, match="incomplete"):
                read(whole[:-missing])
        with pytest.raises(CorruptImage):
            read(whole[:-1] + b"?")


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_bomb_in_what_a_png_says_of_itself(kind: bytes) -> None:
    """200 MB of zeros, packed into 900 KB, before a good picture: read without it, or refused."""
    packed = zlib.compress(bytes(200_000_000), 1)
    data = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind] + packed
    chunk = len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
    png = saved(Image.fromarray(RGB))
    bomb = png[:33] + chunk + png[33:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(CorruptImage):
        assert (read(bomb) == RGB).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_every_format_also_when_decoded_smaller(
    format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(RGB[:2, :3]).resize((600, 400), Image.Resampling.NEAREST)
    data = saved(picture, format, exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    header = decode.inspect(data, max_pixels=LIMIT)
    assert (header.height, header.width) == expected.shape[:2]
    assert (read(data) == expected).all()
    smaller = decode.decode(data, header, at_least=(expected.shape[0] // 4, expected.shape[1] // 4))
    step = expected.shape[0] // smaller.shape[0]
    assert step == (4 if format == "JPEG" else 1)
    assert np.abs(smaller - expected[step // 2 :: step, step // 2 :: step].astype(int)).mean() < 8


def test_big_endian_sixteen_bits() -> None:
    values = RNG.integers(200, 5000, (20, 30)).astype(np.uint16)
    big = Image.frombytes("I;16B", (30, 20), values.astype(">u2").tobytes())
    assert (read(saved(big, "TIFF")) == values).all()


WIDE = (np.arange(600).reshape(20, 30) * 109).astype(np.uint16)
WIDE_RGB = np.dstack([WIDE, WIDE[::-1], WIDE.T.reshape(20, 30)])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("channels", [3, 4])
def test_colour_of_sixteen_bits_in_planes_is_read_right_or_refused(
    order: str, channels: int
) -> None:
    opaque = np.full((20, 30), 65535, np.uint16)
    values = WIDE_RGB if channels == 3 else np.dstack([WIDE_RGB, opaque])
    given = {"photometric": 2, "order": order, "extra": (2,) * (channels - 3)}
    for planes, packed in ((False, False), (False, True), (True, True)):
        pixels = read(tiff(values, planes=planes, packed=packed, **given))
        assert (pixels == WIDE_RGB >> 8).all()
    with pytest.raises(UnsupportedImage, match=r"16-bit.* plane by plane .*; send .* by pixel"):
        read(tiff(values, planes=True, **given))
    assert (read(tiff(RGB, 2, planes=True, order=order)) == RGB).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("type_", ["u1", "u2", "i2", "u4", "i4", "f4"])
def test_greys_of_every_kind_are_read_right_or_refused(
    type_: str, photometric: int, order: str, planes: bool, packed: bool
) -> None:
    greys = WIDE // 256 if type_ == "u1" else WIDE // 2
    values = greys.astype(type_)
    try:
        pixels = read(tiff(values, photometric, order=order, planes=planes, packed=packed))
    except UnsupportedImage:
        assert (type_, photometric, planes) not in (("u1", 1, False), ("u2", 1, False))
        return
    if type_ == "f4":  # over their range
        greys = np.rint((greys - greys.min()) * (65535 / np.ptp(greys)))
    full = 255 if type_ == "u1" else 65535
    assert (pixels == (full - greys if photometric == 0 else greys)).all()


@pytest.mark.parametrize("type_", ["u1", "u2", "f4"])
@pytest.mark.parametrize("packed", [False, True])
def test_where_0_is_white_it_is_white(type_: str, packed: bool) -> None:
    pixels = read(tiff(WIDE.astype(type_) if type_ != "u1" else GREY, 0, packed=packed))
    inverted = 65535 - WIDE if type_ == "u2" else 255 - GREY
    if type_ == "f4":
        assert pixels[0, 0] == 65535
        assert pixels[-1, -1] == 0
    else:
        assert (pixels == inverted).all()


KINDS = {
    "float64": (tiff(WIDE.astype("f8")), "1 channel of 64-bit floats"),
    "float16": (tiff(WIDE.astype("f2")), "1 channel of 16-bit floats"),
    "float32 RGB": (tiff(WIDE_RGB.astype("f4"), 2), "3 channels of 32-bit floats"),
    "uint64": (tiff(WIDE.astype("u8")), "1 channel of 64-bit unsigned integers"),
    "complex": (tiff(WIDE.astype("c8")), "1 channel of 64-bit complex floats"),
    "4 channels": (tiff(np.dstack([WIDE] * 4)), "4 channels of 16-bit unsigned integers"),
    "5 channels": (tiff(np.dstack([GREY] * 5)), "5 channels of 8-bit unsigned integers"),
    "9 channels": (tiff(np.dstack([GREY] * 9)), "9 channels of 8-bit unsigned integers"),
    "2 channels": (tiff(np.dstack([WIDE] * 2)), "2 channels of 16-bit unsigned integers"),
    "grey and alpha": (tiff(np.dstack([WIDE] * 2), extra=(2,)), "2 channels of 16-bit unsigned"),
    "planes": (tiff(np.dstack([WIDE] * 5), planes=True), "integers, plane by plane"),
    "big-endian": (tiff(WIDE.astype("f8"), order=">"), "1 channel of 64-bit big-endian floats"),
    "BigTIFF": (tiff(WIDE.astype("f8"), big=True), "1 channel of 64-bit floats"),
    "0 is white, big-endian": (tiff(WIDE, 0, order=">"), "photometric interpretation 0"),
    "JPEG 2000 in it": (tiff(GREY, t259=34712), "compression 34712"),
    "a camera's mosaic": (tiff(GREY, 32803), "photometric interpretation 32803"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiff_of_a_kind_that_is_not_accepted_is_told_its_kind(kind: str) -> None:
    data, words = KINDS[kind]
    with pytest.raises(UnsupportedImage, match="grey of 8 or 16 bits") as caught:
        read(data)
    assert words in str(caught.value)
    assert str(caught.value).startswith("a TIFF of ")


def test_a_tiff_that_is_broken_is_damaged_whatever_its_kind() -> None:
    whole, _ = KINDS["float32 RGB"]
    for length in range(len(whole)):  # its directory comes last
        with pytest.raises(CorruptImage):
            read(whole[:length])
    for tag, value in (
        (256, 0),
        (257, 0),
        (258, 0),
        (258, 5000),
        (273, 10**9),
        (277, 0),
        (339, 99),
    ):
        with pytest.raises(CorruptImage):
            read(tiff(WIDE.astype("f8"), **{f"t{tag}": value}))
    with pytest.raises(CorruptImage):
        read(b"II*\0" + b"\xff" * 100)
    with pytest.raises(CorruptImage):
        read(b"II+\0\x08\0\0\0" + (16).to_bytes(8, "little") + b"\xff" * 1000)


def deep(values: np.ndarray) -> dict[str, bytes]:
    """(H, W) of 16 bits as colour of 16 bits, in the ways it may be stored."""
    opaque = np.full_like(values, 65535)
    rgb = np.dstack([values] * 3)
    rgba = np.dstack([rgb, opaque])
    return {
        "PNG": png.encode_rgb(rgb),  # type: ignore[arg-type]
        "PNG and alpha": png.encode_rgba(rgba),  # type: ignore[arg-type]
        "PNG grey and alpha": png._png(np.dstack([values, opaque]), 4),
        "TIFF": tiff(rgb, 2),
        "TIFF big-endian": tiff(rgb, 2, order=">"),
        "TIFF packed": tiff(rgb, 2, packed=True),
        "TIFF packed, in planes": tiff(rgb, 2, packed=True, planes=True),
        "TIFF and alpha": tiff(rgba, 2, extra=(2,)),
        "BigTIFF": tiff(rgb, 2, big=True),
    }


@pytest.mark.parametrize("way", deep(WIDE))
def test_colour_of_sixteen_bits_is_not_read_where_nothing_would_be_left(way: str) -> None:
    """Cut to 8 bits, a camera's 12 are 16 levels."""
    few, enough = WIDE * (4095 / WIDE.max()), WIDE * (31.5 * 256 / WIDE.max())
    for base in (0, 20_000):
        with pytest.raises(InsufficientBitDepth, match=r" 1[67] of 256 levels .* grey of 16 bits"):
            read(deep((base + few).astype(np.uint16))[way])
    pixels = read(deep(enough.astype(np.uint16))[way])
    assert (pixels == (enough.astype(np.uint16) >> 8)[:, :, None]).all()
    assert (read(deep(WIDE)[way]) == (WIDE >> 8)[:, :, None]).all()


def test_dim_images_of_8_bits_and_dim_greys_of_16_are_read_as_ever() -> None:
    for image in (RGB // 64, GREY // 64, WIDE // 4096):
        for format in ("PNG", "TIFF"):
            assert (read(encode(image, format)) == image).all()
    for format in ("WEBP", "BMP", "JPEG", "GIF"):
        assert read(encode(RGB // 64, format)).max() < 16
    assert (read(encode(np.zeros((5, 5, 3), np.uint8))) == 0).all()


def test_encoders_give_back_what_they_got() -> None:
    def back(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data))

    mask = np.where(GREY > 100, 255, 0).astype(np.uint8)
    assert (np.asarray(back(png.encode_mask(mask))) == mask).all()
    assert back(png.encode_mask(mask)).mode == "L"
    labels = (GREY % 3).astype(np.uint8)
    palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    encoded = back(png.encode_labels(labels, palette))
    assert encoded.mode == "P"
    assert (np.asarray(encoded) == labels).all()
    assert encoded.convert("RGB").getpixel((0, 0)) == palette[labels[0, 0]]
    wide = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    assert (np.asarray(back(png.encode_grey16(wide))) == wide).all()
    assert (np.asarray(back(png.encode_rgb(RGB))) == RGB).all()
    rgba = np.dstack([RGB, GREY])
    assert (np.asarray(back(png.encode_rgba(rgba))) == rgba).all()
    for strange in (GREY[:, ::2], GREY[:1], GREY[:, :1], np.asfortranarray(GREY)):
        assert (np.asarray(back(png.encode_mask(strange))) == strange).all()


def test_a_mask_becomes_few_bytes() -> None:
    mask = (nuclei(512, 512)[1] > 0) * np.uint8(255)
    assert len(png.encode_mask(mask)) < 1.5 * len(saved(Image.fromarray(mask)))


def test_overlay_and_cutout() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:] = 255
    tinted = render.overlay(RGB, mask)
    assert (tinted[:5] == RGB[:5]).all()
    assert (tinted[5:] != RGB[5:]).any()
    sixteen = render.overlay(np.full((20, 30), 4000, np.uint16), mask)
    assert sixteen.shape == (20, 30, 3)
    probability = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    cut = render.cutout(GREY, probability)
    assert cut.shape == (20, 30, 4)
    assert (cut[..., 3] == np.rint(probability * 255)).all()
