"""Name files that hold no network, by their first bytes: images, archives, text.

Knows bytes; no networks and no command line.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from model.errors import CheckpointError
from model.pixels import is_tiff
from model.readers import name_image_format

_HEAD_BYTES = 512
_SHOWN = 40
"""Characters of a text that a message repeats."""

_ARCHIVE = "{path} is a {format} archive; unpack it, and import the file of the network in it"
_NO_NETWORK = "{path} is a {format} file, not a network"

_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x1f\x8b", _ARCHIVE, "gzip"),
    (0, b"BZh", _ARCHIVE, "bzip2"),
    (0, b"\xfd7zXZ\0", _ARCHIVE, "xz"),
    (0, b"\x28\xb5\x2f\xfd", _ARCHIVE, "Zstandard"),
    (0, b"7z\xbc\xaf\x27\x1c", _ARCHIVE, "7z"),
    (0, b"Rar!\x1a\x07", _ARCHIVE, "RAR"),
    (257, b"ustar", _ARCHIVE, "tar"),
    (0, b"\x93NUMPY", _NO_NETWORK, "NumPy"),
    (0, b"%PDF-", _NO_NETWORK, "PDF"),
    (4, b"TFL3", "{path} is a {format} model; convert it to ONNX, and import the .onnx file",
     "TensorFlow Lite"),
)  # fmt: skip
"""Offset, bytes there, message, name of the format."""

_LFS_POINTER = "version https://git-lfs.github.com/spec/"
_HTML = ("<!doctype html", "<html")


def check_kind(path: Path) -> None:
    """Report a file that is certainly not a network.

    Raises:
        CheckpointError: it is one; the message names its kind, and says what to do.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if is_safetensors(head):
        return
    if not head:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    _check_text(path, head)
    for offset, signature, message, name in _SIGNATURES:
        if head.startswith(signature, offset):
            raise CheckpointError(message.format(path=path, format=name))
    image_format = "TIFF" if is_tiff(head) else name_image_format(head)
    if image_format:
        raise CheckpointError(
            f"{path} is an image ({image_format}); import weights or an ONNX graph"
        )


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as one of safetensors: the length of a JSON object, and its brace.

    The length has 8 bytes, of which the last four are zero: safetensors allows 100 MB.
    """
    return head[4:9] == b"\0\0\0\0{"


def _check_text(path: Path, head: bytes) -> None:
    """Report a text file: a web page, a pointer of Git LFS, or another one.

    Raises:
        CheckpointError: it is one.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # may end in a character
    except UnicodeDecodeError:
        return
    if not all(each.isprintable() or each.isspace() for each in text):
        return
    text = text.strip()
    if text.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a pointer of Git LFS, not the file itself; run: git lfs pull"
        )
    if text.lower().startswith(_HTML):
        raise CheckpointError(
            f"{path} is a web page, not the file itself; download the file that the page links to"
        )
    raise CheckpointError(f"{path} is a text file, not a network; it begins with {text[:_SHOWN]!r}")
