"""Names of uploaded files: as clients encode them in a header, and safe as names of results.

Knows strings; no HTTP and no files.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from email.header import decode_header
from pathlib import PurePosixPath
from urllib.parse import unquote, unquote_to_bytes

MAX_NAME_BYTES = 215
"""A name may have 255 bytes on common file systems. The rest is for what results add to it."""

_SUFFIX = re.compile(
    r"(\.ome)?\.(a?png|avif|bmp|btf|dib|gif|hei[cf]|j2[ck]|jfif|jp2|jp[efgx]|jpeg|lsm|ndpi|qptiff|scn|"
    r"stk|svs|tf[28]|tiff?|webp)$",
    re.IGNORECASE,
)
"""Suffixes of image formats. Another suffix, as in scan.001 or img_1.5um, is part of the name."""

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", re.I)
"""Names of devices on Windows, alone or before a dot."""
_UNSAFE = frozenset('<>:"/\\|?*\ufffd')
_UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = frozenset("\u200c\u200d")
"""Format characters that emoji and several scripts need. Others change the direction of text or
are invisible."""
_EMOJI_TAGS = range(0xE0020, 0xE0080)

_CHARSET = re.compile(
    r"(us-)?ascii|utf-8|iso-8859-(1|2|15)|windows-125[0-2]|koi8-r|gb2312|gbk|gb18030|big5|euc-jp|"
    r"shift_jis|euc-kr",
    re.IGNORECASE,
)
"""Charsets of names. Python has others whose decoders take quadratic time."""
_WORD = re.compile(r"=\?[\w-]+(?:\*[\w-]+)?\?[bq]\?[^?\s]*\?=", re.I | re.ASCII)
_BETWEEN_WORDS = re.compile(r"(?<=\?=)\s+(?==\?)")
_PERCENT = re.compile(r"%[0-9a-f]{2}", re.I | re.ASCII)


def decode_filename(parameters: Mapping[str, bytes]) -> str:
    """The name of a file from the parameters of its Content-Disposition.

    Clients encode names in four ways: `filename*` (RFC 8187), UTF-8 (RFC 7578, section 5.1),
    encoded words (RFC 2047) and percent-encoding (RFC 7578, section 2). Browsers percent-encode
    quotes and line breaks alone.

    Args:
        parameters: by name in lower case, as sent.

    Returns:
        The name, or "" if there is none. Bytes that are not valid UTF-8 become U+FFFD.
    """
    extended = _decode_extended(parameters.get("filename*", b""))
    if extended is not None:
        return extended
    text = parameters.get("filename", b"").decode("utf-8", "replace")
    text = _WORD.sub(lambda word: _decode_word(word[0]), _BETWEEN_WORDS.sub("", text))
    if _PERCENT.search(text):
        try:
            return unquote(text, errors="strict")
        except UnicodeDecodeError:  # a percent sign that encodes nothing
            return text
    return text


def _decode_extended(value: bytes) -> str | None:
    """Decode charset'language'percent-encoded (RFC 8187, section 3.2)."""
    charset, _, tagged = value.decode("latin-1").partition("'")
    encoded = tagged.partition("'")[2]
    if not encoded or not _CHARSET.fullmatch(charset):
        return None
    try:
        return unquote_to_bytes(encoded).decode(charset)
    except UnicodeDecodeError:
        return None


def _decode_word(word: str) -> str:
    """Decode one encoded word (RFC 2047); one that is not valid stays as it is."""
    try:
        ((content, charset),) = decode_header(word)
        charset = (charset or "").partition("*")[0]  # RFC 2231, section 5: then a language
        if _CHARSET.fullmatch(charset) and isinstance(content, bytes):
            return content.decode(charset)
    except ValueError:  # also UnicodeDecodeError, and binascii's error
        pass
    return word


def safe_stem(filename: str) -> str:
    """A client's file name as `safe_name` makes it, without the suffix of an image."""
    return safe_name(strip_image_suffix(filename))


def strip_image_suffix(filename: str) -> str:
    """A file name without the suffix of an image format: cells for cells.ome.tif."""
    return _SUFFIX.sub("", filename)


def safe_name(filename: str) -> str:
    """A client's file name without folders, safe on any system.

    Unicode is kept in its composed form (NFC). The result has at most `MAX_NAME_BYTES` in UTF-8,
    and may be empty.
    """
    name = unicodedata.normalize("NFC", PurePosixPath(filename.replace("\\", "/")).name)
    name = "".join(c if _is_safe(c) else "_" for c in name).lstrip(" .")
    if _RESERVED.match(name):
        name = f"_{name}"
    return cut_utf8(name, MAX_NAME_BYTES).rstrip(" .")


def cut_utf8(text: str, size: int) -> str:
    """The first characters of a text that take at most `size` bytes in UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


def _is_safe(character: str) -> bool:
    if character in _JOINERS or ord(character) in _EMOJI_TAGS:
        return True
    unsafe = unicodedata.category(character) in _UNSAFE_CATEGORIES
    return not unsafe and character not in _UNSAFE
