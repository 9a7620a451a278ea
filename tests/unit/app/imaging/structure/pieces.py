"""Pieces of files, and contents for whole files, that the tests of several formats share."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from PIL import Image

from app.errors import ImageTooLarge
from app.imaging.structure import check_structure
from tests.conftest import encode, nuclei
from tests.unit.model.readers.writers import saved

GREY = nuclei(64, 48)[0]


def assert_too_large(data: bytes) -> None:
    """Check that a file is rejected, and soon."""
    start = time.perf_counter()
    with pytest.raises(ImageTooLarge, match="has more"):
        check_structure(data)
    assert time.perf_counter() - start < 1


def segment(marker: int, content: bytes = b"") -> bytes:
    """A segment of a JPEG or JPEG 2000."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def many_scans(scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    plain = encode(GREY, "JPEG", progressive=True)
    last = plain[plain.rindex(b"\xff\xda") : -2]
    return plain[:-2] + last * scans + plain[-2:]


def box(kind: bytes, content: bytes = b"") -> bytes:
    """A box of a JPEG 2000, AVIF or HEIC."""
    return struct.pack(">I4s", 8 + len(content), kind) + content


def endless_box(length: int) -> bytes:
    """The start of a box that ends beyond any file."""
    return struct.pack(">I4sQ", 1, b"free", length) + bytes(40)


ENDLESS = [2**32, 2**63 - 1, 2**63, 2**64 - 1]
"""Lengths of such boxes."""


def photo(size: int = 300) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))


def full_exif() -> bytes:
    """64 KB of EXIF."""
    exif = Image.Exif()
    exif[0x010E] = "x" * 65_000
    return exif.tobytes()


def animation(frames: int, format: str) -> bytes:
    images = [Image.new("L", (8, 8), index % 256) for index in range(frames)]
    return saved(images[0], format, save_all=True, append_images=images[1:], duration=20)
