"""Pairs of images and masks on disk, and their split into training and validation.

Files in, NumPy arrays out. Knows nothing of augmentation, of tensors or of the network.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.arrays import AnyArray, Int32Array
from model.config import PreprocessConfig
from model.errors import DataError
from model.evaluation.evaluate import Sample
from model.pixels import IMAGE_SUFFIXES, decode_image
from model.training.recipe import DataConfig

Image.MAX_IMAGE_PIXELS = None  # how large one's own images may be is one's own concern


@dataclasses.dataclass(frozen=True)
class Pair:
    """One image and its mask, and the group (field of view, car, patient) it must not leave."""

    id: str
    image: Path
    mask: Path
    group: str


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
        DataError, OSError: see `find_pairs` and `read_groups`.
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
        DataError: the list is no text in UTF-8, or names what is not there, or one side would be
            empty.
        OSError: the list cannot be read.
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
    """The column of a CSV file that says which images belong together, by the column `id`.

    Raises:
        DataError: it is no CSV file in UTF-8, or lacks a column or a value.
        OSError: it cannot be read.
    """
    try:
        with index.open(newline="", encoding="utf-8-sig") as file:  # as Excel writes it, or plain
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{index} is no CSV file in UTF-8: {error}") from error
    if not rows or column not in rows[0] or "id" not in rows[0]:
        raise DataError(f"{index} needs the columns 'id' and {column!r}")
    for number, row in enumerate(rows, start=2):
        if not (row["id"] and row[column]):
            raise DataError(f"{index}, row {number}: no value for 'id' or {column!r}")
    return {row["id"]: row[column] for row in rows}


def read_scores(report: Path) -> dict[str, float]:
    """The Dice of each image, by id, from the JSON of `unet evaluate`.

    Raises:
        DataError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        images = json.loads(report.read_text())["images"]
        scores = {image["id"]: float(image["dice"]) for image in images}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{report} is not what `unet evaluate --json` writes: {error}") from error
    for id, score in scores.items():
        if not 0 <= score <= 1:
            raise DataError(f"{report}: the Dice of {id} is {score}, and lies in 0..1")
    return scores


def read_image(path: Path) -> AnyArray:
    """Decode an image, upright, as the service does: (H, W) or (H, W, 3), uint8 or uint16.

    Raises:
        DataError: it cannot be read; the message names it.
    """
    try:
        return decode_image(path.read_bytes())
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_sample(pair: Pair, kind: str = "binary", classes: int = 2) -> Sample:
    """Decode a pair.

    Raises:
        DataError: unreadable, of different sizes, a mask of several channels, or a label beyond
            the classes.
    """
    image = read_image(pair.image)
    values = _read_mask(pair.mask, binary=kind == "binary")
    if image.shape[:2] != values.shape:
        raise DataError(
            f"{pair.mask} is {values.shape[1]}x{values.shape[0]}, its image {pair.image.name} "
            f"{image.shape[1]}x{image.shape[0]}"
        )
    if kind == "classes" and values.max() >= classes:
        raise DataError(
            f"{pair.mask} holds the label {values.max()}; the {classes} classes are 0 to "
            f"{classes - 1}"
        )
    return Sample(pair.id, image, values)


def _read_mask(path: Path, binary: bool) -> Int32Array:
    """(H, W) labels as they are stored; `binary`: 0 and 1.

    Raises:
        DataError: unreadable, of several channels, or not kept as it was drawn.
    """
    with _opened(path) as file:
        if file.mode not in ("L", "P", "1", "I;16", "I;16B", "I"):
            bands = len(file.getbands())
            if bands == 1:
                raise DataError(f"{path} is of mode {file.mode}; a mask has whole numbers")
            raise DataError(
                f"{path} has {bands} channels; a mask has one (grey, palette or 16-bit)"
            )
        labels = np.asarray(file)
        if not binary:
            if file.format == "JPEG":
                raise DataError(
                    f"{path} is a JPEG, which changes numbers around every edge; masks of several "
                    "values are PNGs, TIFFs or GIFs"
                )
            return labels.astype(np.int32)
        if file.format == "JPEG":
            return (labels > 127).astype(np.int32)  # what rang around black and white is neither
        if file.mode == "P" and _has_black(file, labels):
            # Where two colours got their indices by chance, white may be 0.
            labels = np.asarray(file.convert("RGB")).max(axis=2)
        return (labels > 0).astype(np.int32)


def _has_black(file: Image.Image, indices: AnyArray) -> bool:
    """Whether a pixel is black by its palette."""
    palette = np.array(file.getpalette() or (), np.uint8).reshape(-1, 3)
    return any(index < len(palette) and not palette[index].any() for index in np.unique(indices))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _index(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    index: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if (other := index.setdefault(path.stem, path)) != path:
            raise DataError(f"{other} and {path.name} have the same name; which one is it?")
    return index


def _read_list(path: Path) -> set[str]:
    """One id a line, with or without the file's suffix."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error
    return {
        Path(line).stem if Path(line).suffix.lower() in IMAGE_SUFFIXES else line
        for line in lines
        if line
    }
