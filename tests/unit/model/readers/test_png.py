"""PNG: metadata of any damage costs nothing, and missing rows are counted."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import png as pypng
import pytest
from PIL import Image

from model.pixels import decode_image
from model.readers import open_image
from model.readers.base import MissingPixels, UnsupportedKind
from tests.unit.model.readers.writers import chunk, filtered, png, saved

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16)
PACKED = zlib.compress(filtered(GREY))
ZEROS = zlib.compress(bytes(2 << 20))

METADATA = {
    "zTXt of 2 MiB": chunk(b"zTXt", b"a\0\0" + ZEROS),
    "zTXt of an unknown method": chunk(b"zTXt", b"a\0\7abc"),
    "zTXt without a keyword": chunk(b"zTXt", b"abc"),
    "iTXt of 2 MiB": chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS),
    "iTXt that is not UTF-8": chunk(b"iTXt", b"a\0\0\0\0\0\xff\xfe"),
    "tEXt of 5 MB": chunk(b"tEXt", b"a\0" + b"b" * 5_000_000),
    "iCCP of 2 MiB of zeros": chunk(b"iCCP", b"a\0\0" + ZEROS),
    "iCCP of method 1": chunk(b"iCCP", b"a\0\1" + zlib.compress(b"x")),
    "iCCP with a wrong checksum": chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x"), 1),
    "iCCP twice": chunk(b"iCCP", b"a\0\0x") * 2,
    "gAMA too short": chunk(b"gAMA", b"\1"),
    "gAMA of zero": chunk(b"gAMA", bytes(4)),
    "cHRM too short": chunk(b"cHRM", bytes(3)),
    "sRGB empty": chunk(b"sRGB", b""),
    "pHYs too long": chunk(b"pHYs", bytes(30)),
    "tIME of month 99": chunk(b"tIME", struct.pack(">HBBBBB", 2026, 99, 99, 99, 99, 99)),
    "eXIf damaged": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    "eXIf empty": chunk(b"eXIf", b""),
    "raw EXIF that is not hexadecimal": chunk(b"zTXt", b"Raw profile type exif\0\0" + ZEROS),
    "XMP damaged": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0abc"),
    "sBIT too long": chunk(b"sBIT", bytes(9)),
    "bKGD too short": chunk(b"bKGD", b""),
    "hIST without a palette": chunk(b"hIST", bytes(5)),
    "tRNS with a wrong checksum": chunk(b"tRNS", bytes(2), 1),
    "acTL too short": chunk(b"acTL", b"\0"),
    "a private chunk": chunk(b"prVt", bytes(1000), 0),
}


@pytest.mark.parametrize("kind", METADATA)
def test_broken_metadata_does_not_cost_the_pixels(kind: str) -> None:
    for data in (png(GREY, before=METADATA[kind]), png(GREY, after=METADATA[kind])):
        assert (decode_image(data) == GREY).all()
    deep = png(DEEP, bits=16, color=2, before=METADATA[kind].replace(b"tRNS", b"abCD"))
    assert (decode_image(deep) == DEEP).all()


@pytest.mark.parametrize("rows", [0, 1, 19])
def test_missing_rows_are_counted(rows: int) -> None:
    packed = zlib.compress(filtered(GREY[:rows]))
    with pytest.raises(MissingPixels, match=f"{rows} of its 20 rows are there"):
        decode_image(png(GREY, packed=packed))


def test_a_truncated_file_says_how_many_rows_are_there() -> None:
    whole = saved(np.repeat(RGB, 20, axis=0), "PNG")
    with pytest.raises(MissingPixels, match=r"truncated: \d\d\d of its 400 rows are there"):
        decode_image(whole[: len(whole) // 2])
    with pytest.raises(MissingPixels, match="truncated: it has no IEND chunk"):
        decode_image(whole[:-12])
    with pytest.raises(MissingPixels, match="0 of its 20 rows"):
        decode_image(png(GREY)[:41])


def test_an_interlaced_png_that_lacks_rows_counts_bytes() -> None:
    buffer = io.BytesIO()
    pypng.Writer(30, 20, greyscale=True, interlace=True).write(buffer, GREY.tolist())
    whole = buffer.getvalue()
    at = whole.index(b"IDAT")
    packed = whole[at + 4 : -16]
    raw = zlib.decompress(packed)
    cut = whole[: at - 4] + chunk(b"IDAT", zlib.compress(raw[:-1])) + chunk(b"IEND", b"")
    with pytest.raises(MissingPixels, match=f"{len(raw) - 1} of {len(raw)} bytes"):
        decode_image(cut)


def test_the_checksum_of_the_chunk_or_of_its_content_suffices() -> None:
    wrong_crc = png(GREY).replace(chunk(b"IDAT", PACKED), chunk(b"IDAT", PACKED, 5))
    assert (decode_image(wrong_crc) == GREY).all()
    wrong_content = PACKED[:-4] + b"abcd"
    assert (decode_image(png(GREY, packed=wrong_content)) == GREY).all()
    assert (decode_image(png(GREY, packed=PACKED[:-4])) == GREY).all()
    both = png(GREY, packed=wrong_content).replace(
        chunk(b"IDAT", wrong_content), chunk(b"IDAT", wrong_content, 5)
    )
    with pytest.raises(MissingPixels, match="damaged"):
        decode_image(both)


def test_a_changed_byte_of_pixels_is_an_error() -> None:
    stored = zlib.compress(filtered(GREY), 0)  # a change does not disturb the decompression
    data = bytearray(png(GREY, packed=stored))
    data[200] ^= 1
    with pytest.raises(MissingPixels, match="damaged"):
        decode_image(bytes(data))


def test_bytes_after_the_rows_or_after_the_end_do_not_matter() -> None:
    longer = zlib.compress(filtered(np.vstack([GREY, GREY])))
    for data in (png(GREY) + b"rest", png(GREY, packed=longer), png(GREY, packed=PACKED + b"r")):
        assert (decode_image(data) == GREY).all()


def test_a_constant_image_of_sixteen_bits_keeps_its_value() -> None:
    for value in (0, 300, 65535):
        grey_alpha = np.full((9, 7, 2), 65535, np.uint16)
        grey_alpha[:, :, 0] = value
        assert (decode_image(png(grey_alpha, bits=16, color=4)) == value).all()
        rgb = np.full((9, 7, 3), value, np.uint16)
        assert (decode_image(png(rgb, bits=16, color=2)) == value).all()


def test_an_animation_gives_its_still_image_and_its_number_of_frames() -> None:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    data = saved(first, "PNG", save_all=True, append_images=[second, first, second])
    assert open_image(data).pages == 4
    assert (decode_image(data) == RGB).all()


def test_the_variant_of_ios_is_named() -> None:
    plain = png(GREY)
    with pytest.raises(UnsupportedKind, match="CgBI"):
        decode_image(plain[:8] + chunk(b"CgBI", bytes(4)) + plain[8:])


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_orientation_is_read_from_every_place_that_programs_use(orientation: int) -> None:
    exif = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    digits = b"\nexif\n%8d\n" % len(exif) + exif.hex().encode() + b"\n"
    xmp = b'<rdf:Description tiff:Orientation="%d"/>' % orientation
    for metadata in (
        chunk(b"eXIf", exif),
        chunk(b"tEXt", b"Raw profile type exif\0" + digits),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(digits)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
    ):
        assert open_image(png(GREY, before=metadata)).orientation == orientation
        assert open_image(png(GREY, after=metadata)).orientation == orientation
