"""The directories of a TIFF -> the pages of its images and the channels of each page.

A directory (an IFD) describes pixels. Which of them are pages, and which are channels of one page,
is written in the metadata of the program that wrote the file:

- Directories of reduced resolution (thumbnails, the levels of a pyramid) and masks are not pages,
  whether they follow in the chain of directories or lie in a SubIFD. If a thumbnail has the full
  image in its SubIFD, as camera raw files do, that is the page.
- OME-TIFF, ImageJ, tifffile and some microscopes name axes. Along C lie the channels of a page;
  T, Z and every other axis count pages. Their readers are those of tifffile.
- ImageJ, tifffile and MetaMorph may describe a whole stack in one directory, whose planes follow
  one another in the file.

Nothing is decoded here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import math
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from tifffile import TiffFile, TiffPage, TiffPageSeries

from model.readers.base import DamagedImage

_IMAGE_WIDTH, _STRIP_OFFSETS, _JPEG_THUMBNAIL = 256, 273, 513
_MAX_DIRECTORIES = 10_000
"""As many as a service allows; a loop of directories ends there at the latest."""

_FORMATS_WITH_AXES = (*("ome", "imagej", "shaped", "stk", "lsm", "fluoview", "sis", "qpi", "scn"),)
"""Formats, by tifffile's names, whose metadata say along which axis planes lie."""
_ACCOMPANYING = ("Thumbnail", "Label", "Macro", "Map")
"""Series of whole-slide images, by tifffile's names, that show the slide but not its pixels."""

_RED_GREEN_BLUE = (("red", "green", "blue"), ("r", "g", "b"))
_PURE_COLORS = (0xFF0000FF, 0x00FF00FF, 0x0000FFFF)
"""Colors of OME channels as unsigned RGBA."""


@dataclasses.dataclass(frozen=True)
class Plane:
    """One image of a TIFF.

    Attributes:
        directory: the offset of the directory that describes it.
        index: of that directory in the chain; None for a SubIFD.
        skip: bytes between the first pixel of the directory and that of the plane.
        depth: index of the plane in a volume.
    """

    directory: int
    index: int | None
    skip: int = 0
    depth: int = 0


@dataclasses.dataclass(frozen=True)
class Page:
    """An image that gets one mask.

    Attributes:
        channels: the planes of the page, one per channel; None for one that is missing.
        joined: the three channels are red, green and blue.
    """

    channels: tuple[Plane | None, ...]
    joined: bool = False


@dataclasses.dataclass(frozen=True)
class Contents:
    """The pages of a file.

    Attributes:
        pages: in order.
        complete: whether the file holds all pages that it announces.
    """

    pages: tuple[Page, ...]
    complete: bool = True


@contextlib.contextmanager
def as_value_errors() -> Iterator[None]:
    """Raise a ValueError for whatever tifffile and its codecs stumble on in a damaged file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd tags
            yield
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(str(error)) from error


def open_tiff(file: Path | io.BytesIO) -> TiffFile:
    """Open a TIFF and read its first directory. No other file is opened, whatever its metadata say.

    Raises:
        ValueError: not a TIFF, or its first directory is damaged.
    """
    with as_value_errors():
        opened = TiffFile(
            file, _multifile=False, is_mmstack=False, is_ndtiff=False, is_scanimage=False
        )
        if not opened.pages:
            raise DamagedImage("the TIFF has no directory")
        return opened


def read_directory(file: TiffFile, plane: Plane) -> TiffPage:
    """Read the tags of a plane."""
    return _read_at(file, plane.directory, plane.index or 0)


def count_pages(path: Path) -> int:
    """Count the pages of a TIFF; only its directories are read.

    Raises:
        ValueError: not a TIFF, or its first directory is damaged.
        OSError: the file cannot be read.
    """
    with open_tiff(path) as file:
        return len(find_pages(file).pages)


def find_pages(file: TiffFile) -> Contents:
    """Find the pages of a file, and the channels of each.

    Raises:
        ValueError: the first directory is damaged.
    """
    with as_value_errors():
        chain, end = _read_chain(file)
        complete = end is not _End.CUT
        # tifffile follows a loop of directories without end.
        sorts = end is not _End.LOOP and (_has_axes(file) or len(chain) > 1)
        series = _read_series(file) if sorts else []
        images = _select_images(file, chain, series)
        pages = _arrange(file, images, series)
        if pages is None:
            pages, whole = _list_planes(file, images)
            complete = complete and whole
        return Contents(tuple(pages), complete)


# --- directories ---


@dataclasses.dataclass(frozen=True)
class _Directory:
    """A directory in the chain, or a SubIFD (`index` is None)."""

    page: TiffPage
    index: int | None

    def plane(self) -> Plane:
        return Plane(self.page.offset, self.index)


class _End(enum.Enum):
    """How a chain of directories ends."""

    LAST = enum.auto()
    LOOP = enum.auto()
    CUT = enum.auto()


def _read_at(file: TiffFile, offset: int, index: int) -> TiffPage:
    file.filehandle.seek(offset)
    return TiffPage(file, index)


def _read_chain(file: TiffFile) -> tuple[list[_Directory], _End]:
    """Read the directories of the chain, and how it ends. A loop ends where it closes."""
    chain = [_Directory(file.pages.first, 0)]
    visited = {file.pages.first.offset}
    while len(chain) < _MAX_DIRECTORIES:
        try:
            offset = _find_next(file, chain[-1].page.offset)
            if offset == 0:
                return chain, _End.LAST
            if offset in visited:
                return chain, _End.LOOP
            page = _read_at(file, offset, len(chain))
        except (ValueError, struct.error, OSError):
            return chain, _End.CUT
        visited.add(offset)
        chain.append(_Directory(page, len(chain)))
    return chain, _End.CUT


def _find_next(file: TiffFile, offset: int) -> int:
    """Find the offset of the directory after one; 0 after the last."""
    form, handle = file.tiff, file.filehandle
    handle.seek(offset)
    (tags,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    handle.seek(offset + form.tagnosize + tags * form.tagsize)
    (following,) = struct.unpack(form.offsetformat, handle.read(form.offsetsize))
    return int(following)


def _select_images(
    file: TiffFile, chain: list[_Directory], series: Iterable[TiffPageSeries]
) -> list[_Directory]:
    """Leave out reduced images, masks and whatever else is not an image of its own.

    If nothing else is in the file, they are its images.
    """
    candidates = [each for each in chain if each.index == 0 or _is_image(each.page)]
    for each in chain:
        if each.page.is_reduced:
            candidates += _read_full_images(file, each.page)
    left_out = set(_find_reduced(series))
    images = [
        each
        for each in candidates
        if not (each.page.is_reduced or each.page.is_mask or each.page.offset in left_out)
    ]
    return images or candidates


def _is_image(page: TiffPage) -> bool:
    """Whether a directory after the first has pixels. Thumbnails of EXIF have a JPEG instead."""
    thumbnail = _JPEG_THUMBNAIL in page.tags and _STRIP_OFFSETS not in page.tags
    return _IMAGE_WIDTH in page.tags and not thumbnail


def _read_full_images(file: TiffFile, thumbnail: TiffPage) -> Iterator[_Directory]:
    """The images of full resolution in the SubIFDs of a thumbnail."""
    for offset in thumbnail.subifds or ():
        with contextlib.suppress(ValueError, struct.error, OSError):
            page = _read_at(file, offset, 0)
            if _is_image(page) and not page.is_reduced:
                yield _Directory(page, None)


def _find_reduced(series: Iterable[TiffPageSeries]) -> Iterator[int]:
    """The offsets of the levels of pyramids, also where no tag says what they are, and of pictures
    of slides.

    Without a tag a smaller image counts as a level only if it is tiled, as pyramids are.
    """
    for each in series:
        groups = [level for level in each.levels[1:] if level.keyframe.is_tiled]
        if each.name in _ACCOMPANYING and each.kind in ("svs", "qpi", "ndpi", "bif", "avs"):
            groups.append(each)
        for group in groups:
            yield from (frame.offset for frame in group if frame is not None)


# --- planes of directories ---


def _has_axes(file: TiffFile) -> bool:
    return any(getattr(file, f"is_{name}") for name in _FORMATS_WITH_AXES)


def _read_series(file: TiffFile) -> list[TiffPageSeries]:
    """Let tifffile sort the directories by the metadata; empty where these are damaged."""
    try:
        return file.series
    except MemoryError:
        raise
    except Exception:  # whatever damaged metadata make it stumble on
        return []


def _list_planes(file: TiffFile, images: list[_Directory]) -> tuple[list[Page], bool]:
    """Each image is a page, and so is each plane of a volume.

    Returns:
        The pages, and whether the file is as long as its metadata say.
    """
    pages = [
        Page((dataclasses.replace(image.plane(), depth=depth),))
        for image in images
        for depth in range(_count_depth(image.page))
    ]
    return pages, not (len(images) == 1 and _is_cut_stack(file, images[0].page))


def _count_depth(page: TiffPage) -> int:
    """Planes of a volume. The first is enough to find out that a damaged number is absurd."""
    depth = page.imagedepth
    return depth if isinstance(depth, int) and 1 < depth <= _MAX_DIRECTORIES else 1


def _is_cut_stack(file: TiffFile, page: TiffPage) -> bool:
    """Whether ImageJ's stack in one directory ends after some of its planes.

    Programs that save one plane keep the description of the stack, so a single plane is whole.
    """
    images = (file.imagej_metadata or {}).get("images", 1) if file.is_imagej else 1
    if not isinstance(images, int) or images < 2 or not page.is_final or page.nbytes < 1:
        return False
    return 2 <= (file.filehandle.size - page.dataoffsets[0]) // page.nbytes < images


def _arrange(
    file: TiffFile, images: list[_Directory], series: Iterable[TiffPageSeries]
) -> list[Page] | None:
    """Arrange planes by the axes of their series.

    Returns:
        None if no series has axes, or if they do not cover all images.
    """
    known = {image.page.offset: image for image in images}
    pages: list[Page] = []
    for each in series:
        if each.kind not in _FORMATS_WITH_AXES:
            return None
        if each.keyframe.offset in known:
            arranged = _arrange_series(file, each, images, known)
            if arranged is None:
                return None
            pages += arranged
    covered = {plane.directory for page in pages for plane in page.channels if plane is not None}
    return pages if pages and covered == known.keys() else None


def _arrange_series(
    file: TiffFile,
    series: TiffPageSeries,
    images: list[_Directory],
    known: dict[int, _Directory],
) -> list[Page] | None:
    """Arrange the planes of a series; None if its shape does not fit its planes."""
    key = series.keyframe
    axes, shape = series.axes, series.shape
    count = math.prod(shape) // max(1, math.prod(key.shape))
    if count < 1 or math.prod(shape) != count * math.prod(key.shape) or key.imagedepth != 1:
        return None
    outer = 0  # axes that count planes, which come first
    while math.prod(shape[:outer]) != count:
        outer += 1
        if outer > len(shape):
            return None
    planes = _find_planes(file, series, count, images, known)
    if planes is None:
        return None
    grid = np.arange(count).reshape(shape[:outer])
    channels = 1
    if "C" in axes[:outer]:
        axis = axes.index("C")
        channels = shape[axis]
        grid = np.moveaxis(grid, axis, -1)
    joined = channels == 3 and key.samplesperpixel == 1 and _are_red_green_blue(file)
    return [
        Page(tuple(planes[index] for index in row), joined)
        for row in grid.reshape(-1, channels).tolist()
    ]


def _find_planes(
    file: TiffFile,
    series: TiffPageSeries,
    count: int,
    images: list[_Directory],
    known: dict[int, _Directory],
) -> list[Plane | None] | None:
    """The planes of a series in the order of its axes; None if they cannot be found."""
    key = series.keyframe
    if len(images) == count and series.kind != "ome":  # OME gives the order of directories
        return [image.plane() for image in images]
    if len(images) == 1:
        end = key.dataoffsets[0] + count * key.nbytes if key.is_final else math.inf
        if end > file.filehandle.size or count > _MAX_DIRECTORIES:
            return None
        return [Plane(key.offset, known[key.offset].index, n * key.nbytes) for n in range(count)]
    frames = list(series)
    if len(frames) != count or any(frame and frame.offset not in known for frame in frames):
        return None
    return [None if frame is None else known[frame.offset].plane() for frame in frames]


def _are_red_green_blue(file: TiffFile) -> bool:
    """Whether the metadata name, or color, the three channels red, green and blue."""
    if file.is_imagej:
        labels = (file.imagej_metadata or {}).get("Labels") or ()
        return tuple(str(label).strip().lower() for label in labels[:3]) in _RED_GREEN_BLUE
    if not file.is_ome or file.ome_metadata is None:
        return False
    channels = [
        element
        for element in ElementTree.fromstring(file.ome_metadata).iter()
        if element.tag.endswith("}Channel")
    ][:3]
    names = tuple(each.get("Name", "").strip().lower() for each in channels)
    colors = tuple(int(each.get("Color", 0)) & 0xFFFFFFFF for each in channels)
    return names in _RED_GREEN_BLUE or colors == _PURE_COLORS
