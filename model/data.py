"""Pairs of images and masks on disk, and their split into training and validation.

Files in, NumPy arrays out. Knows nothing of augmentation, of tensors or of the network.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")


class DataError(ValueError):
    """A data set is not what it should be; the message names the file and what is expected."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One image and its mask, and the group (field of view, car, patient) it must not leave."""

    id: str
    image: Path
    mask: Path
    group: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """A decoded pair.

    Attributes:
        image: (H, W) or (H, W, 3), uint8 or uint16.
        labels: (H, W) int32. Instance labels (0 background, 1..n one object each), class indices,
            or 0/1 of a binary mask.
    """

    id: str
    image: npt.NDArray[np.generic]
    labels: npt.NDArray[np.int32]


def _index(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    return {path.stem: path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}


def find_pairs(
    images: Path, masks: Path, groups: Mapping[str, str] | None = None
) -> list[Pair]:
    """Pairs of the two folders by file name, sorted by id; without a group, each is its own.

    Raises:
        DataError: an empty folder, or an image without its mask.
    """
    found, targets = _index(images), _index(masks)
    if not found:
        raise DataError(f"{images} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    if missing := sorted(found.keys() - targets.keys()):
        raise DataError(f"{found[missing[0]]} has no mask in {masks} ({len(missing)} are missing)")
    return [
        Pair(id, found[id], targets[id], groups[id] if groups else id) for id in sorted(found)
    ]


def read_groups(index: Path, column: str) -> dict[str, str]:
    """The column of a CSV file that says which images belong together, by the column `id`."""
    with index.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or column not in rows[0] or "id" not in rows[0]:
        raise DataError(f"{index} needs the columns id and {column}")
    return {row["id"]: row[column] for row in rows}


def split_by_group(pairs: Sequence[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs; a group lies on one side only, or neighbours would leak.

    Groups are ordered by a hash of their name, so that the split depends on nothing else: not on
    a seed, and not on which other files are there.
    """
    groups = sorted({pair.group for pair in pairs}, key=lambda g: hashlib.sha256(g.encode()).digest())
    held = set(groups[: round(len(groups) * fraction)])
    return (
        [pair for pair in pairs if pair.group not in held],
        [pair for pair in pairs if pair.group in held],
    )


def read_array(path: Path) -> npt.NDArray[Any]:
    """Decode one file, with a message that names it when that fails."""
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P", "1", "I;16", "I;16B", "I", "RGB"):
                return np.asarray(file.convert("RGB"))
            return np.asarray(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_sample(pair: Pair) -> Sample:
    """Decode a pair.

    Raises:
        DataError: unreadable, of different sizes, or a mask of several channels.
    """
    image, labels = read_array(pair.image), read_array(pair.mask)
    if labels.ndim != 2:
        raise DataError(f"{pair.mask} has {labels.shape[2]} channels; an index mask has one")
    if image.shape[:2] != labels.shape:
        raise DataError(
            f"{pair.mask} is {labels.shape[1]}x{labels.shape[0]}, its image "
            f"{image.shape[1]}x{image.shape[0]}"
        )
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    if image.dtype not in (np.uint8, np.uint16):
        image = np.clip(image, 0, 65535).astype(np.uint16)
    return Sample(pair.id, image, labels.astype(np.int32))


def read_samples(pairs: Iterable[Pair]) -> list[Sample]:
    return [read_sample(pair) for pair in pairs]
