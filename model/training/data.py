"""Pairs of images and masks on disk, and their split into training and validation.

Files in, NumPy arrays out. Knows no augmentation, no tensors, no network.
"""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.arrays import AnyArray
from model.config import PreprocessConfig
from model.errors import DataError
from model.evaluation.evaluate import Sample
from model.files import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, check_regular, read_file
from model.pixels import IMAGE_SUFFIXES, decode_image, is_tiff, spread
from model.training.masks import MaskCoding, read_mask
from model.training.naming import describe_naming, match_names
from model.training.recipe import DataConfig, ImagesConfig

Image.MAX_IMAGE_PIXELS = None  # training images are the user's own, so their size is not limited

_TIFF_SUFFIXES, _SIGNATURE_BYTES = (".tif", ".tiff"), 4
FILE_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")
"""Suffixes of files that are taken for images or masks in training."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Attributes:
        id: the image's file name without its suffix, and `-pageN` for a page of a stack.
        image, mask: the files.
        group: what the image shows: a field of view, a car, a patient. All images of a group are
            either training or validation images. The pages of a stack are a group.
        page: of both files, from 0, if they are stacks.
        source: name of its source, if the data set has several. The id then begins with it.
        coding: of the mask, if it is not that of the data set.
    """

    id: str
    image: Path
    mask: Path
    group: str
    page: int | None = None
    source: str = ""
    coding: MaskCoding | None = None


class PairedDataset(Sequence[Sample]):
    """Pairs of images and masks, decoded on access.

    Args:
        pairs: in the order of the data set.
        coding: of the values in the masks.
    """

    def __init__(self, pairs: Sequence[Pair], coding: MaskCoding | None = None) -> None:
        self.pairs = list(pairs)
        self.coding = coding or MaskCoding()

    @property
    def kind(self) -> str:
        """The kind of the labels, as in `DataConfig.labels`; "instances" if a source has them."""
        return self.coding.kind

    @property
    def sources(self) -> list[str]:
        """The names of the sources, in order; [""] if there is only one."""
        return list(dict.fromkeys(pair.source for pair in self.pairs))

    def has_objects(self, index: int) -> bool:
        """Whether the labels of a pair have one value per object."""
        return (self.pairs[index].coding or self.coding).kind == "instances"

    def select_source(self, name: str) -> PairedDataset:
        """Return the pairs of a source."""
        pairs = [pair for pair in self.pairs if pair.source == name]
        return PairedDataset(pairs, pairs[0].coding or self.coding)

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
        return read_sample(self.pairs[index], self.coding)

    def spread(self, most: int) -> PairedDataset:
        """Select at most `most` pairs, evenly spread; 0: all."""
        if not most or len(self) <= most:
            return self
        indices = np.linspace(0, len(self) - 1, most).astype(int)
        return PairedDataset([self.pairs[index] for index in indices], self.coding)

    def spread_sources(self, most: int) -> PairedDataset:
        """Select about `most` pairs, as many from each source and evenly spread."""
        each = math.ceil(most / len(self.sources))
        parts = [self.select_source(name).spread(each) for name in self.sources]
        return PairedDataset([pair for part in parts for pair in part.pairs], self.coding)

    def split(self, groups: set[str]) -> tuple[PairedDataset, PairedDataset]:
        """Split into the pairs outside `groups` and the pairs inside."""
        outside = [pair for pair in self.pairs if pair.group not in groups]
        inside = [pair for pair in self.pairs if pair.group in groups]
        return PairedDataset(outside, self.coding), PairedDataset(inside, self.coding)


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
        grouped = [dataclasses.replace(p, group=prefix_of(p.id)) for p in pairs]
        super().__init__(grouped)


def open_dataset(config: DataConfig, preprocess: PreprocessConfig) -> PairedDataset:
    """Find the pairs of a recipe's data set, source after source, not yet split.

    Raises:
        DataError: see `find_pairs` and `read_groups`.
    """
    if not config.sources:
        return _open_source(config, preprocess)
    datasets = {source.name: _open_source(source, preprocess) for source in config.sources}
    pairs = [
        dataclasses.replace(pair, id=f"{name}/{pair.id}", source=name, coding=dataset.coding)
        for name, dataset in datasets.items()
        for pair in dataset.pairs
    ]
    codings = [dataset.coding for dataset in datasets.values()]
    return PairedDataset(pairs, max(codings, key=lambda coding: coding.kind == "instances"))


def _open_source(config: ImagesConfig, preprocess: PreprocessConfig) -> PairedDataset:
    """Find the pairs of one source."""
    dataset = _find_source(config, preprocess)
    if config.pattern == "*":
        return dataset
    pairs = [pair for pair in dataset.pairs if fnmatch.fnmatchcase(pair.id, config.pattern)]
    if not pairs:
        raise DataError(f"no image in {config.images} matches {config.pattern!r}")
    return PairedDataset(pairs, dataset.coding)


def _find_source(config: ImagesConfig, preprocess: PreprocessConfig) -> PairedDataset:
    images, masks = Path(config.images), Path(config.masks)
    if config.kind == "carvana":
        return CarvanaDataset(images, masks)
    groups = read_groups(Path(config.groups), config.group_column) if config.groups else None
    find = find_named_pairs if config.kind == "named" else find_pairs
    pairs = find(images, masks, groups)
    if config.group_by == "prefix":
        pairs = [dataclasses.replace(pair, group=prefix_of(pair.group)) for pair in pairs]
    return PairedDataset(pairs, code_masks(config, preprocess))


def code_masks(config: ImagesConfig, preprocess: PreprocessConfig) -> MaskCoding:
    """Return what a recipe says about the values of its masks."""
    return MaskCoding(config.labels, len(preprocess.classes), config.ignore, config.colours)


def prefix_of(name: str) -> str:
    """Return a name up to its last underscore."""
    return name.rpartition("_")[0] or name


def split_dataset(
    dataset: PairedDataset, config: DataConfig
) -> tuple[PairedDataset, PairedDataset]:
    """Split a data set into a training and a validation part.

    The recipe lists the validation images, or gives the fraction of groups to use. The pages of a
    stack stay together unless it is the only group: then its last pages are for validation. Each
    of several sources is split by itself.

    Raises:
        DataError: the list cannot be read, is not UTF-8 text, or names an unknown image; or one
            part is empty.
    """
    if not config.sources:
        return _split_source(dataset, config)
    parts = [_split_source(dataset.select_source(each.name), each) for each in config.sources]
    training, validation = (
        PairedDataset([pair for part in side for pair in part.pairs], dataset.coding)
        for side in zip(*parts, strict=True)
    )
    return training, validation


def _split_source(
    dataset: PairedDataset, config: ImagesConfig
) -> tuple[PairedDataset, PairedDataset]:
    """Split the pairs of one source; see `split_dataset`."""
    if config.validation_list:
        listed = _read_validation_list(Path(config.validation_list))
        names = {pair: _names_of(pair) for pair in dataset.pairs}
        unknown = sorted(listed.difference(*names.values()))
        if unknown:
            raise DataError(
                f"{config.validation_list} names {unknown[0]!r}, which is not in the data set"
            )
        groups = {pair.group for pair in dataset.pairs if listed & names[pair]}
    else:
        every = {pair.group for pair in dataset.pairs}
        if len(every) == 1 and len(dataset) > 1 and dataset.pairs[0].page is not None:
            return _split_pages(dataset, config.validation_share)
        groups = choose_validation_groups(every, config.validation_share)
    training, validation = dataset.split(groups)
    if not len(training) or not len(validation):
        raise DataError(
            f"{len(dataset)} images in {len({p.group for p in dataset.pairs})} groups leave "
            f"{len(training)} for training and {len(validation)} for validation; both need at "
            "least one"
        )
    return training, validation


def _names_of(pair: Pair) -> set[str]:
    """Return the names by which a list of validation images can mean a pair."""
    return {pair.id, pair.id.removeprefix(f"{pair.source}/"), pair.image.stem}


def _split_pages(dataset: PairedDataset, share: float) -> tuple[PairedDataset, PairedDataset]:
    """Split the pages of one stack; its last ones are for validation."""
    first = len(dataset) - max(1, round(len(dataset) * share))
    pairs = dataset.pairs
    return (
        PairedDataset(pairs[:first], dataset.coding),
        PairedDataset(pairs[first:], dataset.coding),
    )


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
        raise DataError(f"{images} contains no images ({', '.join(FILE_SUFFIXES)})")
    if images.resolve() == masks.resolve() and not mask_suffix:
        raise DataError(
            f"{images} is the folder of the images and of the masks; if it contains both, set "
            "kind to 'named'"
        )
    missing = sorted(id for id in image_files if id + mask_suffix not in mask_files)
    if missing:
        raise DataError(
            f"{image_files[missing[0]]} has no mask {missing[0]}{mask_suffix}.* in {masks} "
            f"({len(missing)} of {len(image_files)} have none)"
        )
    pairs = [Pair(id, image_files[id], mask_files[id + mask_suffix], id) for id in image_files]
    return _complete_pairs(pairs, groups)


def find_named_pairs(
    images: Path, masks: Path, groups: Mapping[str, str] | None = None
) -> list[Pair]:
    """Match images and masks by words in their names; see `model.training.naming`.

    Folders are searched with the folders in them. Both may be the same. Images without a mask are
    left out.

    Args:
        groups: as for `find_pairs`; an id is the path in the folder of the images.

    Raises:
        DataError: a folder is missing or has no images, fewer than half of the images have a mask,
            an image has no group, or a stack has another number of pages than its mask.
    """
    image_files = list_images(images, deep=True)
    mask_files = image_files
    if masks.resolve() != images.resolve():
        mask_files = list_images(masks, deep=True)
        image_files = [path for path in image_files if masks not in path.parents]
    if not image_files or not mask_files:
        empty = masks if image_files else images
        raise DataError(f"{empty} contains no images ({', '.join(FILE_SUFFIXES)})")
    matched = match_names(images, image_files, masks, mask_files)
    if images.resolve() == masks.resolve() and not matched.pairs:
        raise DataError(
            f"{images} is the folder of the images and of the masks, and no file in it has the "
            f"name of another's mask. {describe_naming()}"
        )
    if 2 * len(matched.pairs) < len(matched.images) or not matched.pairs:
        unmatched = sorted(set(matched.images) - matched.pairs.keys())
        example = f"; {unmatched[0]} has none" if unmatched else ""
        raise DataError(
            f"{len(matched.pairs)} of {len(matched.images)} images in {images} have a mask in "
            f"{masks}{example}. {describe_naming()}"
        )
    pairs = []
    for image, mask in matched.pairs.items():
        id = image.relative_to(images).with_suffix("").as_posix()
        pairs.append(Pair(id, image, mask, id))
    return _complete_pairs(pairs, groups)


def _complete_pairs(pairs: list[Pair], groups: Mapping[str, str] | None) -> list[Pair]:
    """Order pairs by id, give them their groups, and split stacks into pages.

    Raises:
        DataError: an image has no group, or a stack has another number of pages than its mask.
    """
    pairs = sorted(pairs, key=lambda pair: pair.id)
    if groups is not None:
        for pair in pairs:
            if pair.id not in groups:
                raise DataError(f"{pair.image} has no row in the table of groups")
        pairs = [dataclasses.replace(pair, group=groups[pair.id]) for pair in pairs]
    return [page for pair in pairs for page in _split_stack(pair)]


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


def read_sample(pair: Pair, coding: MaskCoding | None = None) -> Sample:
    """Decode a pair.

    Args:
        coding: as for `PairedDataset`; used if the pair has none.

    Raises:
        DataError: a file cannot be read, the sizes differ, or the mask is invalid; see `read_mask`.
    """
    image = read_image(pair.image, pair.page)
    coding = pair.coding or coding or MaskCoding()
    labels = read_mask(pair.mask, pair.page, coding)
    if image.shape[:2] != labels.shape:
        raise DataError(
            f"{pair.mask} is {labels.shape[1]}x{labels.shape[0]}, but its image {pair.image.name} "
            f"is {image.shape[1]}x{image.shape[0]}"
        )
    return Sample(pair.id, image, labels, pair.source, coding.kind == "instances")


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


def _index_images(folder: Path) -> dict[str, Path]:
    """List a folder's images by file name without suffix.

    Raises:
        DataError: the folder is missing, or two images differ only by their suffix.
    """
    files: dict[str, Path] = {}
    for path in list_images(folder):
        other = files.setdefault(path.stem, path)
        if other != path:
            raise DataError(f"{other} and {path.name} have the same name; remove one")
    return files


def _read_validation_list(path: Path) -> set[str]:
    """Read one id per line, with or without the suffix of the image's file."""
    lines = [line.strip() for line in _read_text(path).splitlines()]
    return {
        line.removesuffix(Path(line).suffix) if Path(line).suffix.lower() in FILE_SUFFIXES else line
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
