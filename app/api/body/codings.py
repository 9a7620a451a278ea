"""Content codings of request bodies: gzip and deflate (RFC 9110, section 8.4.1).

Knows bytes; no HTTP beyond the names of codings. The caller limits the output, piece by piece.
"""

from __future__ import annotations

import zlib
from typing import Any

from app.errors import InvalidRequest, UnsupportedContentEncoding

_GZIP, _DEFLATE = "gzip", "deflate"
_SUPPORTED = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": _DEFLATE}
_ACCEPTED = f"{_GZIP}, {_DEFLATE}"
_MAX_MEMBERS = 10_000
"""Members of a gzip body. An empty one takes 20 bytes, and a few microseconds."""
_GZIP_BITS, _ZLIB_BITS, _RAW_BITS = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
"""Arguments that make zlib expect a header and a trailer of gzip, of zlib, or none."""


def find_coding(header: str) -> str | None:
    """The coding of a body, from its Content-Encoding; None if it has none.

    Raises:
        UnsupportedContentEncoding: one that is not supported, or several.
    """
    names = [name.strip() for name in header.lower().split(",")]
    codings = [name for name in names if name not in ("", "identity")]
    if not codings:
        return None
    if len(codings) > 1 or codings[0] not in _SUPPORTED:
        raise UnsupportedContentEncoding(
            f"Content-Encoding {header.strip()[:100]!r} is not supported; supported: {_ACCEPTED}",
            accepted=_ACCEPTED,
        )
    return _SUPPORTED[codings[0]]


class Decompressor:
    """Decompresses a body that arrives in chunks.

    A gzip body may have several members (RFC 1952, section 2.2), with zeros after the last one. A
    deflate body may lack the header of zlib, because some clients leave it out.

    Args:
        coding: from `find_coding`.
    """

    def __init__(self, coding: str) -> None:
        self.coding = coding
        self._input = b""
        self._more_output = False
        self._members = 0
        self._decompressor: Any = None

    def feed(self, data: bytes) -> None:
        """Add the next chunk of the body. The previous one must have been read."""
        self._input += data

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; fewer when the next chunk is needed.

        Raises:
            InvalidRequest: the body is not valid in its coding.
        """
        pieces = []
        try:
            while size and self._prepare():
                piece = self._decompressor.decompress(self._input, size)
                size -= len(piece)
                self._more_output = not size and not self._decompressor.eof
                self._input = self._decompressor.unused_data or self._decompressor.unconsumed_tail
                pieces.append(piece)
        except zlib.error as error:
            raise self._error(str(error)) from None
        return b"".join(pieces)

    def finish(self) -> None:
        """Check that the body is complete.

        Raises:
            InvalidRequest: it is not.
        """
        if self._decompressor is None or not self._decompressor.eof:
            raise self._error("it is truncated")

    def _prepare(self) -> bool:
        """Whether there is something to decompress. Starts the next member."""
        if self._decompressor is None:
            return self._start_first()
        if self._decompressor.eof:
            return self._start_next()
        return bool(self._input) or self._more_output

    def _start_first(self) -> bool:
        if self.coding == _GZIP:
            bits = _GZIP_BITS
        elif len(self._input) < 2:
            return False
        else:
            bits = _ZLIB_BITS if _has_zlib_header(self._input) else _RAW_BITS
        self._decompressor = zlib.decompressobj(bits)
        return bool(self._input)

    def _start_next(self) -> bool:
        self._input = self._input.lstrip(b"\0") if self.coding == _GZIP else self._input
        if not self._input:
            return False
        self._members += 1
        if self.coding != _GZIP:
            raise self._error("it has trailing data")
        if self._members >= _MAX_MEMBERS:
            raise self._error(f"it has more than {_MAX_MEMBERS} members")
        self._decompressor = zlib.decompressobj(_GZIP_BITS)
        return True

    def _error(self, fault: str) -> InvalidRequest:
        return InvalidRequest(f"the body is not valid {self.coding}: {fault}")


def _has_zlib_header(data: bytes) -> bool:
    """RFC 1950, section 2.2: method 8, and a check on both bytes."""
    return data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
