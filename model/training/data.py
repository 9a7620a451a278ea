"""Data sets: pairs of images and masks, decoded on access.

Files in, NumPy arrays out. Knows no augmentation, no tensors, no network.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.config import PreprocessConfig
from model.errors import DataError
from model.evaluation.evaluate import Sample
from model.training.images import read_image
from model.training.masks import MaskCoding, read_mask
from model.training.pairs import Pair, find_named_pairs, find_pairs, prefix_of
from model.training.sections import DataConfig, ImagesConfig
from model.training.tables import read_groups


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
    return MaskCoding(config.labels, len(preprocess.classes), config.ignore, config.colors)


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
