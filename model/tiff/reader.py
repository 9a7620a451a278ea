"""TIFF files -> pixel arrays, by tifffile and imagecodecs: for training and the service alike.

Import it only where a TIFF has arrived. Knows no limits on size and no HTTP.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import struct

import numpy as np
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC, PREDICTOR, TiffFile, TiffPage

from model.arrays import AnyArray, Shape
from model.pixels import SIDEWAYS, SelectionError, describe_choices, to_array, turn
from model.readers.base import DamagedImage
from model.tiff.colors import (
    Samples,
    UnsupportedTiff,
    describe_samples,
    name_value,
    to_pixels,
)
from model.tiff.decoding import COMPRESSIONS, JPEG, PREDICTORS, check_complete, read_samples
from model.tiff.pages import (
    Page,
    Plane,
    as_value_errors,
    find_pages,
    open_tiff,
    read_directory,
)
from model.tiff.resolution import read_pixel_size

# tifffile logs every odd tag, and the files are those of clients, who could fill the log.
logging.getLogger("tifffile").disabled = True

_LAYOUT_TAGS = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284),  # size, samples and strips
    *(317, 320, 322, 323, 324, 325, 338, 339, 347, 530, 32997),  # predictor, tiles and colors
}
"""Tags without which pixels would be read wrongly."""
_ORIENTATION = 274
_TRUE_COLORS = Samples(PHOTOMETRIC.RGB, 3, (0, 1, 2))


@dataclasses.dataclass(frozen=True)
class TiffLayout:
    """How large the image of a page is, and how large its decoder's buffers are.

    Attributes:
        height, width: of the upright image, in pixels.
        segment: (height, width) of a strip or a tile, in pixels.
        bytes_per_pixel: of all samples, as they are decoded.
    """

    height: int
    width: int
    segment: Shape
    bytes_per_pixel: int


@dataclasses.dataclass(frozen=True)
class Labels:
    """The values of a mask.

    Attributes:
        values: (H, W), upright, as they are stored.
        palette: (N, 3) uint8, the colors that the values stand for; None without a palette.
    """

    values: AnyArray
    palette: AnyArray | None = None


class TiffReader:
    """The pages of a TIFF.

    Args:
        data: the bytes of the file.

    Raises:
        ValueError: damaged.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._file = open_tiff(io.BytesIO(data))
        contents = find_pages(self._file)
        self._pages, self._complete = contents.pages, contents.complete

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return len(self._pages)

    def select(self, page: int | None = None, channel: int | None = None) -> TiffImage:
        """Select an image.

        Args:
            page: its index, from 0; None for the only one.
            channel: its index, from 0; None for all colors of the page.

        Raises:
            SelectionError: there are several pages or channels to choose from, or not so many.
            UnsupportedTiff: a kind that is not read.
            ValueError: damaged.
        """
        if page is None and self.pages > 1:
            raise SelectionError(
                f"the image has {self.pages} pages",
                f"page=0 to page={self.pages - 1} for one of them, or page=all",
            )
        if page is not None and not 0 <= page < self.pages:
            raise SelectionError(f"page={page}: {describe_choices(self.pages, 'page')}")
        chosen = self._pages[page or 0]
        with as_value_errors():
            image = TiffImage(self._file, self._data, chosen, channel)
            if page is None and not self._complete:
                image.check_complete()
                raise SelectionError(
                    "the TIFF is cut off: only its first page can be read", "page=0 for it"
                )
            return image

    def sizes(self) -> list[Shape]:
        """Read (height, width) of each page, upright; (0, 0) where tags are damaged."""
        return [self._size(page) for page in self._pages]

    def _size(self, page: Page) -> Shape:
        plane = next((each for each in page.channels if each is not None), None)
        if plane is None:
            return 0, 0
        tags = read_directory(self._file, plane)
        return _read_size(tags)


class TiffImage:
    """One page of a TIFF, or one channel of it; use `TiffReader.select`.

    Attributes:
        channels: how many the page has to choose from.
        pixel_size: micrometres per pixel; None if unknown. See `read_pixel_size`.

    Raises:
        SelectionError: the page has several channels and none was chosen, or not so many.
        UnsupportedTiff: a kind that is not read.
        ValueError: damaged.
    """

    def __init__(self, file: TiffFile, data: bytes, page: Page, channel: int | None) -> None:
        self._file, self._data = file, data
        first = next((plane for plane in page.channels if plane is not None), None)
        if first is None:
            raise DamagedImage("the page is missing in the TIFF")
        tags = read_directory(file, first)
        _check_tags(tags, data)
        _check_supported(tags)
        self._samples = describe_samples(tags)
        self._sample: int | None = None
        self._planes = page.channels
        inside = self._samples.channels if self._samples.colors == 0 else (None,)
        choices = [(plane, sample) for plane in page.channels for sample in inside]
        if len(page.channels) == 1 and self._samples.colors:
            choices = [(first, sample) for sample in self._samples.channels]
        self.channels = len(choices)
        shown = page.joined or (len(page.channels) == 1 and self._samples.colors > 0)
        if channel is None and not shown:
            raise SelectionError(
                f"the image has {self.channels} channels",
                f"channel=0 to channel={self.channels - 1} for one of them",
            )
        if channel is not None:
            if not 0 <= channel < self.channels:
                choice = describe_choices(self.channels, "channel")
                raise SelectionError(f"channel={channel}: {choice}")
            plane, self._sample = choices[channel]
            self._planes = (plane,)
        self.pixel_size = read_pixel_size(file, tags)

    def layout(self) -> TiffLayout:
        """Read the tags alone; nothing is decoded."""
        page = self._read_tags(self._planes[0])
        height, width = _read_size(page)
        segment = (page.tilelength, page.tilewidth)
        if not page.is_tiled:
            segment = (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        assert page.dtype is not None
        samples = page.samplesperpixel * page.imagedepth * len(self._planes)
        return TiffLayout(height, width, segment, page.dtype.itemsize * samples)

    def check_complete(self) -> None:
        """Check that the file has all strips and tiles of the image.

        Raises:
            ValueError: some are missing.
        """
        for index, plane in enumerate(self._planes):
            check_complete(self._read_tags(plane), self._plane(index), len(self._data))

    def read(self) -> AnyArray:
        """Decode the image, upright.

        Returns:
            See `model.pixels.decode_image`.

        Raises:
            ValueError: pixels are missing or damaged.
        """
        with as_value_errors():
            if len(self._planes) > 1:
                return self._read_joined()
            page = self._read_tags(self._planes[0])
            if _is_left_to_pillow(page):
                return self._read_by_pillow(page)
            orientation = _orientation(page)
            samples = read_samples(page, self._plane(0), self._data)
            pixels = to_pixels(page, self._samples, samples, self._sample)
            return np.ascontiguousarray(turn(pixels, orientation))

    def read_labels(self) -> Labels:
        """Decode the values of a mask, without any change to them.

        Raises:
            ValueError: pixels are missing or damaged, there is more than one channel, or values are
                no integers.
        """
        with as_value_errors():
            page = self._read_tags(self._planes[0])
            palette = None
            if self._samples.photometric == PHOTOMETRIC.PALETTE:
                palette = (np.asarray(page.colormap) >> 8).astype(np.uint8).T
            elif self._samples.colors != 1 or len(self._planes) > 1:
                raise ValueError(f"it has {self.channels} channels; a mask has one")
            orientation, inverted = _orientation(page), _is_inverted(page)
            bits = page.bitspersample
            values = read_samples(page, self._plane(0), self._data)[:, :, 0]
            if values.dtype.kind == "f" and not (values == np.rint(values)).all():
                raise ValueError("it has fractions; a mask contains integers")
            if inverted and values.dtype.kind == "b":
                values = ~values
            elif inverted and values.dtype.kind == "u":
                values = values.dtype.type((1 << bits) - 1) - values
            return Labels(turn(values, orientation), palette)

    def _plane(self, index: int) -> Plane:
        plane = self._planes[index]
        if plane is None:
            raise DamagedImage("a channel is missing in the TIFF")
        return plane

    def _read_tags(self, plane: Plane | None) -> TiffPage:
        """Read and check the tags of a plane anew."""
        if plane is None:
            raise DamagedImage("a channel is missing in the TIFF")
        page = read_directory(self._file, plane)
        _check_tags(page, self._data)
        _check_supported(page)
        if describe_samples(page) != self._samples:
            raise DamagedImage("the channels of the TIFF differ in kind")
        return page

    def _read_joined(self) -> AnyArray:
        """Decode three planes that are red, green and blue."""
        planes = []
        for index in range(len(self._planes)):
            page = self._read_tags(self._planes[index])
            planes.append(read_samples(page, self._plane(index), self._data))
        page = self._read_tags(self._planes[0])
        joined = np.concatenate(planes, axis=2)
        return np.ascontiguousarray(turn(to_pixels(page, _TRUE_COLORS, joined), _orientation(page)))

    def _read_by_pillow(self, page: TiffPage) -> AnyArray:
        plane = self._plane(0)
        check_complete(page, plane, len(self._data))
        if plane.index is None:
            raise DamagedImage("an image of half the colors that is not in the chain")
        with Image.open(io.BytesIO(self._data), formats=("TIFF",)) as image:
            image.seek(plane.index)
            pixels = to_array(image)  # upright: Pillow turns TIFFs itself
        return pixels if self._sample is None else pixels[:, :, self._sample]


def _orientation(page: TiffPage) -> int:
    value = page.tags.valueof(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _read_size(page: TiffPage) -> Shape:
    """Read (height, width) of the upright image."""
    height, width = page.imagelength, page.imagewidth
    return (width, height) if _orientation(page) in SIDEWAYS else (height, width)


def _is_inverted(page: TiffPage) -> bool:
    return describe_samples(page).photometric == PHOTOMETRIC.MINISWHITE


def _check_tags(page: TiffPage, data: bytes) -> None:
    """Reject a page that lacks a tag which its directory lists: tifffile skips damaged tags.

    Raises:
        ValueError: a tag cannot be read, or has an impossible value.
    """
    form = page.parent.tiff
    (count,) = struct.unpack_from(form.tagnoformat, data, page.offset)
    start = page.offset + form.tagnosize
    listed = {
        struct.unpack_from(f"{form.byteorder}H", data, start + index * form.tagsize)[0]
        for index in range(count)
    }
    if lost := (listed & _LAYOUT_TAGS).difference(page.tags.keys()):
        raise DamagedImage(f"the TIFF tag {min(lost)} cannot be read")
    sizes = {
        "height": page.imagelength,
        "width": page.imagewidth,
        "depth": page.imagedepth,
        "number of samples": page.samplesperpixel,
    }
    if page.is_tiled:
        sizes |= {
            "height of tiles": page.tilelength,
            "width of tiles": page.tilewidth,
            "depth of tiles": page.tiledepth,
        }
    else:
        sizes["height of strips"] = page.rowsperstrip
    for name, size in sizes.items():
        if not isinstance(size, int) or size <= 0:
            raise DamagedImage(f"the TIFF tags give an impossible {name}")
    if not page.dataoffsets or page.dataoffsets[0] >= len(data):
        raise DamagedImage("the TIFF tags give no place for the pixels")


def _check_supported(page: TiffPage) -> None:
    """Reject a page that is not decoded.

    Raises:
        UnsupportedTiff: another compression or predictor.
    """
    if page.compression not in COMPRESSIONS:
        raise UnsupportedTiff(f"with the compression {name_value(COMPRESSION, page.compression)}")
    known = (PREDICTOR.NONE,) if page.compression == COMPRESSION.LERC else PREDICTORS
    if page.predictor not in known:
        raise UnsupportedTiff(f"with the predictor {name_value(PREDICTOR, page.predictor)}")


def _is_left_to_pillow(page: TiffPage) -> bool:
    """Whether colors may be stored at a lower resolution, which tifffile reads in JPEGs alone."""
    return page.compression == COMPRESSION.OJPEG or (
        page.photometric == PHOTOMETRIC.YCBCR and page.compression not in JPEG
    )
