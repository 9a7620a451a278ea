"""Bytes -> decoded image: bounds, orientation, reduced decoding, and damage of every kind."""

from __future__ import annotations

import contextlib
import io
import random
import re
import resource
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import Image, ImageOps

from app.errors import (
    CorruptImage,
    ImageTooLarge,
    ServiceError,
    UnsupportedImage,
    WrongSelection,
)
from app.imaging import decode
from tests.conftest import encode, nuclei, set_tag, tiff

pillow_heif.register_heif_opener()

LIMIT = 100_000_000
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)
DEEP_RGB = RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16)


def read(data: bytes, page: int | None = None, channel: int | None = None) -> np.ndarray:
    header = decode.inspect(data, max_pixels=LIMIT, page=page, channel=channel)
    return decode.decode(data, header)


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def memory_growth(before: int) -> int:
    """Kilobytes by which the peak of this process's memory rose."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


# --- headers and bounds ---


def test_an_image_beyond_the_limit_is_rejected_by_its_header() -> None:
    for data in (encode(RGB), encode(RGB, "TIFF"), tiff(DEEP_RGB, 2)):
        with pytest.raises(ImageTooLarge, match="30 x 20"):
            decode.inspect(data, max_pixels=599)
        header = decode.inspect(data, max_pixels=600)
        assert (header.width, header.height) == (30, 20)


def test_a_format_that_is_not_accepted_and_no_image_differ() -> None:
    with pytest.raises(UnsupportedImage, match=r"PPM.*send JPEG, PNG, TIFF.*JPEG 2000"):
        decode.inspect(encode(RGB, "PPM"), max_pixels=LIMIT)
    with pytest.raises(CorruptImage, match=r"not a recognised image \(5 bytes\)"):
        decode.inspect(b"hello", max_pixels=LIMIT)


def test_a_tiff_of_a_kind_that_is_not_accepted_is_named() -> None:
    data = tiff(GREY, t259=34677)
    with pytest.raises(UnsupportedImage, match=r"^a TIFF with the compression SGILOG24 .*; send"):
        decode.inspect(data, max_pixels=LIMIT)


def test_a_tiff_whose_decoder_would_need_too_much_is_rejected_by_its_tags() -> None:
    wide = np.zeros((20, 30, 3))  # 24 bytes per pixel
    with pytest.raises(ImageTooLarge, match="24 bytes each"):
        decode.inspect(tiff(wide, 2), max_pixels=600)
    assert decode.inspect(tiff(wide, 2), max_pixels=1800).width == 30


def several_values(data: bytes, code: int) -> bytes:
    """Give a tag of a little-endian TIFF two values where it should have one."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        count_at = file.pages.first.tags[code].offset + 4
    return data[:count_at] + (2).to_bytes(4, "little") + data[count_at + 4 :]


DEFLATED = tiff(RGB, 2, compression="zlib")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(RGB).replace(b"IHDR", b"IHDX"), ": the PNG has no intact IHDR chunk"),
        (encode(RGB, "JPEG")[:20] + b"\xff\xd9", ": the JPEG has no frame header"),
        (encode(RGB, "JPEG2000").replace(b"jp2c", b"jp2x"), ": the JPEG 2000 has no codestream"),
        (encode(RGB, "BMP")[:18] + bytes(500), ": the BMP has 0 x 0 pixels"),
        (encode(RGB, "BMP")[:12], ": the header of the BMP is incomplete"),
        (encode(RGB, "BMP")[:16], ": the header of the BMP is incomplete"),
        (encode(RGB, "BMP")[:40], ": the header of the BMP is incomplete"),
        (encode(RGB, "JPEG2000")[:120], ": the header of the JPEG 2000 is incomplete"),
        (
            encode(RGB, "JPEG").replace(b"\xff\xda\0\x0c", b"\xff\xda\0\4"),
            ": the header of a scan of the JPEG is invalid",
        ),
        (encode(RGB, "GIF")[:-40], ": its pixels cannot be read"),
        (encode(RGB, "GIF")[:8], ": its header cannot be read"),
        (tiff(RGB, 2, t257=0), ": the TIFF tags give an impossible height"),
        (several_values(tiff(RGB, 2), 256), ": the TIFF tags give an impossible width"),
        (several_values(tiff(RGB, 2), 262), ": the TIFF tag PHOTOMETRIC has an impossible value"),
        (
            several_values(tiff(GREY, 1, t259=5), 259),
            ": the TIFF tag COMPRESSION has an impossible value",
        ),
        (DEFLATED[:-40] + bytes(40), ": its pixels cannot be read"),
    ],
)
def test_damage_is_said_once_and_then_where_it_is(data: bytes, message: str) -> None:
    with pytest.raises(CorruptImage) as caught:
        read(data)
    assert str(caught.value) == f"the image is damaged or incomplete{message}"


def test_damage_of_which_the_decoder_says_nothing_names_the_part() -> None:
    whole = saved(Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE))
    without_palette = bytearray(whole.replace(b"PLTE", b"PLTX"))
    with pytest.raises(CorruptImage, match=r"^the image is damaged or incomplete: its pixels"):
        read(bytes(without_palette))
    without_palette[whole.index(b"IEND") - 5] ^= 1  # the checksum of the pixels
    with pytest.raises(CorruptImage, match=r"^the PNG is damaged: its pixels cannot be decoded$"):
        read(bytes(without_palette))


def test_damaged_pixels_are_said_once_and_then_how() -> None:
    data = encode(RGB, "JPEG")
    reasons = set()
    for at in range(data.index(b"\xff\xda") + 14, len(data) - 2):
        damaged_at = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        try:
            read(damaged_at)
        except CorruptImage as error:
            reasons.add(str(error))
    assert any(reason.startswith("pixels of the JPEG are damaged: ") for reason in reasons)
    assert not any("Corrupt" in reason for reason in reasons)


# --- pages and channels ---


def stack(pages: int = 3, **options: Any) -> bytes:
    buffer = io.BytesIO()
    values = np.stack([GREY // (index + 1) for index in range(pages)])
    tifffile.imwrite(buffer, values, photometric="minisblack", **options)
    return buffer.getvalue()


def test_a_page_of_a_stack_has_to_be_chosen() -> None:
    data = stack()
    with pytest.raises(
        WrongSelection, match=r"has 3 pages; choose page=0 to page=2 .* or page=all"
    ):
        decode.inspect(data, max_pixels=LIMIT)
    header = decode.inspect(data, max_pixels=LIMIT, page=1)
    assert (header.pages, header.channels, header.page) == (3, 1, 1)
    assert (decode.decode(data, header) == GREY // 2).all()
    for page in (3, -1):
        with pytest.raises(WrongSelection, match=rf"page={page}: .* 3 pages, page=0 to page=2"):
            decode.inspect(data, max_pixels=LIMIT, page=page)


def test_a_channel_has_to_be_chosen_where_there_is_no_usual_image() -> None:
    data = stack(2, imagej=True)
    with pytest.raises(WrongSelection, match="has 2 channels; choose channel=0 to channel=1"):
        decode.inspect(data, max_pixels=LIMIT)
    assert (read(data, channel=1) == GREY // 2).all()
    with pytest.raises(WrongSelection, match="channel=2: the image has 2 channels"):
        decode.inspect(data, max_pixels=LIMIT, channel=2)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_a_channel_of_a_usual_image_may_be_chosen(format: str) -> None:
    for channel in range(3):
        assert (read(encode(RGB, format), channel=channel) == RGB[:, :, channel]).all()
    assert (read(encode(GREY, format), 0, 0) == GREY).all()
    for data, channel in ((encode(RGB, format), 3), (encode(GREY, format), 1)):
        with pytest.raises(WrongSelection, match=f"channel={channel}"):
            read(data, channel=channel)


def test_an_animation_has_one_page_and_says_how_many_frames_it_has() -> None:
    frames = [Image.fromarray(GREY // (index + 1)) for index in range(3)]
    for format in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:])
        assert decode.inspect(data, max_pixels=LIMIT).pages == 3
        assert decode.inspect(data, max_pixels=LIMIT, page=0).pages == 3
        assert decode.count_pages(data, max_pixels=LIMIT) == 1
        with pytest.raises(WrongSelection, match=r"page=1: .*3 frames"):
            decode.inspect(data, max_pixels=LIMIT, page=1)


def test_pages_are_counted_up_to_the_pixels_of_one_image() -> None:
    assert decode.count_pages(stack(), max_pixels=1800) == 3
    with pytest.raises(ImageTooLarge, match="3 pages"):
        decode.count_pages(stack(), max_pixels=1799)
    assert decode.inspect(stack(), max_pixels=600, page=2).width == 30


def test_a_stack_that_was_cut_off_is_read_where_its_page_is_chosen() -> None:
    whole = saved(
        Image.fromarray(GREY), "TIFF", save_all=True, append_images=[Image.fromarray(GREY // 2)]
    )
    cut = whole[:-200]  # within the second page
    with pytest.raises((WrongSelection, CorruptImage)):
        read(cut)
    assert (read(cut, 0) == GREY).all()


# --- orientation and reduced decoding ---


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_also_when_decoded_smaller(format: str, orientation: int) -> None:
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


def test_a_jpeg_is_decoded_smaller_where_that_is_enough() -> None:
    data = encode(np.asarray(Image.fromarray(RGB).resize((1600, 1200))), "JPEG")
    header = decode.inspect(data, max_pixels=LIMIT)
    reduced = decode.decode(data, header, at_least=(256, 384))
    assert (256, 384) <= reduced.shape[:2] < (1200, 1600)


def test_sixteen_bit_colour_is_read_at_full_depth() -> None:
    for data in (imagecodecs.png_encode(DEEP_RGB), tiff(DEEP_RGB, 2)):
        assert (read(data) == DEEP_RGB).all()


# --- damage ---


def kinds() -> dict[str, bytes]:
    """One small file of every format that is accepted, in the ways it is usually written."""
    grey = Image.fromarray(nuclei(40, 50)[0])
    colour, wide = grey.convert("RGB"), Image.fromarray(np.asarray(grey).astype(np.uint16) * 150)
    deep = np.asarray(colour).astype(np.uint16) * 150
    frames = {"save_all": True, "append_images": [Image.eval(grey, lambda value: 255 - value)] * 3}
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {format: saved(colour, format) for format in ("PNG", "JPEG", "TIFF", "BMP", "GIF")}
    files |= {f"{format} grey": saved(grey, format) for format in ("PNG", "JPEG", "TIFF", "GIF")}
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[f"TIFF {compression}"] = saved(colour, "TIFF", compression=compression)
    for compression in ("zstd", "lzma", "webp", "jpeg2000", "jpegxl", "png", "lerc"):
        files[f"TIFF {compression}"] = tiff(np.asarray(colour), 2, compression=compression)
    return files | {
        "PNG 16 bits": saved(wide),
        "PNG 16 bits colour": imagecodecs.png_encode(deep),
        "PNG palette": saved(grey.convert("P"), transparency=3),
        "PNG alpha": saved(colour.convert("RGBA")),
        "PNG turned": saved(colour, exif=turned.tobytes()),
        "JPEG progressive": saved(colour, "JPEG", progressive=True, exif=turned.tobytes()),
        "JPEG CMYK": saved(colour.convert("CMYK"), "JPEG"),
        "TIFF 16 bits": saved(wide, "TIFF"),
        "TIFF 16 bits colour": tiff(deep, 2, compression="lzw", rows=7),
        "TIFF planes": tiff(deep, 2, planes=True, compression="zlib"),
        "TIFF big-endian": tiff(deep, 2, order=">"),
        "TIFF float": saved(grey.convert("F"), "TIFF"),
        "TIFF fax": saved(grey.convert("1"), "TIFF", compression="group4"),
        "TIFF pages": saved(grey, "TIFF", **frames),
        "GIF frames": saved(grey, "GIF", **frames),
        "WEBP": saved(colour, "WEBP", exif=turned.tobytes()),
        "WEBP lossless": saved(colour, "WEBP", lossless=True),
        "MPO": saved(colour, "MPO", save_all=True, append_images=[colour]),
        "JPEG 12 bits": imagecodecs.jpeg8_encode(deep // 150 * 16, bitspersample=12),
        "JPEG lossless": imagecodecs.jpeg8_encode(np.asarray(colour), lossless=True),
        "JPEG subsampled": saved(colour.convert("CMYK"), "JPEG", subsampling="4:2:2"),
        "APNG": saved(colour, "PNG", **frames),
        "WEBP frames": saved(colour, "WEBP", **frames),
        "AVIF": saved(colour.convert("RGBA"), "AVIF", exif=turned.tobytes()),
        "AVIF 10 bits": imagecodecs.avif_encode(deep // 150 * 4, bitspersample=10, speed=10),
        "AVIF frames": saved(colour, "AVIF", **frames),
        "JPEG 2000": saved(colour.convert("RGBA"), "JPEG2000"),
        "JPEG 2000 16 bits": imagecodecs.jpeg2k_encode(deep, codecformat="j2k"),
        "JPEG 2000 tiles": saved(colour, "JPEG2000", tile_size=(16, 16)),
        "HEIC": saved(colour, "HEIF", exif=turned.tobytes()),
        "BMP alpha": saved(colour.convert("RGBA"), "BMP"),
        "BMP palette": saved(grey.convert("P"), "BMP"),
    }


OF_PYTHON = re.compile(
    r"unpack|buffer|object|instance|attribute|argument|out of range|tuple|shape|dtype|operand|None|"
    r"\((\d*,[\d, ]*)?\)|\[\d*"
)
"""Words and values of Python exceptions."""


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Change, cut off or insert bytes; rather in the header, where they do most."""
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
    """Correct the checksums of chunks, so that a decoder reads their contents."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(data)


@pytest.mark.parametrize("kind", kinds())
def test_damage_is_an_image_error_and_takes_no_memory(kind: str) -> None:
    """150 random damages; none may raise another exception, or take memory beyond the limit.

    Messages are for people who know images, not Python.
    """
    rng = random.Random(kind)
    whole = kinds()[kind]
    page = 0 if kind == "TIFF pages" else None
    assert read(whole, page).shape[:2] in ((40, 50), (50, 40))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(150):
        data = damaged(whole, rng)
        if kind.startswith("PNG") and rng.random() < 0.7:
            data = with_right_sums(data)
        enough = (8, 8) if rng.random() < 0.3 else None
        try:
            header = decode.inspect(data, max_pixels=1_000_000, page=page)
            pixels = decode.decode(data, header, at_least=enough)
        except ServiceError as error:
            assert not OF_PYTHON.search(str(error))
            continue
        assert enough or pixels.shape[:2] == (header.height, header.width)
        assert pixels.dtype in (np.uint8, np.uint16)
        assert pixels.shape[2:] in ((), (3,))
    assert memory_growth(before) < 100_000


def test_a_png_needs_its_end_and_bytes_after_it_do_not_matter() -> None:
    """Without its end it is rejected even if all pixels are there: the upload was cut off."""
    # Comments of 300 bytes after the pixels, so that there are chunks to walk through.
    comment = b"tEXt" + b"a\0" * 150
    chunk = (300).to_bytes(4, "big") + comment + zlib.crc32(comment).to_bytes(4, "big")
    for whole in (encode(RGB), encode(RGB)[:-12] + chunk * 3 + encode(RGB)[-12:]):
        for after in (b"", b"\n", b"IEND", bytes(1000), whole):
            assert (read(whole + after) == RGB).all()
        for missing in range(1, 17):
            with pytest.raises(CorruptImage, match="truncated: it has no IEND chunk"):
                read(whole[:-missing])
        with pytest.raises(CorruptImage):
            read(whole[:-1] + b"?")


def test_a_sixteen_bit_png_that_lacks_rows_is_damaged() -> None:
    whole = imagecodecs.png_encode(DEEP_RGB)
    start, stop = whole.index(b"IDAT") + 4, len(whole) - 16
    body = zlib.compress(zlib.decompress(whole[start:stop])[: 15 * 181])
    chunk = b"IDAT" + body
    cut = (
        whole[: start - 8]
        + len(body).to_bytes(4, "big")
        + chunk
        + zlib.crc32(chunk).to_bytes(4, "big")
        + whole[-12:]
    )
    with pytest.raises(CorruptImage):
        read(cut)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_compressed_metadata_takes_no_memory(kind: bytes, depth: int) -> None:
    """200 MB of zeros, compressed to 900 KB, before a good image: read without it, or rejected."""
    packed = zlib.compress(bytes(200_000_000), 1)
    data = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind] + packed
    chunk = len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
    image = RGB if depth == 8 else DEEP_RGB
    plain = imagecodecs.png_encode(image)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(CorruptImage):
        assert (read(plain[:33] + chunk + plain[33:]) == image).all()
    assert memory_growth(before) < 100_000


@pytest.mark.parametrize("pack", [zlib.compress, imagecodecs.zstd_encode])
def test_a_second_compression_that_unpacks_to_far_more_takes_no_memory(pack: Any) -> None:
    """LERC is often compressed again; its codec unpacks whatever is there."""
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        iter([pack(bytes(200_000_000))]),
        shape=GREY.shape,
        dtype=GREY.dtype,
        photometric="minisblack",
        compression="lerc",
        metadata=None,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptImage):
        read(buffer.getvalue())
    assert memory_growth(before) < 100_000


@pytest.mark.parametrize("compression", ["zlib", "lzw", "packbits", "lzma", "zstd"])
def test_a_strip_that_unpacks_to_far_more_takes_no_memory(compression: str) -> None:
    """One strip of 200 MB in a TIFF that says it has 16 rows."""
    bomb = tiff(np.zeros((20_000, 10_000), np.uint8), compression=compression, rows=20_000)
    for code in (257, 278):
        bomb = set_tag(bomb, code, 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(CorruptImage):
        assert not read(bomb).any()
    assert memory_growth(before) < 100_000


def test_a_small_header_before_a_large_avif_takes_no_more_than_its_pixels() -> None:
    """libavif decodes what the AV1 data state, and scales it to what the container states."""
    size = (3000, 3000)
    stated = b"ispe\0\0\0\0"
    data = saved(Image.new("RGB", size), "AVIF", speed=10)
    bomb = data.replace(
        stated + b"".join(side.to_bytes(4) for side in size), stated + b"\0\0\0\x10" * 2
    )
    assert bomb != data
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(CorruptImage):
        assert read(bomb).shape == (16, 16, 3)
    assert memory_growth(before) < 60_000


@pytest.mark.parametrize("format", ["AVIF", "JPEG2000", "HEIF"])
def test_a_large_image_of_a_few_bytes_is_rejected_by_its_header(format: str) -> None:
    data = saved(Image.new("RGB", (1500, 1500)), format)
    assert len(data) < 30_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageTooLarge, match="1500 x 1500"):
        decode.inspect(data, max_pixels=1_000_000)
    assert memory_growth(before) < 10_000


def test_animations_state_how_many_frames_they_have() -> None:
    files = kinds()
    for kind in ("GIF frames", "WEBP frames"):  # Pillow joins equal frames
        assert decode.inspect(files[kind], max_pixels=LIMIT).pages == 2
    assert decode.inspect(files["JPEG"], max_pixels=LIMIT).pages == 1
