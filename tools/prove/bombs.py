"""Requests that are small to send and costly to process, against a service with normal clients.

While they run, `/livez` is asked all the time by another process, a normal client sends images,
and the memory of all processes is watched.
"""

from __future__ import annotations

import bisect
import io
import os
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image

from app.batching.deadline import Deadline
from app.inference.limits import DECODING_SECONDS, decoding_limit
from tools.prove.images import PNG_SIGNATURE, bmp, png_chunk
from tools.prove.report import Row, at_least, at_most, format_counts, none_of, noted
from tools.prove.subject import serving
from tools.prove.watch import LIVEZ_MS, Watch, small_image
from tools.prove.wire import Answer, exchange, request

MAX_MEGAPIXELS = 25
"""Limit of the service that is attacked: the bounds grow with it."""
_ALLOWED = frozenset({200, 400, 413, 415, 422, 429, 431, 503, 504})
_FORM = "multipart/form-data; boundary=B"
_END = b"--B--\r\n"
_INFER = "/v2/models/nuclei/infer"


class Bomb(NamedTuple):
    """A request.

    Attributes:
        body: is built when it is needed.
        kind: Content-Type.
        path: of the request.
        compressed: whether it is sent in gzip.
        fields: further lines of its head.
    """

    body: Callable[[], bytes]
    kind: str = "application/octet-stream"
    path: str = "/segment"
    compressed: bool = False
    fields: tuple[str, ...] = ()


def _deflate_zeros(size: int) -> bytes:
    compressor = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [
        compressor.compress(block[: min(len(block), left)]) for left in range(size, 0, -(1 << 20))
    ]
    return b"".join(parts) + compressor.flush()


def _png(width: int, height: int, *parts: bytes, bits: int = 8, color: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    start = PNG_SIGNATURE + png_chunk(b"IHDR", header)
    return start + b"".join(parts) + png_chunk(b"IEND", b"")


def _zeros_png(width: int, height: int, channels: int = 1, size: int = 1) -> bytes:
    """A PNG of zeros, `size` bytes per sample."""
    data = _deflate_zeros((1 + width * channels * size) * height)
    color = {1: 0, 4: 6}[channels]
    return _png(width, height, png_chunk(b"IDAT", data), bits=8 * size, color=color)


def _plain_png(side: int) -> bytes:
    """A PNG as clients send it."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 100).save(buffer, "PNG")
    return buffer.getvalue()


_PIXEL = png_chunk(b"IDAT", zlib.compress(b"\0\0"))


def _jpeg(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4000, 4000)).save(buffer, "JPEG", quality=50, **options)
    return buffer.getvalue()


def _progressive_jpeg(size: int) -> bytes:
    """A JPEG whose last scan is repeated up to `size` bytes."""
    data = _jpeg(progressive=True)
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scan * (size // len(scan)) + data[-2:]


def _jpeg_with(segment: bytes, count: int) -> bytes:
    data = _jpeg()
    return data[:2] + segment * count + data[2:]


def _gif(body: bytes, width: int = 1, height: int = 1) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + body + b";"


_GIF_FRAME = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"


def _tiff(width: int, height: int, data: bytes, *, tags: int = 0) -> bytes:
    """A grey TIFF of one strip, compressed by Deflate, with further tags."""
    start = 8 + 2 + 12 * (9 + tags) + 4
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8)]
    entries += [(262, 3, 1, 1), (273, 4, 1, start), (277, 3, 1, 1), (278, 4, 1, height)]
    entries += [(279, 4, 1, len(data)), *((40_000 + number, 3, 1, 1) for number in range(tags))]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4) + data


def _webp_frame() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()[20:]


def _webp(width: int, height: int, frames: int) -> bytes:
    """An animation of small frames on a large canvas."""
    pixels = _webp_frame()
    padded = pixels + b"\0" * (len(pixels) % 2)
    image = b"VP8L" + struct.pack("<I", len(pixels)) + padded
    frame = bytes(6) + (15).to_bytes(3, "little") * 2 + b"\1\0\0\0" + image
    chunks = [
        (
            b"VP8X",
            b"\2\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        )
    ]
    chunks += [(b"ANIM", bytes(6)), *([(b"ANMF", frame)] * frames)]
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(each)) + each for kind, each in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _part(content: bytes, name: bytes = b'name="file"; filename="a.png"') -> bytes:
    return b"--B\r\nContent-Disposition: form-data; " + name + b"\r\n\r\n" + content + b"\r\n"


_SIDE = 5000
BOMBS: dict[str, Bomb] = {
    "PNG of 400 megapixels": Bomb(lambda: _zeros_png(20_000, 20_000)),
    "PNG of 25 megapixels, RGBA, 16-bit": Bomb(lambda: _zeros_png(_SIDE, _SIDE, 4, 2)),
    "PNG of 100,000,000 x 1 pixels": Bomb(lambda: _png(100_000_000, 1, png_chunk(b"IDAT", b""))),
    "PNG of 2.6 million chunks": Bomb(
        lambda: _png(1, 1, png_chunk(b"tIME", b"") * 2_600_000, _PIXEL), compressed=True
    ),
    "PNG with 60 MB of text": Bomb(
        lambda: _png(1, 1, *[png_chunk(b"zTXt", b"k\0\0" + _deflate_zeros(1 << 20))] * 60, _PIXEL)
    ),
    "PNG with a profile of 200 MB": Bomb(
        lambda: _png(1, 1, png_chunk(b"iCCP", b"x\0\0" + _deflate_zeros(200 << 20)), _PIXEL)
    ),
    "JPEG of 7,000 scans": Bomb(lambda: _progressive_jpeg(1_000_000), compressed=True),
    "JPEG of 60 scans": Bomb(lambda: _jpeg_scans(50), compressed=True),
    "JPEG of 400,000 EXIF segments": Bomb(
        lambda: _jpeg_with(b"\xff\xe1\x00\x12Exif\0\0" + bytes(10), 400_000), compressed=True
    ),
    "JPEG of 7 million comments": Bomb(
        lambda: _jpeg_with(b"\xff\xfe\x00\x02", 7_000_000), compressed=True
    ),
    "JPEG with 31 MB between segments": Bomb(
        lambda: _jpeg_with(b"\xff", 31_000_000), compressed=True
    ),
    "BMP of RLE lines": Bomb(lambda: bmp(_SIDE, _SIDE, b"\1\0\0\0" * _SIDE + b"\0\1")),
    "BMP of RLE jumps": Bomb(lambda: bmp(2000, 2000, b"\0\2\0\0" * 7_700_000), compressed=True),
    "TIFF whose strip inflates to 2 GB": Bomb(
        lambda: _tiff(100, 100, _deflate_zeros(2_000_000_000))
    ),
    "TIFF of 25 megapixels in one strip": Bomb(
        lambda: _tiff(_SIDE, _SIDE, _deflate_zeros(_SIDE**2))
    ),
    "TIFF of 20,000 tags": Bomb(lambda: _tiff(10, 10, b"", tags=20_000)),
    "GIF of 2 million frames": Bomb(lambda: _gif(_GIF_FRAME * 2_000_000), compressed=True),
    "GIF of 15 million comments": Bomb(
        lambda: _gif(b"!\xfe" + b"\1a" * 15_000_000 + b"\0" + _GIF_FRAME), compressed=True
    ),
    "GIF on a canvas of 65,535 x 65,535": Bomb(lambda: _gif(_GIF_FRAME, 65_535, 65_535)),
    "WebP animation on 16,383 x 16,383": Bomb(lambda: _webp(16_383, 16_383, 2)),
    "WebP animation of 300,000 frames": Bomb(lambda: _webp(16, 16, 300_000), compressed=True),
    "form in the charset punycode": Bomb(
        lambda: _part(b"a" * 900_000, b'name="file"') + _END,
        f"{_FORM}; charset=punycode",
        compressed=True,
    ),
    "form of a 31 MB field": Bomb(
        lambda: _part(b"a" * 31_000_000, b'name="x"') + _END, _FORM, compressed=True
    ),
    "form of 1,000 files": Bomb(lambda: _part(b"x") * 1000 + _END, _FORM),
    "form of 200 wide images": Bomb(
        lambda: _part(_png(100_000_000, 1, png_chunk(b"IDAT", b""))) * 200 + _END, _FORM
    ),
    "form of near boundaries": Bomb(
        lambda: _part(b"\r\n--\r\n--Z" * 3_000_000) + _END, _FORM, compressed=True
    ),
    "boundary of 50 KB": Bomb(lambda: _END, _FORM + "B" * 50_000),
    "gzip of 31 MB of zeros": Bomb(lambda: bytes(31_000_000), compressed=True),
    "gzip of 300 MB of zeros": Bomb(lambda: bytes(300_000_000), compressed=True),
    "JSON of a 31 MB string": Bomb(
        lambda: b'{"id":"' + b"a" * 31_000_000 + b'"}', "application/json", _INFER, compressed=True
    ),
    "JSON of 15 million values": Bomb(
        lambda: b'{"x":[' + b"1," * 15_000_000 + b"1]}", "application/json", _INFER, compressed=True
    ),
    "JSON of 1 million brackets": Bomb(
        lambda: b"[" * 1_000_000, "application/json", _INFER, compressed=True
    ),
    "head of 20,000 fields": Bomb(small_image, fields=("X: y",) * 20_000),
    "head with a field of 200 KB": Bomb(small_image, fields=("X: " + "a" * 200_000,)),
    "Accept of 60 KB": Bomb(small_image, fields=("Accept: " + "a;q=1," * 10_000,)),
    "query of 60 KB": Bomb(small_image, path="/segment?" + "a=b&" * 15_000),
}


def _jpeg_scans(count: int) -> bytes:
    """As many scans as the structure allows, over 16 megapixels."""
    data = _jpeg(progressive=True)
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scan * count + data[-2:]


def run(seconds: float) -> list[Row]:
    """Send every bomb from as many clients as there are workers and one more.

    They repeat until the time is over.
    """
    workers = os.cpu_count() or 1
    flags = (f"--image-workers={workers}", f"--max-megapixels={MAX_MEGAPIXELS}")
    start = time.monotonic()
    answers: dict[str, list[Answer]] = {name: [] for name in BOMBS}
    starts: list[tuple[float, str]] = [(start, "nothing")]
    rounds = 0
    with serving(*flags) as subject, ThreadPoolExecutor(workers + 1) as clients:
        before = subject.memory()
        alone = exchange(subject.port, request(_plain_png(_SIDE)))
        start = time.monotonic()
        with Watch(subject) as watch:
            while not rounds or time.monotonic() < start + seconds:
                for name, bomb in BOMBS.items():
                    sent = _encode(bomb)
                    starts.append((time.monotonic(), name))
                    jobs = [
                        clients.submit(exchange, subject.port, sent) for _ in range(workers + 1)
                    ]
                    answers[name] += [job.result() for job in jobs]
                rounds += 1
        leftovers = subject.leftovers()
        restarts = f"{subject.metric('image_worker_kills_total'):g}"
        alive = subject.process.poll() is None
        tracebacks = subject.log().count("Traceback")
    every = [answer for each in answers.values() for answer in each]
    slowest = max(answers, key=lambda name: max(answer.seconds for answer in answers[name]))
    sent_at, milliseconds = watch.slowest_livez
    disturber = starts[bisect.bisect(starts, sent_at, key=lambda each: each[0]) - 1][1]
    limit = decoding_limit(MAX_MEGAPIXELS * 1_000_000, Deadline.never())
    # Decoding that reaches its limit, in two turns; or images that are valid, one after the other,
    # with each device as fast as it is.
    longest = max(
        2 * limit.seconds + DECODING_SECONDS, (workers + 1) * alone.seconds + limit.seconds
    )
    wrong = [
        f"{name}: {answer.status or answer.end}"
        for name, each in answers.items()
        for answer in each
        if answer.status not in _ALLOWED or not answer.complete
    ]
    return [
        noted("bombs, and requests with them", f"{len(BOMBS)}, {len(every):,}"),
        noted(f"a plain image of {MAX_MEGAPIXELS} megapixels alone", f"{alone.seconds:.1f} s"),
        noted("answers", format_counts(Counter(answer.status for answer in every))),
        none_of("answers other than a mask, a client's error, 429, 503 or 504", wrong),
        at_most(
            f"slowest answer ({slowest})", max(answer.seconds for answer in every), longest, "s"
        ),
        at_least("probes of /livez meanwhile", len(watch.probes), 100),
        at_most(f"slowest /livez (beside {disturber})", milliseconds, LIVEZ_MS, "ms"),
        noted("normal client meanwhile", format_counts(watch.normal)),
        none_of("its answers other than 200 and 429", watch.rejections),
        at_most(
            "memory of all processes at its peak",
            watch.peak / 1e6,
            (before + workers * limit.max_bytes + 512e6) / 1e6,
            "MB",
        ),
        noted("workers killed", restarts),
        none_of("left behind after the last answer", leftovers),
        at_most("tracebacks in the log", tracebacks, 0),
        none_of("service ended", [] if alive else ["it did"]),
    ]


def _encode(bomb: Bomb) -> bytes:
    return request(
        bomb.body(), *bomb.fields, path=bomb.path, kind=bomb.kind, compressed=bomb.compressed
    )
