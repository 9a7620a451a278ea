"""Images of training data are read as the service reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from app.imaging import decode
from model.errors import DataError
from model.training.images import read_image


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\nbroken", None])
def test_unreadable_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken.png cannot be read"):
        read_image(path)


def test_channels_that_cannot_be_chosen_are_named_without_a_parameter(tmp_path: Path) -> None:
    path = tmp_path / "channels.tif"
    tifffile.imwrite(path, np.zeros((2, 8, 8), np.uint8), imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(DataError, match=r"channels.tif cannot be read: the image has 2 channels$"):
        read_image(path)


@pytest.mark.parametrize("kind", ["float", "32-bit", "rotated", "transparent", "white is 0"])
def test_images_are_read_as_the_service_reads_them(tmp_path: Path, kind: str) -> None:
    ramp = np.linspace(0, 1, 12 * 8, dtype=np.float32).reshape(12, 8)
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {}
    if kind == "float":
        image = Image.fromarray(ramp)
    elif kind == "32-bit":
        image = Image.fromarray((ramp * 1e6).astype(np.int32))
    elif kind == "white is 0":
        image, options = Image.fromarray((ramp * 60000).astype(np.uint16)), {"tiffinfo": {262: 0}}
    else:
        path = tmp_path / "a.png"
        colors = np.dstack([np.uint8(ramp * 255)] * 3 + [np.uint8(255 - ramp * 255)])
        image = Image.fromarray(colors)
        if kind == "rotated":
            image = image.convert("RGB")
            options["exif"] = image.getexif()
            options["exif"][0x0112] = 6
    image.save(path, **options)
    data = path.read_bytes()
    served = decode.decode(data, decode.inspect(data, max_pixels=1000))
    read = read_image(path)
    assert read.shape[:2] == ((8, 12) if kind == "rotated" else (12, 8))
    assert np.array_equal(read, served)
    assert read.max() > read.min()
