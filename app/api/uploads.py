"""The body of a request -> the files in it. Never buffers more bytes than allowed."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Collection, Mapping

from fastapi import Request

from app.api.body.codings import Decompressor, find_coding
from app.api.body.form import FILE, FilePart, FormParser
from app.api.body.names import safe_name, safe_stem
from app.errors import CorruptImage, InvalidRequest, UploadTooLarge
from app.imaging.no_image import FORM, check_not_empty, name_text
from app.inference.budget import Allocation

_QUICK_JOIN = 1 << 20
"""Bytes that the event loop joins itself: it takes less time than a change of thread."""
_QUICK_NAMES = 8
"""Names that the event loop makes safe itself; a long one takes half a millisecond."""
_PIECE_BYTES = 64 * 1024
"""Bytes that are inflated in one call."""
_PARSED_BYTES = 16 * 1024
"""Bytes of a form that are parsed in one turn of the event loop. The parser takes up to 0.3 µs for
a byte (measured)."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """One file of a request.

    Attributes:
        name: its name without folder and suffix, safe as a file name; empty if the client sent
            none.
        data: its bytes.
        file_name: its name with the suffix, just as safe.
        is_field: a part of a form without a file name, as fields with a value are.
    """

    name: str
    data: bytes
    file_name: str = ""
    is_field: bool = False


@dataclasses.dataclass(frozen=True)
class Form:
    """The content of a body.

    Attributes:
        uploads: its files, at least one.
        values: of its other fields, by name.
    """

    uploads: list[Upload]
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)


async def read_uploads(
    request: Request,
    max_bytes: int,
    allocation: Allocation,
    *,
    parameters: Collection[str] = (),
) -> list[Upload]:
    """Read the files of a body: see `read_form`, without other fields."""
    return (await read_form(request, max_bytes, allocation, parameters=parameters)).uploads


async def read_form(
    request: Request,
    max_bytes: int,
    allocation: Allocation,
    *,
    fields: Collection[str] = (),
    parameters: Collection[str] = (),
) -> Form:
    """Read a multipart body, or a raw body as one file.

    Only a multipart body needs a content type. Others are recognised by their content later.

    Args:
        max_bytes: of the body, both as it is sent and decompressed.
        allocation: grows with every chunk that is kept.
        fields: of a multipart body, besides its parts `file`.
        parameters: of the query, which are not fields.

    Raises:
        UploadTooLarge: more than `max_bytes`; the excess was never buffered.
        QueueFull: the memory budget is used up.
        UnsupportedContentEncoding: a Content-Encoding other than gzip and deflate.
        InvalidRequest: no file, an unknown field, or not valid in its Content-Encoding.
        CorruptImage: the body is empty.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.strip().lower().startswith("multipart/"):
        parser = FormParser(content_type, fields, parameters)
        return await _read_parts(parser, _decoded_body(request, max_bytes), allocation)
    data = await read_body(request, max_bytes, allocation)
    check_not_empty(data)
    if name_text(data) == FORM:
        raise InvalidRequest(
            "the body is a multipart form, but its Content-Type does not say so; leave this "
            "header to the library that makes the body"
        )
    return Form([Upload("", data)])


async def read_body(request: Request, max_bytes: int, allocation: Allocation) -> bytes:
    """Read and decompress the whole body, whatever its content type.

    Raises:
        UploadTooLarge, QueueFull, UnsupportedContentEncoding: as in `read_form`.
        InvalidRequest: not valid in its Content-Encoding.
    """
    chunks = []
    async for chunk in _decoded_body(request, max_bytes):
        allocation.grow(len(chunk))
        chunks.append(chunk)
    if sum(map(len, chunks)) <= _QUICK_JOIN:
        return b"".join(chunks)
    return await asyncio.to_thread(b"".join, chunks)


def check_upload(upload: Upload) -> None:
    """Check that a file has content, and is not the text of a field. Its format is not checked.

    Raises:
        CorruptImage: it is empty, or a text, as curl sends it for `-F file=cells.png`.
    """
    check_not_empty(upload.data)
    if upload.is_field and (text := name_text(upload.data)):
        raise CorruptImage(
            f"the part {FILE!r} has no file name and is {text}, not an image; send the file "
            "itself, with curl as -F file=@cells.png"
        )


def _decoded_body(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The chunks of the body without its Content-Encoding (RFC 9110, section 8.4)."""
    body = _limited_body(request, max_bytes)
    coding = find_coding(",".join(request.headers.getlist("content-encoding")))
    return body if coding is None else _inflate_body(body, coding, max_bytes)


async def _inflate_body(
    body: AsyncGenerator[bytes, None], coding: str, max_bytes: int
) -> AsyncGenerator[bytes, None]:
    """Decompress a body in pieces, on a thread.

    Raises:
        InvalidRequest: not valid in this coding.
        UploadTooLarge: more than `max_bytes`; it is not decompressed any further.
    """
    decompressor = Decompressor(coding)
    inflated = 0
    async for chunk in body:
        decompressor.feed(chunk)
        full = True
        while full:
            piece = await asyncio.to_thread(decompressor.read, _PIECE_BYTES)
            full = len(piece) == _PIECE_BYTES
            inflated += len(piece)
            if inflated > max_bytes:
                raise UploadTooLarge(
                    f"the request decompresses to more than the {max_bytes / 1e6:g} MB allowed"
                )
            if piece:
                yield piece
    decompressor.finish()


async def _read_parts(
    parser: FormParser, body: AsyncGenerator[bytes, None], allocation: Allocation
) -> Form:
    async for chunk in body:
        allocation.grow(len(chunk))
        for start in range(0, len(chunk), _PARSED_BYTES):
            parser.feed(chunk[start : start + _PARSED_BYTES])
            await asyncio.sleep(0)
    parser.finish()
    values = {name: value.decode("utf-8", "replace") for name, value in parser.values.items()}
    if parser.file_bytes <= _QUICK_JOIN and len(parser.files) <= _QUICK_NAMES:
        return Form(_join_files(parser.files), values)
    return Form(await asyncio.to_thread(_join_files, parser.files), values)


def _join_files(files: list[FilePart]) -> list[Upload]:
    """Join the chunks of each file, and free them."""
    uploads = []
    for file in files:
        data = b"".join(file.chunks)
        uploads.append(Upload(safe_stem(file.name), data, safe_name(file.name), file.is_field))
        file.chunks.clear()
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
