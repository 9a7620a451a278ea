"""The body of a request -> the files in it, never more bytes than allowed in memory."""

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
_CODINGS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""Content-Encoding -> what zlib calls its frame."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """One file of a request.

    Attributes:
        name: its stem, safe to use as a file name; empty for a raw body.
        data: its bytes.
    """

    name: str
    data: bytes


class _Parser(MultiPartParser):
    # The limit holds the whole body in check already; a temporary file would only add latency.
    spool_max_size = 2**62
    complete = False

    def on_end(self) -> None:
        self.complete = True


async def read_uploads(request: Request, max_bytes: int, share: Allocation) -> list[Upload]:
    """The files of a multipart body (its `file` parts), or the raw body itself.

    Args:
        max_bytes: of the body, as it comes and unpacked.
        share: of what all requests may hold; it grows with every chunk.

    Raises:
        UploadTooLarge: more than `max_bytes`; what is too much was never kept.
        QueueFull: the uploads of others take all the room.
        UnsupportedContentEncoding: a Content-Encoding other than gzip and deflate.
        InvalidRequest: no file, another kind of body, or not of the Content-Encoding it says.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, _plain(request, max_bytes, share))
    if kind.startswith("image/") or kind in _RAW_TYPES:
        data = await read_body(request, max_bytes, share)
        if not data:
            raise InvalidRequest("the body is empty; send the bytes of an image")
        return [Upload("", data)]
    raise InvalidRequest(
        "send an image as multipart/form-data with a part named 'file', or as the raw body with "
        f"Content-Type image/* or application/octet-stream, not {kind or 'nothing'!r}"
    )


async def read_body(request: Request, max_bytes: int, share: Allocation) -> bytes:
    """The whole body, unpacked, whatever it is.

    Raises:
        UploadTooLarge, QueueFull, UnsupportedContentEncoding: as `read_uploads`.
        InvalidRequest: not of the Content-Encoding it says.
    """
    return b"".join([chunk async for chunk in _plain(request, max_bytes, share)])


async def _plain(
    request: Request, max_bytes: int, share: Allocation
) -> AsyncGenerator[bytes, None]:
    """The body as it was before its Content-Encoding (RFC 9110, section 8.4)."""
    body = _limited(request, max_bytes, share)
    coding = ", ".join(request.headers.getlist("content-encoding")).strip().lower()
    if coding in ("", "identity"):
        async for chunk in body:
            yield chunk
        return
    if coding not in _CODINGS:
        accepted = ", ".join(_CODINGS)
        raise UnsupportedContentEncoding(
            f"Content-Encoding {coding[:100]!r} is not accepted; there are {accepted}",
            accepted=accepted,
        )
    packed = b"".join([chunk async for chunk in body])
    plain = await asyncio.to_thread(_inflate, packed, coding, max_bytes)
    share.take(len(plain))
    yield plain


def _inflate(data: bytes, coding: str, max_bytes: int) -> bytes:
    """What a body of this coding, one of `_CODINGS`, was before.

    Raises:
        InvalidRequest: it is not what it says.
        UploadTooLarge: it becomes more than `max_bytes`; it is not unpacked any further.
    """
    packed = zlib.decompressobj(_CODINGS[coding])
    try:
        plain = packed.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not {coding}: {error}") from None
    if len(plain) > max_bytes:
        raise UploadTooLarge(f"the request unpacks to more than the {max_bytes / 1e6:g} MB allowed")
    if not packed.eof or packed.unused_data:
        raise InvalidRequest(f"the body is not {coding}: it ends too early or goes on behind it")
    return plain


async def _read_form(request: Request, body: AsyncGenerator[bytes, None]) -> list[Upload]:
    try:
        parser = _Parser(request.headers, body, max_files=1000, max_fields=100)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise InvalidRequest(f"the multipart body is malformed: {error}") from error
    try:
        if not parser.complete:  # the parser says nothing of parts that have no end
            raise InvalidRequest(
                "the multipart body is incomplete: it ends before its closing boundary"
            )
        for field in form:
            if field != "file":
                raise InvalidRequest(f"unknown form field {field!r}; images go into 'file'")
        uploads = []
        for part in form.getlist("file"):
            if not isinstance(part, UploadFile):
                raise InvalidRequest("the part 'file' has no file name, so it is no file")
            uploads.append(Upload(_safe_stem(part.filename or ""), await part.read()))
    finally:
        await form.close()
    if not uploads:
        raise InvalidRequest("the body has no part named 'file'")
    return uploads


async def _limited(
    request: Request, max_bytes: int, share: Allocation
) -> AsyncGenerator[bytes, None]:
    """The body's chunks; raises as soon as they are too many."""
    error = UploadTooLarge(f"the request is larger than the {max_bytes / 1e6:g} MB allowed")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise error
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise error
        share.take(len(chunk))
        yield chunk


def _safe_stem(filename: str) -> str:
    """The last part of a client's path, without its suffix, fit for a file name anywhere."""
    stem = PurePosixPath(filename.replace("\\", "/")).stem
    printable = (c if c.isalnum() or c in " ._-()[]+=@" else "_" for c in stem)
    return unicodedata.normalize("NFC", "".join(printable)).strip(" .")[:120]
