"""Files whose structure would keep a decoder busy, and files of every format that are fine."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.errors import CorruptImage, ImageTooLarge
from app.imaging.structure import check_structure
from tests.conftest import FIXTURES, ROOT, encode, nuclei, tiff

PNG = b"\x89PNG\r\n\x1a\n"
GREY = nuclei(64, 48)[0]
COLOUR = np.dstack([GREY, GREY, GREY])


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    length = struct.pack(">I", len(content))
    return length + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def segment(marker: int, content: bytes = b"") -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def png(*chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return PNG + header + b"".join(chunks) + chunk(b"IEND")


def jpeg(*segments: bytes, **options: Any) -> bytes:
    """A JPEG with more segments at its start."""
    plain = encode(GREY, "JPEG", **options)
    return plain[:2] + b"".join(segments) + plain[2:]


def many_scans(scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    plain = encode(GREY, "JPEG", progressive=True)
    last = plain[plain.rindex(b"\xff\xda") : -2]
    return plain[:-2] + last * scans + plain[-2:]


def gif(*blocks: bytes) -> bytes:
    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return header + b"".join(blocks) + GIF_FRAME + b";"


GIF_FRAME = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"


def bmp(width: int, height: int, compression: int, pixels: bytes) -> bytes:
    palette = bytes(4 * 256)
    offset = 54 + len(palette)
    header = struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
    info = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(pixels), 0, 0, 256, 0
    )
    return b"BM" + header + info + palette + pixels


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(each)) + each for kind, each in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int, *, animated: bool = False) -> bytes:
    sides = ((side - 1).to_bytes(3, "little") for side in (width, height))
    return bytes([2 * animated, 0, 0, 0]) + b"".join(sides)


def box(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def avif(*boxes: bytes) -> bytes:
    return box(b"ftyp", b"avif\0\0\0\0avif") + b"".join(boxes)


def meta(*boxes: bytes) -> bytes:
    return box(b"meta", bytes(4) + b"".join(boxes))


def items(kind: bytes, version: int, number: int) -> bytes:
    """A box that says how many entries it lists."""
    head = bytes([version, 0, 0, 0]) + (bytes(2) if kind == b"iloc" else b"")
    long = kind == b"ipma" or version >= {b"iinf": 1, b"iloc": 2}[kind]
    return box(kind, head + number.to_bytes(4 if long else 2))


def frames(number: int) -> bytes:
    content = box(b"stsz", bytes(8) + number.to_bytes(4))
    for kind in (b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        content = box(kind, content)
    return content


def codestream(
    components: int = 3, tile: int = 64, layers: int = 1, comments: int = 0, size: int = 64
) -> bytes:
    """The header of a JPEG 2000 of size x size pixels."""
    siz = struct.pack(">H8IH", 0, size, size, 0, 0, tile, tile, 0, 0, components)
    siz += b"\x07\1\1" * components
    cod = struct.pack(">BBHB", 0, 0, layers, 0) + b"\5\4\4\0\0"
    header = segment(0x51, siz) + segment(0x52, cod) + segment(0x64, bytes(60_000)) * comments
    return b"\xff\x4f" + header + b"\xff\x90"


def jp2(*boxes: bytes) -> bytes:
    return box(b"jP  ", b"\r\n\x87\n") + b"".join(boxes) + box(b"jp2c", codestream())


def big_tiff(tag: int, offset: int) -> bytes:
    """A BigTIFF of one tag whose value lies at an offset."""
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16)
    return head + struct.pack("<QHHQQ", 1, tag, 4, 100, offset) + bytes(8)


def tiff_of_tags(*tags: tuple[int, int, int, int], size: int = 0) -> bytes:
    """A TIFF of tag, type, number of values and value, and `size` bytes after them."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4 + size)


def tiff_of_directories(number: int) -> bytes:
    """A chain of empty directories."""
    head = b"II*\0" + struct.pack("<I", 8)
    return head + b"".join(struct.pack("<HI", 0, 14 + 6 * index) for index in range(number))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(many_scans(7000), id="jpeg-scans"),
        pytest.param(jpeg(segment(0xE1, b"Exif\0\0") * 100), id="jpeg-exif"),
        pytest.param(jpeg(segment(0xFE) * 3000), id="jpeg-comments"),
        pytest.param(jpeg(b"\xff\xfe\0\0" * 3000), id="jpeg-lengths-of-zero"),
        pytest.param(jpeg(b"\xff" * 100_000), id="jpeg-padding"),
        pytest.param(jpeg(b"x" * 100_000), id="jpeg-junk"),
        pytest.param(jpeg(b"\xff\xd9" * 3000), id="jpeg-ends-before-the-scan"),
        pytest.param(jpeg(segment(0xE2, bytes(60_000)) * 300), id="jpeg-metadata"),
        pytest.param(
            jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5000) * 3),
            id="jpeg-photoshop",
        ),
        pytest.param(png(chunk(b"tIME") * 5000), id="png-chunks"),
        pytest.param(png(chunk(b"IDAT") * 70_000), id="png-empty-pixels"),
        pytest.param(png(chunk(b"eXIf", bytes(17 << 20))), id="png-metadata"),
        pytest.param(gif(GIF_FRAME * 11_000), id="gif-frames"),
        pytest.param(gif(b"!\xfe" + b"\1a" * 2000 + b"\0"), id="gif-comment-of-many-blocks"),
        pytest.param(gif(b"!\xfe\0" * 2000), id="gif-comments"),
        pytest.param(gif(b"!\x01" + b"\1a" * 70_000 + b"\0"), id="gif-extension"),
        pytest.param(gif(b"x" * 70_000), id="gif-junk"),
        pytest.param(gif(GIF_FRAME[:11] + b"\1a" * 1_100_000 + b"\0"), id="gif-pixels"),
        pytest.param(tiff_of_tags(*[(300, 3, 1, 1)] * 2000), id="tiff-tags"),
        pytest.param(tiff_of_tags((273, 4, 200_000, 100), size=900_000), id="tiff-strips"),
        pytest.param(
            tiff_of_tags(*((40_000 + tag, 7, 1 << 20, 8) for tag in range(100)), size=1 << 20),
            id="tiff-shared-metadata",
        ),
        pytest.param(tiff_of_directories(11_000), id="tiff-directories"),
        pytest.param(bmp(100_000_000, 1, 1, b"\1\0\0\0\0\1"), id="bmp-rle-pixels"),
        pytest.param(bmp(100, 100, 1, b"\0\2\0\0" * 10_000), id="bmp-rle-bytes"),
        pytest.param(webp((b"VP8X", canvas(16, 16)), *[(b"ABCD", b"")] * 21_000), id="webp-chunks"),
        pytest.param(webp((b"VP8X", canvas(1 << 24, 255))), id="webp-canvas"),
        pytest.param(
            webp((b"VP8X", canvas(16_383, 2049, animated=True))), id="webp-animation-canvas"
        ),
        pytest.param(webp((b"XMP ", bytes(17 << 20))), id="webp-metadata"),
        pytest.param(avif(box(b"free") * 70_000), id="avif-boxes"),
        pytest.param(avif(meta(box(b"free") * 70_000)), id="avif-boxes-within"),
        pytest.param(avif(meta(items(b"iinf", 0, 5000))), id="avif-items"),
        pytest.param(avif(meta(items(b"iinf", 1, 5000))), id="avif-items-of-version-1"),
        pytest.param(avif(meta(items(b"iloc", 2, 5000))), id="avif-locations"),
        pytest.param(avif(meta(items(b"ipma", 0, 5000))), id="avif-properties"),
        pytest.param(avif(frames(20_000)), id="avif-frames"),
        pytest.param(avif(box(b"uuid", bytes(17 << 20))), id="avif-metadata"),
        pytest.param(codestream(components=5), id="jpeg2000-components"),
        pytest.param(codestream(tile=1, size=300), id="jpeg2000-tiles"),
        pytest.param(codestream(layers=2000), id="jpeg2000-layers"),
        pytest.param(codestream(comments=300), id="jpeg2000-comments"),
        pytest.param(jp2(box(b"free") * 2000), id="jpeg2000-boxes"),
        pytest.param(jp2(box(b"uuid", bytes(17 << 20))), id="jpeg2000-metadata"),
    ],
)
def test_file_beyond_a_bound_is_too_large(data: bytes) -> None:
    start = time.perf_counter()
    with pytest.raises(ImageTooLarge, match="has more"):
        check_structure(data)
    assert time.perf_counter() - start < 1


def tiff_of_strips(
    strips: list[bytes], compression: int, order: str = "<", copies: int = 1
) -> bytes:
    """A TIFF of strips that follow its directory; each is listed `copies` times."""
    number = len(strips) * copies
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, 3)
    arrays_at = len(head) + 3 * 12 + 4
    place = arrays_at + 2 * 4 * number
    offsets, sizes = [], []
    for strip in strips:
        offsets += [place - index for index in range(copies)]
        sizes += [len(strip)] * copies
        place += len(strip)
    arrays = struct.pack(f"{order}{number}I", *offsets) + struct.pack(f"{order}{number}I", *sizes)
    tags = struct.pack(order + "HHIHH", 259, 3, 1, compression, 0)
    for tag, values, at in ((273, offsets, arrays_at), (279, sizes, arrays_at + 4 * number)):
        tags += struct.pack(order + "HHII", tag, 4, number, at if number > 1 else values[0])
    return head + tags + bytes(4) + arrays + b"".join(strips)


@pytest.mark.parametrize("order", "<>")
def test_scans_of_jpegs_in_a_tiff_are_counted(order: str) -> None:
    plain = encode(GREY, "JPEG")
    check_structure(tiff_of_strips([many_scans(40)], 7, order))
    check_structure(tiff_of_strips([many_scans(7000)], 1, order))  # they only look like scans
    check_structure(tiff_of_strips([plain] * 1000, 7, order))
    for strips in ([many_scans(7000)], [plain, plain, many_scans(7000)]):
        with pytest.raises(ImageTooLarge, match="more than 64 JPEG scans"):
            check_structure(tiff_of_strips(strips, 7, order))


def test_strips_that_overlap_are_corrupt() -> None:
    """Each would be decoded."""
    with pytest.raises(CorruptImage, match="overlap"):
        check_structure(tiff_of_strips([encode(GREY, "JPEG") + bytes(10_000)], 7, copies=100))


@pytest.mark.parametrize("offset", [52, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_tag_outside_a_big_tiff_is_corrupt(offset: int) -> None:
    with pytest.raises(CorruptImage, match="outside the file"):
        check_structure(big_tiff(273, offset))
    check_structure(big_tiff(50_000, offset))  # metadata


def test_directory_outside_a_big_tiff_is_corrupt() -> None:
    with pytest.raises(CorruptImage, match="outside the file"):
        check_structure(b"II+\0\x08\0\0\0" + struct.pack("<Q", 1 << 63))


def test_directories_in_subifds_are_counted() -> None:
    children = 10_500
    head = b"II*\0" + struct.pack("<IH", 8, 1)
    array_at = len(head) + 12 + 4
    first = array_at + 4 * children
    data = head + struct.pack("<HHII", 330, 4, children, array_at) + bytes(4)
    data += struct.pack(f"<{children}I", *(first + 6 * index for index in range(children)))
    data += bytes(6 * children)  # directories without tags
    with pytest.raises(ImageTooLarge, match="more than 10000 directories"):
        check_structure(data)
    looping = head + struct.pack("<HHII", 330, 4, 1, 8) + bytes(4)
    check_structure(looping)


def test_loop_of_tiff_directories_ends() -> None:
    check_structure(b"II*\0" + struct.pack("<IHI", 8, 0, 8))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: b"\xff\xd8", id="jpeg-start"),
        pytest.param(lambda: jpeg()[:300], id="jpeg-truncated"),
        pytest.param(lambda: b"\xff\xd8" + b"\xff" * 30_000, id="jpeg-ends-in-padding"),
        pytest.param(lambda: PNG + b"\0\0", id="png-truncated"),
        pytest.param(lambda: gif()[:20], id="gif-truncated"),
        pytest.param(lambda: b"II*\0", id="tiff-truncated"),
        pytest.param(lambda: b"BM", id="bmp-truncated"),
        pytest.param(lambda: b"RIFF", id="webp-truncated"),
        pytest.param(lambda: avif()[:10], id="avif-truncated"),
        pytest.param(lambda: avif(meta(items(b"iinf", 0, 9)))[:-1], id="avif-items-truncated"),
        pytest.param(lambda: codestream()[:20], id="jpeg2000-truncated"),
        pytest.param(lambda: jp2()[:40], id="jp2-truncated"),
    ],
)
def test_truncated_file_is_left_to_the_decoder(make: Callable[[], bytes]) -> None:
    check_structure(make())


def photo(size: int = 300) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def full_exif() -> bytes:
    """64 KB of EXIF."""
    exif = Image.Exif()
    exif[0x010E] = "x" * 65_000
    return exif.tobytes()


def small_idats() -> bytes:
    """A PNG whose pixels are in chunks of 100 bytes."""
    pixels = zlib.compress(photo().tobytes())
    chunks = (pixels[at : at + 100] for at in range(0, len(pixels), 100))
    return png(*(chunk(b"IDAT", each) for each in chunks))


def animation(frames: int, format: str) -> bytes:
    images = [Image.new("L", (8, 8), index % 256) for index in range(frames)]
    return save(images[0], format, save_all=True, append_images=images[1:], duration=20)


def tiles(number: int) -> bytes:
    """A TIFF of as many tiles of 16 x 16 pixels."""
    offsets = struct.pack(f"<{number}I", *range(1000, 1000 + number))
    sizes = struct.pack(f"<{number}I", *[256] * number)
    first = 8 + 2 + 8 * 12 + 4
    data = tiff_of_tags(
        (256, 4, 1, 16 * number),
        (257, 4, 1, 16),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (322, 4, 1, 16),
        (323, 4, 1, 16),
        (324, 4, number, first),
        (325, 4, number, first + len(offsets)),
    )
    return data + offsets + sizes


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: save(photo(), "JPEG"), id="jpeg"),
        pytest.param(
            lambda: save(
                photo(), "JPEG", progressive=True, exif=full_exif(), icc_profile=bytes(700_000)
            ),
            id="jpeg-progressive-exif-icc",
        ),
        pytest.param(lambda: save(photo().convert("CMYK"), "JPEG", progressive=True), id="cmyk"),
        pytest.param(lambda: jpeg(restart_marker_blocks=1), id="jpeg-restart-markers"),
        pytest.param(lambda: save(photo(), "PNG", exif=full_exif()), id="png-exif"),
        pytest.param(small_idats, id="png-many-idat"),
        pytest.param(lambda: animation(1000, "PNG"), id="apng"),
        pytest.param(lambda: animation(1000, "GIF"), id="gif-1000-frames"),
        pytest.param(lambda: save(photo(1000), "GIF", comment=b"x" * 60_000), id="gif-comment"),
        pytest.param(lambda: tiles(20_000), id="tiff-20000-tiles"),
        pytest.param(lambda: animation(1000, "TIFF"), id="tiff-1000-pages"),
        pytest.param(lambda: save(photo(), "TIFF", compression="tiff_lzw"), id="tiff-lzw"),
        pytest.param(lambda: tiff(GREY, big=True), id="bigtiff"),
        pytest.param(lambda: tiff(GREY.astype(np.uint16), order=">"), id="tiff-big-endian"),
        pytest.param(lambda: tiff(COLOUR, 2, planes=True), id="tiff-planes"),
        pytest.param(lambda: save(photo(), "BMP"), id="bmp"),
        pytest.param(lambda: bmp(300, 300, 1, b"\1\7" * 90_000 + b"\0\0" * 300), id="bmp-rle"),
        pytest.param(lambda: save(photo(), "WEBP", lossless=True, exif=full_exif()), id="webp"),
        pytest.param(lambda: animation(200, "WEBP"), id="webp-animation"),
        pytest.param(lambda: save(photo(), "AVIF", exif=full_exif()), id="avif"),
        pytest.param(lambda: animation(200, "AVIF"), id="avif-animation"),
        pytest.param(lambda: save(photo(), "JPEG2000", tile_size=(20, 20)), id="jpeg2000-tiles"),
    ],
)
def test_real_file_passes(make: Callable[[], bytes]) -> None:
    check_structure(make())


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in (FIXTURES, ROOT / "app/static/samples")
        for path in sorted(folder.rglob("*.*"))
        if path.suffix not in ("", ".txt", ".md")
    ],
    ids=lambda path: path.name,
)
def test_fixture_passes(path: Path) -> None:
    check_structure(path.read_bytes())
