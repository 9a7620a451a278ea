"""Look at the images and masks of a data set, and say what they are.

Arrays in, facts and reasons out: size and depth of the images, whether masks are binary, classes or
instances, and what cannot be right. Knows no recipe and no network.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from model.arrays import AnyArray, Color, Int32Array
from model.errors import DataError
from model.training.data import PairedDataset
from model.training.images import read_image
from model.training.masks import StoredMask, number_colors, pack_colors, read_stored_mask
from model.training.pairs import Pair
from model.training.progress import track

_MOST_IMAGES, _MOST_MASKS = 40, 200
"""Images and masks that are looked at, evenly spread."""
_VOID_VALUE = 255
_VOID_COLOR = 0xE0E0C0
"""The color of pixels without a label in PASCAL VOC, (224, 224, 192)."""
_MOST_CLASSES = 64
"""A largest class index below which the value 255 stands for no label."""
_MANY_OBJECTS = 8
"""Values 0 to n that are more than the classes of most data sets."""
_SINGLE_PIECE = 0.9
"""Share of the values that are one connected piece from which on masks are of instances."""


@dataclasses.dataclass(frozen=True)
class ImageSurvey:
    """The images of a data set.

    Attributes:
        sizes: (H, W) of those that were looked at.
        is_color: whether one has several channels that differ.
        bits: 8 or 16, the most of all.
    """

    sizes: tuple[tuple[int, int], ...]
    is_color: bool
    bits: int

    @property
    def middle(self) -> tuple[int, int]:
        """The median height and width."""
        height, width = np.median(self.sizes, axis=0)
        return int(height), int(width)


@dataclasses.dataclass(frozen=True)
class MaskSummary:
    """The values of a mask file.

    Attributes:
        counts: value -> pixels. Values are stored integers, or packed colors if `is_colored`.
        pieces: of how many values the pixels are connected, and of how many they are not; 0 is
            left out. (0, 0) for masks with at most two values.
        palette: the colors of a palette as bytes, or None.
    """

    counts: dict[int, int]
    is_colored: bool
    is_lossy: bool
    pieces: tuple[int, int]
    palette: bytes | None


@dataclasses.dataclass(frozen=True)
class MaskMeaning:
    """The meaning of the masks of a data set.

    Attributes:
        labels: "binary", "classes" or "instances".
        reason: why, for people.
        values: of the classes: indices, or packed colors if `colors` is not empty.
        ignore: value of pixels without a label; -1 for none.
        colors: of each class in the masks; empty if masks have indices.
        shares: of all pixels with a label, for each of `values`; of the foreground alone, without
            classes.
    """

    labels: str
    reason: str
    values: tuple[int, ...] = ()
    ignore: int = -1
    colors: tuple[Color, ...] = ()
    shares: tuple[float, ...] = ()


def survey_images(pairs: Sequence[Pair]) -> ImageSurvey:
    """Look at images.

    Raises:
        DataError: one cannot be read, or is its own mask.
    """
    sizes, colors, bits = [], False, 8
    chosen = _spread(pairs, _MOST_IMAGES)
    for pair in track(chosen, len(chosen), "looking at images"):
        image = read_image(pair.image, pair.page)
        sizes.append((image.shape[0], image.shape[1]))
        colors |= image.ndim == 3 and bool((image != image[:, :, :1]).any())
        bits = max(bits, 8 * image.dtype.itemsize)
    return ImageSurvey(tuple(sizes), colors, bits)


def survey_masks(pairs: Sequence[Pair]) -> list[MaskSummary]:
    """Look at masks.

    Raises:
        DataError: one cannot be read.
    """
    chosen = _spread(pairs, _MOST_MASKS)
    return [
        summarize_mask(read_stored_mask(pair.mask, pair.page))
        for pair in track(chosen, len(chosen), "looking at masks")
    ]


def summarize_mask(mask: StoredMask) -> MaskSummary:
    """Count the values of a mask, and find whether each is one piece."""
    is_colored = mask.values.ndim == 3
    values = pack_colors(mask.values) if is_colored else mask.values
    if mask.is_lossy:
        values = np.where(values > 127, 255, 0)  # as `read_mask` does
    found, counts = np.unique(values, return_counts=True)
    pieces = (0, 0)
    if len(found) > 2 and not mask.is_lossy:
        numbers = number_colors(values.astype(np.int64)) if values.dtype.kind in "biu" else None
        pieces = (0, 0) if numbers is None else _count_pieces(numbers)
    return MaskSummary(
        dict(zip(found.tolist(), counts.tolist(), strict=True)),
        is_colored,
        mask.is_lossy,
        pieces,
        None if mask.palette is None else mask.palette.tobytes(),
    )


def _count_pieces(labels: Int32Array) -> tuple[int, int]:
    """Count the labels whose pixels are connected, and the others."""
    connected = 0
    boxes = [box for box in enumerate(ndimage.find_objects(labels), start=1) if box[1]]
    for label, box in boxes:
        connected += ndimage.label(labels[box] == label, np.ones((3, 3)))[1] == 1
    return connected, len(boxes) - connected


def understand_masks(masks: Sequence[MaskSummary], labels: str = "") -> MaskMeaning:
    """Decide what the masks are.

    Args:
        labels: what they are, if it is known.

    Raises:
        DataError: they cannot be right: all empty, all full, negative, or of no known kind.
    """
    as_colors = _are_colors(masks)
    totals: Counter[int] = Counter()
    for mask in masks:
        totals.update(_to_colors(mask) if as_colors else mask.counts)
    values = sorted(totals)
    if values[0] < 0:
        raise DataError(
            f"the masks contain the value {values[0]}; labels are 0 or more. If it means that "
            "pixels have no label, store it as 255"
        )
    ignore = _find_void(masks, values, as_colors)
    known = [value for value in values if value != ignore]
    if as_colors and _VOID_COLOR in known and len(known) > 2:
        known.remove(_VOID_COLOR)
        ignore = _VOID_VALUE
    _check_not_constant(known, ignore, as_colors)
    if labels:
        meaning = _follow(labels, known, totals, as_colors)
    else:
        meaning = _decide(masks, known, totals, as_colors)
    if ignore >= 0:
        reason = f"{meaning.reason}; {_name(ignore, False)} has no label"
        return dataclasses.replace(meaning, ignore=ignore, reason=reason)
    return meaning


def _decide(
    masks: Sequence[MaskSummary], known: list[int], totals: Counter[int], as_colors: bool
) -> MaskMeaning:
    """Decide between binary, classes and instances by the values that are labels."""
    labeled = sum(totals[value] for value in known)
    foreground = 1 - totals[0] / labeled
    if len(known) == 2 and known[0] == 0:
        names = " and ".join(_name(value, as_colors) for value in known)
        return MaskMeaning("binary", f"the masks have two values, {names}", shares=(foreground,))
    if len(known) == 3 and set(known) == {0, 1, _VOID_VALUE}:
        reason = "some masks have 0 and 1, others 0 and 255"
        return MaskMeaning("binary", reason, shares=(foreground,))
    if _are_soft(known, totals, labeled, as_colors):
        reason = "nearly all pixels are black or white; every other value is foreground too"
        return MaskMeaning("binary", reason, shares=(foreground,))
    per_mask = float(np.median([len(mask.counts) for mask in masks]))
    connected, divided = np.sum([mask.pieces for mask in masks], axis=0)
    single = connected / max(1, connected + divided)
    if single >= _SINGLE_PIECE and (
        len(known) >= 1.5 * per_mask
        or (known[-1] > 255 and not as_colors)
        or per_mask > 30
        or _are_numbered(masks, known)
    ):
        reason = f"{single:.0%} of the values are one connected piece, and they differ by image"
        return MaskMeaning("instances", reason, shares=(foreground,))
    if len(known) > 256 or (known[-1] > 255 and not as_colors):
        raise DataError(
            f"the masks have {len(known)} values up to {known[-1]}, too many for classes, and "
            f"only {single:.0%} of them are one connected piece, too few for instances; are these "
            "masks?"
        )
    meaning = _describe_classes(known, totals, as_colors)
    if single >= _SINGLE_PIECE and meaning.labels == "classes":
        advice = "each is one connected piece: if they are objects, add --labels instances"
        return dataclasses.replace(meaning, reason=f"{meaning.reason}; {advice}")
    return meaning


def _are_numbered(masks: Sequence[MaskSummary], known: list[int]) -> bool:
    """Whether each mask has most of the values 1 to n, and their number varies and is not small."""
    counts = [len(mask.counts.keys() - {0}) for mask in masks]
    numbered = all(
        max(mask.counts) <= 2 * count for mask, count in zip(masks, counts, strict=True) if count
    )
    return numbered and len(set(counts)) > 1 and len(known) >= _MANY_OBJECTS


def _follow(labels: str, known: list[int], totals: Counter[int], as_colors: bool) -> MaskMeaning:
    """Describe masks that are what the user says."""
    if labels == "classes":
        return _describe_classes(known, totals, as_colors)
    foreground = 1 - totals[0] / sum(totals[value] for value in known)
    return MaskMeaning(labels, "--labels says so", shares=(foreground,))


def _describe_classes(known: list[int], totals: Counter[int], as_colors: bool) -> MaskMeaning:
    """Order the classes: the background is 0 or black, or else the most frequent one."""
    labeled = sum(totals[value] for value in known)
    has_gaps = known[0] != 0 or known[-1] > max(_MOST_CLASSES, 2 * len(known))
    first = 0 if 0 in known else max(known, key=lambda value: totals[value])
    ordered = [first, *(value for value in known if value != first)]
    if as_colors or has_gaps:
        colors = tuple(_unpack(value) if as_colors else (value, value, value) for value in ordered)
        what = "colors" if as_colors else "grey values"
    else:
        ordered, colors, what = list(range(known[-1] + 1)), (), "values"
    shares = tuple(totals[value] / labeled for value in ordered)
    labels = "binary" if len(ordered) == 2 else "classes"
    reason = f"the masks have {len(known)} {what} ({_list(known, as_colors)})"
    return MaskMeaning(labels, reason, tuple(ordered), colors=colors, shares=shares)


def _are_colors(masks: Sequence[MaskSummary]) -> bool:
    """Whether values are compared by their colors.

    They are if some mask has colors, if palettes differ, or if all masks with palettes have only
    two values, whose order is then arbitrary.
    """
    if any(mask.is_colored for mask in masks):
        return True
    palettes = {mask.palette for mask in masks} - {None}
    several = any(len(mask.counts) > 2 for mask in masks)
    return len(palettes) > 1 or bool(palettes and not several)


def _to_colors(mask: MaskSummary) -> dict[int, int]:
    """Return the counts of a mask by packed colors."""
    if mask.is_colored:
        return mask.counts
    if mask.palette is None:
        if not 0 <= min(mask.counts) <= max(mask.counts) <= 255:
            raise DataError("some masks have colors, and others values beyond 255")
        return {value * 0x010101: count for value, count in mask.counts.items()}
    packed = pack_colors(np.frombuffer(mask.palette, np.uint8).reshape(-1, 3))
    counts: Counter[int] = Counter()
    for value, count in mask.counts.items():
        counts[int(packed[value]) if value < len(packed) else 0] += count
    return dict(counts)


def _find_void(masks: Sequence[MaskSummary], values: list[int], as_colors: bool) -> int:
    """Return 255 if it stands for no label: beside small indices, with another value above 0."""
    others = [value for value in values if 0 < value != _VOID_VALUE]
    if as_colors or _VOID_VALUE not in values or not others or others[-1] > _MOST_CLASSES:
        return -1
    together = any(
        _VOID_VALUE in mask.counts and any(other in mask.counts for other in others)
        for mask in masks
    )
    return _VOID_VALUE if together else -1


def _check_not_constant(known: list[int], ignore: int, as_colors: bool) -> None:
    """Check that there is something to learn.

    Raises:
        DataError: all pixels with a label have the same one.
    """
    if len(known) > 1:
        return
    if known == [0]:
        raise DataError("all masks are empty: every pixel is 0")
    beside = "" if ignore < 0 else f", beside {ignore}, which is taken for no label"
    raise DataError(
        f"every pixel of every mask is {_name(known[0], as_colors)}{beside}; no pixel is background"
    )


def _are_soft(known: list[int], totals: Counter[int], labeled: int, as_colors: bool) -> bool:
    """Whether grey values between black and white are only edges."""
    if as_colors or len(known) < 8 or known[-1] > 255 or known[-1] < 239:
        return False
    extreme = sum(totals[value] for value in known if value <= 16 or value >= 239)
    return extreme >= 0.9 * labeled and sum(totals[v] for v in known if v >= 239) > 0.01 * labeled


def check_masks(dataset: PairedDataset) -> str:
    """Check that masks are not images, and that there is foreground and background.

    Returns:
        A warning, or "".

    Each of several sources is checked by itself.

    Raises:
        DataError: a mask cannot be read, the first one equals its image, or all pixels of all masks
            have the same label.
    """
    warnings = [_check_source(dataset.select_source(name)) for name in dataset.sources]
    return "; ".join(filter(None, warnings))


def _check_source(dataset: PairedDataset) -> str:
    """Check the masks of one source; see `check_masks`."""
    first = dataset.pairs[0]
    stored = read_stored_mask(first.mask, first.page)
    check_not_image(first)
    found: set[int] = set()
    for sample in dataset:
        labels = sample.labels if dataset.kind == "classes" else sample.labels > 0
        found |= set(np.unique(labels[sample.labels >= 0]).astype(int).tolist())
        if len(found) > 1:
            break
    if len(found) < 2:
        what = "are empty" if found <= {0} else "have one label at every pixel"
        raise DataError(f"all masks {what}, from {first.mask} to {dataset.pairs[-1].mask}")
    values = np.unique(stored.values) if stored.values.ndim == 2 else np.empty(0)
    if dataset.kind == "binary" and not stored.is_lossy and 3 < len(values) < 200:
        return (
            f"{first.mask} has {len(values)} values up to {values[-1]}; with labels 'binary', "
            "everything but 0 is foreground"
        )
    return ""


def check_not_image(pair: Pair) -> None:
    """Check that a mask is not its image.

    Raises:
        DataError: a file cannot be read, or they are equal and have more than two values.
    """
    image: AnyArray = read_image(pair.image, pair.page)
    values = read_stored_mask(pair.mask, pair.page).values
    if image.ndim == 3 and values.ndim == 2:
        image = image[:, :, 0]
    if image.shape == values.shape and (image == values).all() and len(np.unique(values)) > 2:
        raise DataError(f"{pair.mask} equals its image {pair.image}; it is not a mask")


def _unpack(color: int) -> Color:
    return color >> 16, color >> 8 & 255, color & 255


def _name(value: int, as_colors: bool) -> str:
    return str(list(_unpack(value))) if as_colors else str(value)


def _list(values: list[int], as_colors: bool) -> str:
    shown = [_name(value, as_colors) for value in values[:6]]
    return ", ".join(shown) + (", ..." if len(values) > 6 else "")


def _spread(pairs: Sequence[Pair], most: int) -> list[Pair]:
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[index] for index in np.linspace(0, len(pairs) - 1, most).astype(int)]
