"""Split a data set into a training and a validation part.

Knows groups and names; no pixels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from model.errors import DataError
from model.training.data import PairedDataset
from model.training.pairs import Pair
from model.training.sections import DataConfig, ImagesConfig
from model.training.tables import read_validation_list


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
        listed = read_validation_list(Path(config.validation_list))
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
