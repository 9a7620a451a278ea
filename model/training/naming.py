"""Which mask belongs to which image, by the words in their file names.

A name is cut into words and numbers. Words such as "mask", "label" or "img" say what a file is and
not which one, so they are left out, and the rest of both names must be equal: `car_01.jpg` and
`car_01_mask.gif`, `img_7` and `label_7`, `x/images/1.png` and `x/masks/1.png`. Knows names; no
pixels.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

# fmt: off
_MASK_WORDS = frozenset({
    "annot", "annotation", "annotations", "ground", "groundtruth", "gt", "gtfine", "label",
    "labelids", "labels", "lbl", "mask", "masks", "matte", "seg", "segmentation",
    "segmentationclass", "segmentationobject", "segmentations", "segs", "target", "targets",
    "trimap", "trimaps", "truth",
})
_IMAGE_WORDS = frozenset({
    "im", "image", "images", "img", "imgs", "input", "inputs", "jpegimages", "leftimg8bit",
    "photo", "photos", "pic", "raw", "scan", "volume",
})
# fmt: on
_MARKS = frozenset({"l"})
"""Words of a mask's name that alone do not make a file a mask: CamVid's `_L`."""

Key = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MatchedNames:
    """Images and their masks.

    Attributes:
        images: all files that are images.
        pairs: image -> mask, in the order of the images.
    """

    images: tuple[Path, ...]
    pairs: dict[Path, Path]


def describe_naming() -> str:
    """Say in one sentence how names are matched."""
    return (
        "A mask has the name of its image; words such as mask, label, seg, gt, img may be added or "
        "differ"
    )


def match_names(
    images: Path, image_files: Iterable[Path], masks: Path, mask_files: Iterable[Path]
) -> MatchedNames:
    """Match the files of two folders, or of one that contains both.

    Args:
        images, masks: the folders; names are taken relative to them.
        image_files, mask_files: in them. If the folders are the same, a file is a mask if its path
            has a word for masks.

    Returns:
        The matches of the first of these rules that finds most: equal paths, paths with the same
        words, file names with the same words. A name that two files share matches nothing.
    """
    image_files, mask_files = list(image_files), list(mask_files)
    if images.resolve() == masks.resolve():
        mask_files = [path for path in image_files if _is_mask(path.relative_to(images))]
        image_files = [path for path in image_files if not _is_mask(path.relative_to(images))]
    best: dict[Path, Path] = {}
    for make_key in (_equal_path, _words_of_path, _words_of_name):
        found = _match(_index(images, image_files, make_key), _index(masks, mask_files, make_key))
        if len(found) > len(best):
            best = found
    return MatchedNames(tuple(image_files), best)


def _match(images: dict[Key, Path], masks: dict[Key, Path]) -> dict[Path, Path]:
    return {path: masks[key] for key, path in images.items() if key in masks}


def _index(folder: Path, files: list[Path], make_key: Callable[[Path], Key]) -> dict[Key, Path]:
    """Map the key of each file to it, without keys of several files."""
    found = defaultdict(list)
    for path in files:
        found[make_key(path.relative_to(folder).with_suffix(""))].append(path)
    return {key: paths[0] for key, paths in found.items() if len(paths) == 1}


def _equal_path(path: Path) -> Key:
    return path.parts


def _words_of_path(path: Path) -> Key:
    return tuple(word for part in path.parts for word in _words_of_name(Path(part)))


def _words_of_name(path: Path) -> Key:
    """Return the words and numbers of a file's name that say which file it is."""
    left_out = _MASK_WORDS | _IMAGE_WORDS | _MARKS
    return tuple(word for word in _split(path.name) if word not in left_out)


def _split(name: str) -> list[str]:
    """Cut a name into words and numbers, in small letters; words that contain digits stay whole."""
    parts = []
    for part in re.split(r"[^0-9a-z]+", name.lower()):
        if part in _MASK_WORDS | _IMAGE_WORDS:
            parts.append(part)
        else:
            parts += re.findall(r"[a-z]+|[0-9]+", part)
    return parts


def _is_mask(path: Path) -> bool:
    return any(word in _MASK_WORDS for part in path.with_suffix("").parts for word in _split(part))
