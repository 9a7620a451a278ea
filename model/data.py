"""Pairs of images and masks on disk, and their split into training and validation.

Files in, NumPy arrays out. Knows nothing of augmentation, of tensors or of the network.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import PreprocessConfig
from model.recipe import DataConfig

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
        labels: (H, W) int32: 0 and 1, class indices, or instance labels (0, then one an object).
    """

    id: str
    image: npt.NDArray[Any]
    labels: npt.NDArray[np.int32]


class PairedDataset(Sequence[Sample]):
    """Pairs that are decoded when they are asked for.

    Args:
        pairs: in order.
        kind: of the labels, as `DataConfig.labels`.
        classes: how many there are, the background among them, for kind "classes".
    """

    def __init__(self, pairs: Sequence[Pair], kind: str = "binary", classes: int = 2) -> None:
        self.pairs = list(pairs)
        self.kind = kind
        self.classes = classes

    @property
    def ids(self) -> list[str]:
        return [pair.id for pair in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """The sample at `index`.

        Raises:
            DataError: a file is unreadable, the sizes differ, or the mask is no index mask.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return read_sample(self.pairs[index], self.kind, self.classes)

    def split(self, held: set[str]) -> tuple[PairedDataset, PairedDataset]:
        """The pairs whose group is not in `held`, and those whose group is."""
        return (
            PairedDataset([p for p in self.pairs if p.group not in held], self.kind, self.classes),
            PairedDataset([p for p in self.pairs if p.group in held], self.kind, self.classes),
        )


class CarvanaDataset(PairedDataset):
    """The Carvana data as it comes: `<car>_<view>.jpg` and `<car>_<view>_mask.gif`.

    The sixteen views of a car are one group.

    Args:
        images, masks: the folders `train` and `train_masks`.

    Raises:
        DataError: an empty folder, or an image without its mask.
    """

    def __init__(self, images: str | Path, masks: str | Path) -> None:
        pairs = find_pairs(Path(images), Path(masks), mask_suffix="_mask")
        grouped = [dataclasses.replace(p, group=p.id.rpartition("_")[0] or p.id) for p in pairs]
        super().__init__(grouped)


def open_dataset(config: DataConfig, preprocess: PreprocessConfig) -> PairedDataset:
    """The data set of a recipe, not yet split.

    Raises:
        DataError: see `find_pairs` and `read_groups`.
    """
    images, masks = Path(config.images), Path(config.masks)
    if config.kind == "carvana":
        return CarvanaDataset(images, masks)
    groups = read_groups(Path(config.groups), config.group_column) if config.groups else None
    return PairedDataset(find_pairs(images, masks, groups), config.labels, len(preprocess.classes))


def split_dataset(
    dataset: PairedDataset, config: DataConfig
) -> tuple[PairedDataset, PairedDataset]:
    """Training and validation part: by the list of the recipe, or a share of the groups.

    Raises:
        DataError: the list names what is not there, or one side would be empty.
    """
    if config.validation_list:
        listed = _read_list(Path(config.validation_list))
        if unknown := sorted(listed - set(dataset.ids)):
            raise DataError(f"{config.validation_list} names {unknown[0]!r}, which is no image")
        held = {pair.group for pair in dataset.pairs if pair.id in listed}
    else:
        held = held_groups({pair.group for pair in dataset.pairs}, config.validation_share)
    training, validation = dataset.split(held)
    if not len(training) or not len(validation):
        raise DataError(
            f"{len(dataset)} images in {len({p.group for p in dataset.pairs})} groups leave "
            f"{len(training)} for training and {len(validation)} for validation; both need some"
        )
    return training, validation


def held_groups(groups: set[str], share: float) -> set[str]:
    """The groups kept for validation: a share of them, at least one.

    They are ordered by a hash of their name, so that the split depends on nothing else: not on a
    seed, and hardly on which other files are there.
    """
    ordered = sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest())
    return set(ordered[: max(1, round(len(ordered) * share))])


def find_pairs(
    images: Path, masks: Path, groups: Mapping[str, str] | None = None, mask_suffix: str = ""
) -> list[Pair]:
    """Pairs of the two folders by file name, sorted by id; without a group, each is its own.

    Raises:
        DataError: an empty folder, an image without its mask, or without its group.
    """
    found, targets = _index(images), _index(masks)
    if not found:
        raise DataError(f"{images} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    missing = sorted(id for id in found if id + mask_suffix not in targets)
    if missing:
        raise DataError(
            f"{found[missing[0]]} has no mask {missing[0]}{mask_suffix}.* in {masks} "
            f"({len(missing)} of {len(found)} have none)"
        )
    if groups is not None and (ungrouped := sorted(found.keys() - groups.keys())):
        raise DataError(f"{found[ungrouped[0]]} has no row in the table of groups")
    return [
        Pair(id, found[id], targets[id + mask_suffix], groups[id] if groups else id)
        for id in sorted(found)
    ]


def read_groups(index: Path, column: str) -> dict[str, str]:
    """The column of a CSV file that says which images belong together, by the column `id`."""
    with index.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or column not in rows[0] or "id" not in rows[0]:
        raise DataError(f"{index} needs the columns 'id' and {column!r}")
    return {row["id"]: row[column] for row in rows}


def read_scores(report: Path) -> dict[str, float]:
    """The Dice of each image, by id, from the JSON of `unet evaluate`.

    Raises:
        DataError: it is no such file.
    """
    try:
        images = json.loads(report.read_text())["images"]
        return {image["id"]: float(image["dice"]) for image in images}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{report} is not what `unet evaluate --json` writes: {error}") from error


def read_image(path: Path) -> npt.NDArray[Any]:
    """Decode an image: (H, W) or (H, W, 3), uint8 or uint16.

    Raises:
        DataError: it cannot be read; the message names it.
    """
    pixels: npt.NDArray[Any] = _read(path, "L", "1", "I;16", "I;16B", "I", "RGB")
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype not in (np.uint8, np.uint16):
        pixels = np.clip(pixels, 0, 65535).astype(np.uint16)
    return pixels


def read_sample(pair: Pair, kind: str = "binary", classes: int = 2) -> Sample:
    """Decode a pair.

    Raises:
        DataError: unreadable, of different sizes, a mask of several channels, or a label beyond
            the classes.
    """
    image = read_image(pair.image)
    labels = _read(pair.mask, "L", "P", "1", "I;16", "I;16B", "I", "RGB")
    if labels.ndim != 2:
        raise DataError(
            f"{pair.mask} has {labels.shape[2]} channels; a mask has one (grey, palette or 16-bit)"
        )
    if image.shape[:2] != labels.shape:
        raise DataError(
            f"{pair.mask} is {labels.shape[1]}x{labels.shape[0]}, its image {pair.image.name} "
            f"{image.shape[1]}x{image.shape[0]}"
        )
    values = labels.astype(np.int32)
    if kind == "binary":
        values = (values > 0).astype(np.int32)
    elif kind == "classes" and values.max() >= classes:
        raise DataError(
            f"{pair.mask} holds the label {values.max()}; the {classes} classes are 0 to "
            f"{classes - 1}"
        )
    return Sample(pair.id, image, values)


def _read(path: Path, *modes: str) -> npt.NDArray[Any]:
    """Pixels as they are stored in one of Pillow's `modes`, as RGB otherwise."""
    try:
        with Image.open(path) as file:
            return np.asarray(file if file.mode in modes else file.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _index(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    return {path.stem: path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}


def _read_list(path: Path) -> set[str]:
    """One id a line, with or without the file's suffix."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return {
        Path(line).stem if Path(line).suffix.lower() in IMAGE_SUFFIXES else line
        for line in lines
        if line
    }
