"""Which mask belongs to which image: files of two folders, or of one, become pairs.

Knows names and numbers of pages; no pixels and no labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from model.errors import DataError
from model.training.images import FILE_SUFFIXES, count_pages, list_images
from model.training.masks import MaskCoding
from model.training.naming import describe_naming, match_names


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
    pages, masks = count_pages(pair.image), count_pages(pair.mask)
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


def prefix_of(name: str) -> str:
    """Return a name up to its last underscore."""
    return name.rpartition("_")[0] or name
