"""Recognizes what clients send in place of an image: nothing, or text of some kind.

Knows bytes; no decoder and no HTTP. `app.imaging.formats` names images of other formats.
"""

from __future__ import annotations

import re

from app.errors import CorruptImage

ACCEPTED = "JPEG, PNG, TIFF, WebP, BMP, GIF, AVIF or JPEG 2000"
FORM = "a multipart form"

_ITSELF = f"send the image itself, as {ACCEPTED}"
_DECODED = "send the bytes that it encodes"
_BASE64 = (
    rb'"?(iVBORw0KGgo|[/_]9j[/_]|R0lGOD|SUkqA|SUkrA|TU0AK|UklGR|Qk[0-3]|[/_]0[/_]{2}U|AAAADGpQ'
    rb"|AAAA[A-Za-z0-9+/_-]{2}Z0eX)[A-Za-z0-9+/_=%\s-]{16}"
)
"""The first bytes of the accepted formats in base64 (RFC 4648), perhaps as a JSON string."""
_TEXTS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"data:[\w.+-]*(/[\w.+-]+)?[;,]", re.I), "a data URL", _DECODED),
    (re.compile(_BASE64), "base64 text", _DECODED),
    (re.compile(rb'(\{\s*["}]|\[\s*["{\[\]\d-])[^\0-\x08\x0e-\x1f]*\Z'), "JSON", _ITSELF),
    (re.compile(rb"--[^\r\n]{1,200}\r?\nContent-", re.I), FORM, _ITSELF),
    (re.compile(rb"<!doctype html|<html", re.I), "an HTML page", _ITSELF),
    (
        re.compile(rb"[a-z_]\w{0,40}=[!-<>-~](\Z|[!-~]{1,99}\Z|[!-~]{99})", re.I),
        "a URL-encoded form",
        _ITSELF,
    ),
)
"""The beginning of a text, its name, and what is right."""
_HEAD_BYTES = 512
_MAX_QUOTED_BYTES, _MAX_QUOTED = 200, 60
"""A text of at most so many bytes is repeated, up to so many characters."""


def check_not_empty(data: bytes) -> None:
    """Check that a file has content.

    Raises:
        CorruptImage: it is empty.
    """
    if not data:
        raise CorruptImage(f"empty file (0 bytes); send {ACCEPTED}")


def name_text(data: bytes) -> str | None:
    """Name the text that these bytes are; None where they are none, or none that is known.

    Only the first 512 bytes are looked at.
    """
    kind = _find_kind(data)
    return kind[0] if kind else None


def describe_no_image(data: bytes) -> str:
    """Say that bytes of an unknown format are not an image, what they are, and what is right."""
    what = f"not a recognised image ({len(data)} bytes)"
    kind = _find_kind(data)
    return f"{what}: {kind[0]}; {kind[1]}" if kind else f"{what}; send {ACCEPTED}"


def _find_kind(data: bytes) -> tuple[str, str] | None:
    """The name of a text, and what is right."""
    head = data[:_HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, name, advice in _TEXTS:
        if beginning.match(head):
            return name, advice
    if len(data) > _MAX_QUOTED_BYTES:
        return None
    text = data.decode("utf-8", "replace").strip()
    if not text.isprintable() or "\ufffd" in text:
        return None
    shown = text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
    return f"the text {shown!r}", _ITSELF
