"""The body of a request -> the files in it. Never buffers more bytes than allowed."""

from __future__ import annotations

import asyncio
import dataclasses
import unicodedata
import zlib
from collections.abc import AsyncGenerator
from pathlib import PurePosixPath

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.errors import InvalidRequest, UnsupportedContentEncoding, UploadTooLarge
from app.inference.budget import Allocation

_RAW_TYPES = ("application/octet-stream",)
_MAX_FILES = 1000
_MAX_FIELDS = 100
_MAX_NAME = 120
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
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _read_form(request, _decoded_body(request, max_bytes, allocation))
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
    return b"".join([chunk async for chunk in _decoded_body(request, max_bytes, allocation)])


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
    body = _limited_body(request, max_bytes, allocation)
    coding = ", ".join(request.headers.getlist("content-encoding")).strip().lower()
    if coding in ("", "identity"):
        async for chunk in body:
            yield chunk
        return
    if coding not in _ZLIB_WINDOW_BITS:
        accepted = ", ".join(_ZLIB_WINDOW_BITS)
        raise UnsupportedContentEncoding(
            f"Content-Encoding {coding[:100]!r} is not supported; supported: {accepted}",
            accepted=accepted,
        )
    compressed = b"".join([chunk async for chunk in body])
    data = await asyncio.to_thread(_decompress, compressed, coding, max_bytes)
    allocation.grow(len(data))
    yield data


def _decompress(data: bytes, coding: str, max_bytes: int) -> bytes:
    """Decompress a body.

    Args:
        coding: a key of `_ZLIB_WINDOW_BITS`.

    Raises:
        InvalidRequest: not valid in this coding.
        UploadTooLarge: more than `max_bytes`; it is not decompressed any further.
    """
    decompressor = zlib.decompressobj(_ZLIB_WINDOW_BITS[coding])
    try:
        plain = decompressor.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not valid {coding}: {error}") from None
    if len(plain) > max_bytes:
        raise UploadTooLarge(
            f"the request decompresses to more than the {max_bytes / 1e6:g} MB allowed"
        )
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidRequest(f"the body is not valid {coding}: truncated or has trailing data")
    return plain


class _FormParser(MultiPartParser):
    # The body's size is limited, and it is in memory already: temporary files would add latency.
    spool_max_size = 2**62
    complete = False

    def on_end(self) -> None:
        self.complete = True


async def _read_form(request: Request, body: AsyncGenerator[bytes, None]) -> list[Upload]:
    try:
        parser = _FormParser(request.headers, body, max_files=_MAX_FILES, max_fields=_MAX_FIELDS)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise InvalidRequest(f"the multipart body is malformed: {error}") from error
    try:
        if not parser.complete:  # the parser accepts parts without an end
            raise InvalidRequest("the multipart body is incomplete: no closing boundary")
        for field in form:
            if field != "file":
                raise InvalidRequest(f"unknown form field {field[:100]!r}; send images as 'file'")
        uploads = []
        for part in form.getlist("file"):
            if not isinstance(part, UploadFile):
                raise InvalidRequest("the part 'file' is not a file: it has no file name")
            uploads.append(Upload(safe_stem(part.filename or ""), await part.read()))
    finally:
        await form.close()
    if not uploads:
        raise InvalidRequest("the body has no part named 'file'")
    return uploads


async def _limited_body(
    request: Request, max_bytes: int, allocation: Allocation
) -> AsyncGenerator[bytes, None]:
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
        allocation.grow(len(chunk))
        yield chunk


def safe_stem(filename: str) -> str:
    """The last part of a client's path without its suffix, safe as a file name on any system."""
    stem = PurePosixPath(filename.replace("\\", "/")).stem
    printable = (c if c.isalnum() or c in " ._-()[]+=@" else "_" for c in stem)
    return unicodedata.normalize("NFC", "".join(printable)).strip(" .")[:_MAX_NAME]
