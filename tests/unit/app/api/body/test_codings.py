"""Content codings: what is inflated, in which chunks, and what is rejected."""

from __future__ import annotations

import gzip
import time
import zlib
from collections.abc import Callable

import pytest

from app.api.body.codings import Decompressor, find_coding
from app.errors import InvalidRequest, UnsupportedContentEncoding

TEXT = bytes(200_000) + b"the end"


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def stored_deflate(data: bytes) -> bytes:
    """Without compression: its first bytes are those of a block."""
    compressor = zlib.compressobj(0, wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def members(data: bytes) -> bytes:
    """A gzip body as `cat a.gz b.gz` makes it, with an empty member."""
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(b"") + gzip.compress(data[half:])


def inflate(coding: str, body: bytes, *, chunk: int = 1 << 30, piece: int = 1 << 16) -> bytes:
    decompressor = Decompressor(coding)
    inflated = b""
    for start in range(0, len(body), chunk):
        decompressor.feed(body[start : start + chunk])
        while True:
            read = decompressor.read(piece)
            assert len(read) <= piece
            inflated += read
            if len(read) < piece:
                break
    decompressor.finish()
    return inflated


@pytest.mark.parametrize("chunk", [1, 7, 1000, 1 << 30])
@pytest.mark.parametrize("piece", [1000, 1 << 16])
@pytest.mark.parametrize(
    ("coding", "compress"),
    [
        ("gzip", gzip.compress),
        ("gzip", members),
        ("gzip", lambda data: members(data) + bytes(512)),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("deflate", stored_deflate),
    ],
)
def test_body_is_inflated_whatever_chunks_it_arrives_in(
    coding: str, compress: Callable[[bytes], bytes], chunk: int, piece: int
) -> None:
    body = compress(TEXT) if chunk > 1 else compress(TEXT[-500:])
    expected = TEXT if chunk > 1 else TEXT[-500:]
    assert inflate(coding, body, chunk=chunk, piece=piece) == expected


@pytest.mark.parametrize(
    ("coding", "body", "fault"),
    [
        ("gzip", b"", "truncated"),
        ("gzip", gzip.compress(TEXT)[:-5], "truncated"),
        ("gzip", members(TEXT)[:-5], "truncated"),
        ("gzip", gzip.compress(TEXT) + b"more", "incorrect header"),
        ("gzip", gzip.compress(TEXT) + b"\x1f", "truncated"),
        ("gzip", zlib.compress(TEXT), "incorrect header"),
        ("gzip", gzip.compress(b"") * 10_001, "members"),
        ("deflate", b"", "truncated"),
        ("deflate", b"x", "truncated"),
        ("deflate", zlib.compress(TEXT)[:-3], "truncated"),
        ("deflate", zlib.compress(TEXT) + b"more", "trailing data"),
        ("deflate", b"\xff\xff\xff", "invalid"),
    ],
)
def test_fault_of_a_body_is_named(coding: str, body: bytes, fault: str) -> None:
    with pytest.raises(InvalidRequest, match=f"not valid {coding}: .*{fault}"):
        inflate(coding, body)


def test_one_piece_of_a_bomb_is_read_at_a_time() -> None:
    decompressor = Decompressor("gzip")
    decompressor.feed(gzip.compress(bytes(50_000_000)))
    assert len(decompressor.read(1000)) == 1000


def test_tiny_members_take_little_time() -> None:
    start = time.process_time()
    assert inflate("gzip", gzip.compress(b"a") * 9000, chunk=1 << 16) == b"a" * 9000
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        ("", None),
        ("identity", None),
        (" , identity,", None),
        ("gzip", "gzip"),
        ("X-GZIP", "gzip"),
        ("Deflate", "deflate"),
        ("identity, gzip", "gzip"),
    ],
)
def test_coding_is_found(header: str, coding: str | None) -> None:
    assert find_coding(header) == coding


@pytest.mark.parametrize("header", ["br", "zstd", "gzip, gzip", "gzip, br", "gzip;q=1", "x" * 500])
def test_other_codings_are_named(header: str) -> None:
    with pytest.raises(UnsupportedContentEncoding) as raised:
        find_coding(header)
    assert header[:100] in str(raised.value)
    assert raised.value.accepted == "gzip, deflate"
