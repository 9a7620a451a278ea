"""Pairs of images and masks on disk, and their split into training and validation.

Files in, NumPy arrays out. Knows no augmentation, no tensors, no network.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
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
from model.files import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, check_regular, read_file
from model.pixels import IMAGE_SUFFIXES, decode_image, is_tiff
from model.training.recipe import DataConfig

Image.MAX_IMAGE_PIXELS = None  # training images are the user's own, so their size is not limited

_TIFF_SUFFIXES, _SIGNATURE_BYTES = (".tif", ".tiff"), 4
_MASK_MODES = ("L", "P", "1", "I;16", "I;16B", "I")
"""Pillow's modes with one channel of integers."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Attributes:
        id: the image's file name without its suffix, and `-pageN` for a page of a stack.
        image, mask: the files.
        group: what the image shows: a field of view, a car, a patient. All images of a group are
            either training or validation images. The pages of a stack are a group.
        page: of both files, from 0, if they are stacks.
    """

    id: str
    image: Path
    mask: Path
    group: str
    page: int | None = None


class PairedDataset(Sequence[Sample]):
    """Pairs of images and masks, decoded on access.

    Args:
        pairs: in the order of the data set.
        kind: of the labels: "binary", "classes" or "instances", as in `DataConfig.labels`.
        classes: number of classes, including the background; used if `kind` is "classes".
    """

    def __init__(self, pairs: Sequence[Pair], kind: str = "binary", classes: int = 2) -> None:
        self.pairs = list(pairs)
        self.kind = kind
        self.classes = classes

    @property
    def ids(self) -> list[str]:
        """The id of each pair, in order."""
        return [pair.id for pair in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """Decode the sample at `index`, or the samples of a slice.

        Raises:
            DataError: a file cannot be read, the sizes differ, or the mask is invalid; see
                `read_sample`.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return read_sample(self.pairs[index], self.kind, self.classes)

    def split(self, groups: set[str]) -> tuple[PairedDataset, PairedDataset]:
        """Split into the pairs outside `groups` and the pairs inside."""
        outside = [pair for pair in self.pairs if pair.group not in groups]
        inside = [pair for pair in self.pairs if pair.group in groups]
        return (
            PairedDataset(outside, self.kind, self.classes),
            PairedDataset(inside, self.kind, self.classes),
        )


class CarvanaDataset(PairedDataset):
    """The Carvana data set: `<car>_<view>.jpg` and `<car>_<view>_mask.gif`.

    The sixteen views of a car form a group.

    Args:
        images: the folder `train`.
        masks: the folder `train_masks`.

    Raises:
        DataError: a folder is empty or missing, or an image has no mask.
    """

    def __init__(self, images: str | Path, masks: str | Path) -> None:
        pairs = find_pairs(Path(images), Path(masks), mask_suffix="_mask")
        grouped = [dataclasses.replace(p, group=p.id.rpartition("_")[0] or p.id) for p in pairs]
        super().__init__(grouped)


def open_dataset(config: DataConfig, preprocess: PreprocessConfig) -> PairedDataset:
    """Find the pairs of a recipe's data set, not yet split.

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
    """Split a data set into a training and a validation part.

    The recipe lists the validation images, or gives the fraction of groups to use.

    Raises:
        DataError: the list cannot be read, is not UTF-8 text, or names an unknown image; or one
            part is empty.
    """
    if config.validation_list:
        listed = _read_validation_list(Path(config.validation_list))
        stacks = {pair.image.stem for pair in dataset.pairs}
        unknown = sorted(listed - set(dataset.ids) - stacks)
        if unknown:
            raise DataError(
                f"{config.validation_list} names {unknown[0]!r}, which is not in the data set"
            )
        groups = {pair.group for pair in dataset.pairs if listed & {pair.id, pair.image.stem}}
    else:
        every = {pair.group for pair in dataset.pairs}
        groups = choose_validation_groups(every, config.validation_share)
    training, validation = dataset.split(groups)
    if not len(training) or not len(validation):
        raise DataError(
            f"{len(dataset)} images in {len({p.group for p in dataset.pairs})} groups leave "
            f"{len(training)} for training and {len(validation)} for validation; both need at "
            "least one"
        )
    return training, validation


def choose_validation_groups(groups: set[str], share: float) -> set[str]:
    """Choose a fraction of the groups for validation, at least one.

    Groups are ordered by the hash of their name. The split therefore depends on no seed, and
    changes little when files are added or removed.
    """
    ordered = sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest())
    return set(ordered[: max(1, round(len(ordered) * share))])


def find_pairs(
    images: Path, masks: Path, groups: Mapping[str, str] | None = None, mask_suffix: str = ""
) -> list[Pair]:
    """Match images and masks of two folders by file name, sorted by id; stacks page by page.

    Args:
        groups: id -> group. None: each image is its own group.
        mask_suffix: of a mask's name, before the file type: `car_01.jpg` and `car_01_mask.gif`.

    Raises:
        DataError: a folder is missing, the image folder is empty, two images have the same name, an
            image has no mask or no group, or a stack has another number of pages than its mask.
    """
    image_files, mask_files = _index_images(images), _index_images(masks)
    if not image_files:
        raise DataError(f"{images} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    missing = sorted(id for id in image_files if id + mask_suffix not in mask_files)
    if missing:
        raise DataError(
            f"{image_files[missing[0]]} has no mask {missing[0]}{mask_suffix}.* in {masks} "
            f"({len(missing)} of {len(image_files)} have none)"
        )
    if groups is not None:
        ungrouped = sorted(image_files.keys() - groups.keys())
        if ungrouped:
            raise DataError(f"{image_files[ungrouped[0]]} has no row in the table of groups")
    return [
        page
        for id in sorted(image_files)
        for page in _split_stack(
            Pair(id, image_files[id], mask_files[id + mask_suffix], groups[id] if groups else id)
        )
    ]


def _split_stack(pair: Pair) -> list[Pair]:
    """Split the pair of two stacks into pairs of their pages.

    Raises:
        DataError: a file cannot be read, or they have different numbers of pages.
    """
    pages, masks = _count_pages(pair.image), _count_pages(pair.mask)
    if pages != masks:
        raise DataError(
            f"{pair.image} has {pages} {'page' if pages == 1 else 'pages'}, but its mask "
            f"{pair.mask.name} has {masks}"
        )
    if pages == 1:
        return [pair]
    return [
        dataclasses.replace(pair, id=f"{pair.id}-page{page}", page=page) for page in range(pages)
    ]


def _count_pages(path: Path) -> int:
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
        from model.tiff.pages import count_pages

        return count_pages(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_groups(table: Path, column: str) -> dict[str, str]:
    """Read the group of each image from a CSV file.

    Args:
        table: has a header with the column `id`.
        column: of the groups.

    Returns:
        id -> group.

    Raises:
        DataError: the file cannot be read, is not CSV in UTF-8, or lacks a column or a value.
    """
    text = _read_text(table)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise DataError(f"{table} is not a CSV file: {error}") from error
    if not rows or column not in rows[0] or "id" not in rows[0]:
        raise DataError(f"{table} needs the columns 'id' and {column!r}")
    for number, row in enumerate(rows, start=2):
        if not (row["id"] and row[column]):
            raise DataError(f"{table}, row {number}: no value for 'id' or {column!r}")
    return {row["id"]: row[column] for row in rows}


def read_scores(report: Path) -> dict[str, float]:
    """Read the Dice of each image from the JSON that `unet evaluate --json` writes.

    Returns:
        id -> Dice, 0..1.

    Raises:
        DataError: the file cannot be read or is not such a report.
    """
    text = _read_text(report)
    try:
        images = json.loads(text)["images"]
        scores = {image["id"]: float(image["dice"]) for image in images}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{report} was not written by `unet evaluate --json`: {error}") from error
    for id, score in scores.items():
        if not 0 <= score <= 1:
            raise DataError(f"{report}: the Dice of {id} must be 0..1, not {score}")
    return scores


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
        return decode_image(read_file(path, MAX_IMAGE_BYTES), page)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_sample(pair: Pair, kind: str = "binary", classes: int = 2) -> Sample:
    """Decode a pair.

    Args:
        kind, classes: as for `PairedDataset`.

    Raises:
        DataError: a file cannot be read, the sizes differ, the mask has several channels or lossy
            compression, or a label is not one of the classes.
    """
    image = read_image(pair.image, pair.page)
    labels = _read_mask(pair.mask, pair.page, binary=kind == "binary")
    if image.shape[:2] != labels.shape:
        raise DataError(
            f"{pair.mask} is {labels.shape[1]}x{labels.shape[0]}, but its image {pair.image.name} "
            f"is {image.shape[1]}x{image.shape[0]}"
        )
    if kind == "classes" and labels.max() >= classes:
        raise DataError(
            f"{pair.mask} contains the label {labels.max()}; the {classes} classes are 0 to "
            f"{classes - 1}"
        )
    return Sample(pair.id, image, labels)


def _read_mask(path: Path, page: int | None, binary: bool) -> Int32Array:
    """Read labels, (H, W): the stored values, or 0 and 1 if `binary`.

    Args:
        page: of a stack, from 0; None for the only one.

    Raises:
        DataError: the file cannot be read, has several channels or fractions, or is a JPEG with
            more than two values.
    """
    try:
        data = read_file(path, MAX_IMAGE_BYTES)
        if is_tiff(data):
            return _read_tiff_mask(data, page, binary)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    with _open_image(path, data) as file:
        if file.mode not in _MASK_MODES:
            bands = len(file.getbands())
            if bands == 1:
                raise DataError(f"{path} has mode {file.mode}; a mask contains integers")
            raise DataError(
                f"{path} has {bands} channels; a mask has one (grey, palette or 16-bit)"
            )
        values = np.asarray(file)
        if binary:
            return _binarize(file, values)
        if file.format == "JPEG":
            raise DataError(
                f"{path} is a JPEG, whose compression changes labels near edges; save masks of "
                "several values as PNG, TIFF or GIF"
            )
        return values.astype(np.int32)


def _read_tiff_mask(data: bytes, page: int | None, binary: bool) -> Int32Array:
    """Read labels as `_read_mask` does.

    Raises:
        ValueError: the TIFF cannot be read, or its values are not labels.
    """
    from model.tiff.reader import TiffReader

    labels = TiffReader(data).select(page).read_labels()
    values = labels.values
    if binary:
        shown = values
        if labels.palette is not None:
            # The order of a palette is arbitrary: white may have the index 0.
            colours = labels.palette.max(axis=1)[values.astype(np.intp)]
            shown = values if colours.all() else colours
        foreground: Int32Array = (shown != 0).astype(np.int32)
        return foreground
    limits = np.iinfo(np.int32)
    if values.min() < limits.min or values.max() > limits.max:
        raise ValueError(f"a label is not within {limits.min} to {limits.max}")
    return values.astype(np.int32)


def _binarize(file: Image.Image, values: AnyArray) -> Int32Array:
    """Convert the values of a mask file to 0 and 1."""
    if file.format == "JPEG":
        return (values > 127).astype(np.int32)  # compression leaves grey values near edges
    if file.mode == "P" and _has_black(file, values):
        # The order of a palette is arbitrary: white may have the index 0.
        values = np.asarray(file.convert("RGB")).max(axis=2)
    return (values > 0).astype(np.int32)


def _has_black(file: Image.Image, indices: AnyArray) -> bool:
    """Whether some pixel of a palette image is black."""
    palette = np.array(file.getpalette() or (), np.uint8).reshape(-1, 3)
    return any(index < len(palette) and not palette[index].any() for index in np.unique(indices))


@contextmanager
def _open_image(path: Path, data: bytes) -> Iterator[Image.Image]:
    """Open an image; errors of Pillow in the block become a `DataError` that names the file."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            yield file
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _index_images(folder: Path) -> dict[str, Path]:
    """List a folder's images by file name without suffix.

    Raises:
        DataError: the folder is missing, or two images differ only by their suffix.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        other = files.setdefault(path.stem, path)
        if other != path:
            raise DataError(f"{other} and {path.name} have the same name; remove one")
    return files


def _read_validation_list(path: Path) -> set[str]:
    """Read one id per line, with or without the suffix of the image's file."""
    lines = [line.strip() for line in _read_text(path).splitlines()]
    return {
        Path(line).stem if Path(line).suffix.lower() in IMAGE_SUFFIXES else line
        for line in lines
        if line
    }


def _read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark.

    Raises:
        DataError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        return read_file(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
