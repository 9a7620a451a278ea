"""The body of a request -> the files in it. Never buffers more bytes than allowed."""

from __future__ import annotations

import asyncio
import dataclasses
import unicodedata
import zlib
from collections.abc import AsyncGenerator
from pathlib import PurePosixPath

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import InvalidRequest, UnsupportedContentEncoding, UploadTooLarge
from app.inference.budget import Allocation

_RAW_TYPES = ("application/octet-stream",)
_MAX_CONTENT_TYPE = 1000
"""Characters of a Content-Type. Parsing its parameters takes quadratic time."""
_MAX_FILES = 1000
_MAX_PART_HEADERS = 16
_MAX_PART_HEADER_BYTES = 4096
_MAX_NAME = 120
_QUICK_JOIN = 1 << 20
"""Bytes that the event loop joins itself: it takes less time than a change of thread."""
_PIECE_BYTES = 64 * 1024
"""Bytes that are inflated in one call."""
_PARSED_BYTES = 16 * 1024
"""Bytes of a form that are parsed in one turn of the event loop. The parser takes up to 0.3 µs for
a byte (measured)."""
_ZLIB_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""Supported Content-Encoding -> the argument that makes zlib expect its header and trailer."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """One file of a request.

    Attributes:
        name: its name without folder and suffix, safe as a file name; empty for a raw body.
        data: its bytes.
    """

    name: str
    data: bytes


async def read_uploads(request: Request, max_bytes: int, allocation: Allocation) -> list[Upload]:
    """Read the files of a multipart body (its parts `file`), or the raw body as one file.

    Args:
        max_bytes: of the body, both as it is sent and decompressed.
        allocation: grows with every chunk that is kept.

    Raises:
        UploadTooLarge: more than `max_bytes`; the excess was never buffered.
        QueueFull: the memory budget is used up.
        UnsupportedContentEncoding: a Content-Encoding other than gzip and deflate.
        InvalidRequest: no file, another content type, or not valid in its Content-Encoding.
    """
    header = request.headers.get("content-type", "")
    content_type = header.partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _read_form(header, _decoded_body(request, max_bytes, allocation))
    if content_type.startswith("image/") or content_type in _RAW_TYPES:
        data = await read_body(request, max_bytes, allocation)
        if not data:
            raise InvalidRequest("the body is empty; send the bytes of an image")
        return [Upload("", data)]
    raise InvalidRequest(
        "send an image as multipart/form-data with a part named 'file', or as the raw body with "
        f"Content-Type image/* or application/octet-stream, not {content_type or 'none'!r}"
    )


async def read_body(request: Request, max_bytes: int, allocation: Allocation) -> bytes:
    """Read and decompress the whole body, whatever its content type.

    Raises:
        UploadTooLarge, QueueFull, UnsupportedContentEncoding: as in `read_uploads`.
        InvalidRequest: not valid in its Content-Encoding.
    """
    chunks = [chunk async for chunk in _decoded_body(request, max_bytes, allocation)]
    if sum(map(len, chunks)) <= _QUICK_JOIN:
        return b"".join(chunks)
    return await asyncio.to_thread(b"".join, chunks)


def check_not_empty(upload: Upload) -> None:
    """Check that a file has content.

    Raises:
        InvalidRequest: it is empty.
    """
    if not upload.data:
        raise InvalidRequest("empty file (0 bytes)")


async def _decoded_body(
    request: Request, max_bytes: int, allocation: Allocation
) -> AsyncGenerator[bytes, None]:
    """The chunks of the body without its Content-Encoding (RFC 9110, section 8.4)."""
    body = _limited_body(request, max_bytes)
    coding = ", ".join(request.headers.getlist("content-encoding")).strip().lower()
    if coding not in ("", "identity"):
        if coding not in _ZLIB_WINDOW_BITS:
            accepted = ", ".join(_ZLIB_WINDOW_BITS)
            raise UnsupportedContentEncoding(
                f"Content-Encoding {coding[:100]!r} is not supported; supported: {accepted}",
                accepted=accepted,
            )
        body = _inflate_body(body, coding, max_bytes)
    async for chunk in body:
        allocation.grow(len(chunk))
        yield chunk


async def _inflate_body(
    body: AsyncGenerator[bytes, None], coding: str, max_bytes: int
) -> AsyncGenerator[bytes, None]:
    """Decompress a body in pieces, on a thread.

    Args:
        coding: a key of `_ZLIB_WINDOW_BITS`.

    Raises:
        InvalidRequest: not valid in this coding.
        UploadTooLarge: more than `max_bytes`; it is not decompressed any further.
    """
    decompressor = zlib.decompressobj(_ZLIB_WINDOW_BITS[coding])
    inflated = 0
    async for chunk in body:
        if chunk and decompressor.eof:
            raise InvalidRequest(f"the body is not valid {coding}: it has trailing data")
        rest, full = chunk, bool(chunk)
        while rest or full:
            try:
                piece = await asyncio.to_thread(decompressor.decompress, rest, _PIECE_BYTES)
            except zlib.error as error:
                raise InvalidRequest(f"the body is not valid {coding}: {error}") from None
            rest, full = decompressor.unconsumed_tail, len(piece) == _PIECE_BYTES
            inflated += len(piece)
            if inflated > max_bytes:
                raise UploadTooLarge(
                    f"the request decompresses to more than the {max_bytes / 1e6:g} MB allowed"
                )
            if piece:
                yield piece
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidRequest(f"the body is not valid {coding}: truncated or has trailing data")


class _FormParser:
    """Collects the files of a multipart body (RFC 7578).

    A part is checked at the end of its headers. Nothing of a part that is not a file is kept, and
    names are UTF-8 whatever charset a client declares.

    Args:
        boundary: between the parts.

    Attributes:
        files: name and chunks of each.
        complete: the closing boundary was found.
    """

    def __init__(self, boundary: bytes) -> None:
        self.files: list[tuple[str, list[bytes]]] = []
        self.complete = False
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._start_part,
                "on_header_field": self._add_header,
                "on_header_value": self._add_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._check_part,
                "on_part_data": self._add_data,
                "on_end": self._end_form,
            },
            max_header_count=_MAX_PART_HEADERS,
            max_header_size=_MAX_PART_HEADER_BYTES,
        )

    def feed(self, data: bytes) -> None:
        """Parse the next bytes.

        Raises:
            InvalidRequest: malformed, or a part that is not a file.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequest(f"the multipart body is malformed: {error}") from None

    def _start_part(self) -> None:
        self._disposition = b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _check_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name")
        if name is None:
            raise InvalidRequest("the multipart body is malformed: a part has no name")
        if name != b"file":
            field = _decode_name(name[:100])
            raise InvalidRequest(f"unknown form field {field!r}; send images as 'file'")
        filename = options.get(b"filename")
        if filename is None:
            raise InvalidRequest("the part 'file' is not a file: it has no file name")
        if len(self.files) == _MAX_FILES:
            raise InvalidRequest(f"too many files; at most {_MAX_FILES} are allowed")
        self.files.append((safe_stem(_decode_name(filename)), []))

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self.files[-1][1].append(data[start:end])

    def _end_form(self) -> None:
        self.complete = True


def _decode_name(name: bytes) -> str:
    """UTF-8 (RFC 7578, section 5.1); what is not becomes U+FFFD."""
    return name.decode("utf-8", "replace")


async def _read_form(content_type: str, body: AsyncGenerator[bytes, None]) -> list[Upload]:
    boundary = _read_boundary(content_type)
    try:
        parser = _FormParser(boundary)
    except FormParserError as error:
        raise InvalidRequest(f"the multipart body is malformed: {error}") from None
    async for chunk in body:
        for start in range(0, len(chunk), _PARSED_BYTES):
            parser.feed(chunk[start : start + _PARSED_BYTES])
            await asyncio.sleep(0)
    if not parser.complete:  # the parser accepts parts without an end
        raise InvalidRequest("the multipart body is incomplete: no closing boundary")
    if not parser.files:
        raise InvalidRequest("the body has no part named 'file'")
    return await asyncio.to_thread(_join_files, parser.files)


def _read_boundary(content_type: str) -> bytes:
    """The boundary that a Content-Type declares.

    Raises:
        InvalidRequest: the header declares none, or is too long.
    """
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise InvalidRequest(f"Content-Type is longer than {_MAX_CONTENT_TYPE} characters")
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidRequest("the multipart body is malformed: Content-Type has no boundary")
    return boundary


def _join_files(files: list[tuple[str, list[bytes]]]) -> list[Upload]:
    """Join the chunks of each file, and free them."""
    uploads = []
    for name, chunks in files:
        uploads.append(Upload(name, b"".join(chunks)))
        chunks.clear()
    return uploads


async def _limited_body(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The chunks of the body as it is sent, up to `max_bytes`."""
    error = UploadTooLarge(f"the request is larger than the {max_bytes / 1e6:g} MB allowed")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise error
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise error
        yield chunk


def safe_stem(filename: str) -> str:
    """The last part of a client's path without its suffix, safe as a file name on any system."""
    stem = PurePosixPath(filename.replace("\\", "/")).stem
    printable = (c if c.isalnum() or c in " ._-()[]+=@" else "_" for c in stem)
    return unicodedata.normalize("NFC", "".join(printable)).strip(" .")[:_MAX_NAME]
