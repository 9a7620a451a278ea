"""Milliseconds to read the header of an image of 12 megapixels, and to decode it, per format.

    python -m benchmarks.decoding

To compare two versions, run it in a checkout of each.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.imaging import decode

PHOTO = Path(__file__).parent.parent / "tests/fixtures/astronaut.jpg"
SIZE = (4000, 3000)
MAX_PIXELS = 100_000_000
REPEATS = 5


def main() -> None:
    """Print a line per format."""
    for name, data in make_files().items():
        header = decode.inspect(data, max_pixels=MAX_PIXELS)
        inspected = measure(lambda data=data: decode.inspect(data, max_pixels=MAX_PIXELS))
        decoded = measure(lambda data=data, header=header: decode.decode(data, header))
        print(f"{name:18} header {inspected:6.1f} ms   decode {decoded:7.1f} ms")


def make_files() -> dict[str, bytes]:
    """The photograph, enlarged, in each format and kind."""
    photo = Image.open(PHOTO).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
    grey = photo.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    transparent = photo.copy()
    transparent.putalpha(grey)
    return {
        "JPEG": save(photo, "JPEG", quality=90),
        "JPEG grey": save(grey, "JPEG", quality=90),
        "JPEG progressive": save(photo, "JPEG", quality=90, progressive=True),
        "PNG": save(photo, "PNG"),
        "PNG grey": save(grey, "PNG"),
        "PNG grey, 16 bits": save(deep, "PNG"),
        "PNG RGBA": save(transparent, "PNG"),
        "PNG palette": save(photo.quantize(200), "PNG"),
        "BMP": save(photo, "BMP"),
        "GIF": save(photo, "GIF"),
        "WebP": save(photo, "WEBP"),
    }


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    """A file of this format."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def measure(function: Callable[[], object]) -> float:
    """The least of several times, in milliseconds."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


if __name__ == "__main__":
    main()
