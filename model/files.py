"""Whole files, with a bound. Knows no formats."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import BinaryIO

MAX_TEXT_BYTES = 16_000_000
"""Size of a recipe, a manifest, a table or a report."""
MAX_IMAGE_BYTES = 2_000_000_000
"""Size of an image file. An image of 100 megapixels with three channels of 32 bits has 1.2e9."""
MAX_CHECKPOINT_BYTES = 8_000_000_000
"""Size of a checkpoint, or of a state dict to import."""

_CHUNK = 1 << 20


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `max_bytes` bytes.
    """
    check_regular(path)
    if path.stat().st_size > max_bytes:
        raise _too_large(max_bytes)
    return path.read_bytes()


def read_stream(stream: BinaryIO, max_bytes: int) -> bytes:
    """Read a stream to its end.

    Raises:
        OSError: it has more than `max_bytes` bytes.
    """
    content = bytearray()
    while chunk := stream.read(_CHUNK):
        content += chunk
        if len(content) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(content)


def check_regular(path: Path) -> None:
    """Check that a path leads to a regular file: opening a FIFO waits for its writer, and a device
    may never end.

    Raises:
        OSError: it does not exist, or it is a FIFO, a device, a socket or a folder.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def _too_large(max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes")
