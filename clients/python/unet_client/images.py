"""Converts images to the bytes that are sent, and pictures to arrays.

numpy and Pillow are imported only when an array is converted.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

if TYPE_CHECKING:
    import numpy.typing as npt

ImageInput: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | npt.NDArray[Any]"
)
"""An image as a path, as the bytes of its file, as a binary file object, or as an array."""

_EXPECTED = (
    "an image must be a path, bytes, a binary file object, or an array: "
    "(H, W) of uint8 or uint16, or (H, W, 3) of uint8"
)
_ARRAY_TYPES = {("uint8", 2), ("uint16", 2), ("uint8", 3)}
_NO_ARRAYS = "arrays require numpy and Pillow: pip install numpy pillow"


def encode_image(image: ImageInput) -> bytes:
    """Return the bytes to send: those of the file, or a lossless PNG of an array.

    Args:
        image: an array has the shape (H, W) and the type uint8 or uint16, or the shape (H, W, 3)
            and the type uint8.

    Raises:
        TypeError: the object is not an `ImageInput`, or the array has another shape or type.
        OSError: the file cannot be read.
        ImportError: the image is an array, and Pillow is not installed.
    """
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    numpy = sys.modules.get("numpy")  # no array exists before numpy is imported
    if numpy is not None and isinstance(image, numpy.ndarray):
        return _encode_png(image)
    data = image.read() if hasattr(image, "read") else image
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"{_EXPECTED}; got {type(image).__name__}")
    return bytes(data)


def _encode_png(pixels: npt.NDArray[Any]) -> bytes:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ImportError(_NO_ARRAYS) from error

    is_image = (pixels.dtype.name, pixels.ndim) in _ARRAY_TYPES and pixels.size > 0
    if not is_image or pixels.shape[2:] not in ((), (3,)):
        raise TypeError(f"{_EXPECTED}; got {pixels.shape} of {pixels.dtype}")
    native = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    buffer = io.BytesIO()
    Image.fromarray(native).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def name_image(image: ImageInput) -> str:
    """Return the file name of an image; "" for bytes and arrays."""
    if isinstance(image, str | os.PathLike):
        return Path(image).name
    name = getattr(image, "name", "")  # of an open file; 0 and such for descriptors
    return Path(name).name if isinstance(name, str) else ""


def decode_image(content: bytes) -> npt.NDArray[Any]:
    """Decode a PNG, WebP or TIFF as the service writes them.

    Returns:
        (H, W) or (H, W, C): uint8 and uint16 as in the file, float32, and int32 for labels of 32
        bits. The pages of a TIFF with several are stacked along the first axis. The values of a
        palette image are the indices.

    Raises:
        ImportError: numpy or Pillow is not installed.
    """
    try:
        import numpy as np
        from PIL import ImageSequence, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
    except ModuleNotFoundError as error:
        raise ImportError(_NO_ARRAYS) from error

    # Image.open would reject images as large as the service accepts.
    file = io.BytesIO(content)
    if content.startswith(b"RIFF"):
        return np.asarray(WebPImagePlugin.WebPImageFile(file))
    if not content.startswith((b"II", b"MM")):
        return np.asarray(PngImagePlugin.PngImageFile(file))
    pages = [np.array(page) for page in ImageSequence.Iterator(TiffImagePlugin.TiffImageFile(file))]
    return pages[0] if len(pages) == 1 else np.stack(pages)
