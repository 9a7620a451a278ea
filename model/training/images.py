"""Image files of training data: which files of a folder are images, and their pixels.

Files in, NumPy arrays out. Knows no masks.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from model.arrays import AnyArray
from model.errors import DataError
from model.files import MAX_IMAGE_BYTES, check_regular, read_file
from model.pixels import IMAGE_SUFFIXES, decode_image, is_tiff, spread

Image.MAX_IMAGE_PIXELS = None  # training images are the user's own, so their size is not limited
_TIFF_SUFFIXES, _SIGNATURE_BYTES = (".tif", ".tiff"), 4
FILE_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")
"""Suffixes of files that are taken for images or masks in training."""


def list_images(folder: Path, deep: bool = False) -> list[Path]:
    """List a folder's image files in order, without hidden ones, such as those of macOS.

    Args:
        deep: list those of its folders too, except those of training runs.

    Raises:
        DataError: the folder is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    found = [
        path
        for path in (folder.rglob("*") if deep else folder.iterdir())
        if path.suffix.lower() in FILE_SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
    ]
    runs = {parent for parent in {path.parent for path in found} if _is_run(parent)}
    return sorted(path for path in found if not runs & {path.parent, path.parent.parent})


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, which has pictures."""
    return (folder / "starts.jsonl").exists() and (folder / "config.json").exists()


def count_pages(path: Path) -> int:
    """Count the pages of an image file; one for other formats than TIFF.

    Raises:
        DataError: the file cannot be read.
    """
    if path.suffix.lower() not in _TIFF_SUFFIXES:
        return 1
    try:
        check_regular(path)
        with path.open("rb") as file:
            if not is_tiff(file.read(_SIGNATURE_BYTES)):
                return 1
        from model.tiff import pages

        return pages.count_pages(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_image(path: Path, page: int | None = None) -> AnyArray:
    """Decode an image, upright, as the service does.

    Args:
        page: of a stack, from 0; None for the only one.

    Returns:
        (H, W) or (H, W, 3), uint8 or uint16.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    try:
        data = read_file(path, MAX_IMAGE_BYTES)
        if path.suffix.lower() == ".npy":
            return _read_npy(data)
        return decode_image(data, page)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_npy(data: bytes) -> AnyArray:
    """Read an array as an image; integers beyond 16 bits and floats are spread over their range.

    Raises:
        ValueError: it is not (H, W), (H, W, 1) or (H, W, 3), or not numbers.
    """
    values: AnyArray = np.load(io.BytesIO(data), allow_pickle=False)
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf" or values.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"an image has numbers (H, W) or (H, W, 3), not {values.shape}")
    if values.shape[2:] == (1,):
        values = values[:, :, 0]
    return values if values.dtype in (np.uint8, np.uint16) else spread(values)
