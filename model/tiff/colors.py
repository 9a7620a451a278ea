"""The samples of a TIFF's pixels -> grey or RGB: what they mean, and how they are converted.

Knows no files and no compressions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC, SAMPLEFORMAT, TiffPage

from model.arrays import AnyArray
from model.pixels import lay_on_black, map_rows, spread
from model.readers.base import DamagedImage, scale_to_bits

_PHOTOMETRIC, _NODATA, _PLANAR = 262, 42113, 2
_PREMULTIPLIED, _STRAIGHT = 1, 2
"""Values of ExtraSamples: alpha that colors are multiplied with already, and alpha that is not."""
_FAX = (COMPRESSION.CCITTRLE, COMPRESSION.CCITTFAX3, COMPRESSION.CCITTFAX4, COMPRESSION.CCIRLEW)

_GREYS = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
_INKS: dict[int, int] = {PHOTOMETRIC.SEPARATED: 4, PHOTOMETRIC.YCBCR: 3, PHOTOMETRIC.CIELAB: 3}
"""Color spaces that are converted to RGB -> samples of a pixel that are colors."""
_AS_GREY = (PHOTOMETRIC.MASK, PHOTOMETRIC.DEPTH_MAP, PHOTOMETRIC.SEMANTIC_MASK)
_DEPTHS: dict[int, Sequence[int]] = {
    PHOTOMETRIC.PALETTE: range(1, 17),
    PHOTOMETRIC.SEPARATED: (8, 16),
    PHOTOMETRIC.YCBCR: (8,),
    PHOTOMETRIC.CIELAB: (8,),
}
"""Bits of unsigned samples in these; the others may be of any type."""
_KINDS: dict[int, str] = {
    SAMPLEFORMAT.UINT: "unsigned integers",
    SAMPLEFORMAT.INT: "signed integers",
    SAMPLEFORMAT.IEEEFP: "floats",
    SAMPLEFORMAT.VOID: "samples of an undefined type",
    SAMPLEFORMAT.COMPLEXINT: "complex integers",
    SAMPLEFORMAT.COMPLEXIEEEFP: "complex floats",
}
_MAX_BITS = 128
_MAX_SHOWN = 4
"""Samples whose depths a message repeats, where they differ."""


class UnsupportedTiff(ValueError):
    """A TIFF of a kind that is not read; the message completes "a TIFF ..."."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """The meaning of the samples of a pixel.

    Attributes:
        photometric: how colors are meant; RGB, MINISBLACK, MINISWHITE or one that is converted.
        colors: samples that make up the image: 1 or 3, more where they are converted, or 0 where
            the samples do not form such an image, and a channel has to be chosen.
        channels: the samples to choose from, by their index; where colors are converted, of RGB.
        alpha: index of the sample that colors are to be multiplied with; None for none.
    """

    photometric: int
    colors: int
    channels: tuple[int, ...]
    alpha: int | None = None

    @property
    def converted(self) -> bool:
        """Whether colors become RGB first; a channel is then one of those three."""
        return self.photometric == PHOTOMETRIC.PALETTE or self.photometric in _INKS


def describe_samples(page: TiffPage) -> Samples:
    """Find out what the samples of a page are.

    A grey image may have alpha, a color image alpha or one sample of unknown meaning. With more,
    it has several channels, and nothing says which of them to show.

    Raises:
        UnsupportedTiff: another type of numbers or color space.
        ValueError: a tag has an impossible value.
    """
    photometric, count = _read_photometric(page), page.samplesperpixel
    _check_numbers(page, photometric)
    extra = max(0, count - _INKS.get(photometric, 3 if photometric == PHOTOMETRIC.RGB else 1))
    kinds = [*page.extrasamples][:extra]
    alphas = {
        index: kind
        for index, kind in enumerate(kinds, count - len(kinds))
        if kind in (_PREMULTIPLIED, _STRAIGHT)
    }
    straight = next((index for index, kind in alphas.items() if kind == _STRAIGHT), None)
    if photometric == PHOTOMETRIC.PALETTE:
        if page.colormap is None:
            raise DamagedImage("a palette image without a palette")
        return Samples(photometric, 1, (0, 1, 2))
    if photometric in _INKS:
        if count < _INKS[photometric] or (photometric == PHOTOMETRIC.YCBCR and count != 3):
            raise UnsupportedTiff(
                f"of {count} channels in {name_value(PHOTOMETRIC, photometric)} colors"
            )
        return Samples(photometric, _INKS[photometric], (0, 1, 2), straight)
    if photometric == PHOTOMETRIC.RGB and count == 4 and not kinds:
        # A fourth sample that is not declared: libtiff takes it for alpha.
        return Samples(photometric, 3, (0, 1, 2), 3)
    not_shown = next(iter(alphas), None) if straight is None else straight
    channels = tuple(index for index in range(count) if index != not_shown)
    spare = photometric == PHOTOMETRIC.RGB and len(channels) == 4 and not alphas
    colors = len(channels) if len(channels) in (1, 3) else 3 if spare else 0
    return Samples(photometric, colors, channels, straight)


def _read_photometric(page: TiffPage) -> int:
    """Read the photometric interpretation; where it is missing, guess it as libtiff does.

    Raises:
        UnsupportedTiff: another color space.
    """
    value = page.photometric
    if _PHOTOMETRIC not in page.tags and page.compression != COMPRESSION.OJPEG:
        if page.samplesperpixel in (3, 4):
            value = PHOTOMETRIC.RGB
        elif page.compression not in _FAX:
            value = PHOTOMETRIC.MINISBLACK
    if value in _AS_GREY:
        value = PHOTOMETRIC.MINISBLACK
    if value == PHOTOMETRIC.LINEAR_RAW:
        value = PHOTOMETRIC.RGB
    known = (*_GREYS, PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE, *_INKS)
    if value not in known:
        raise UnsupportedTiff(
            f"with the photometric interpretation {name_value(PHOTOMETRIC, value)}"
        )
    return int(value)


def _check_numbers(page: TiffPage, photometric: int) -> None:
    """Reject a page of numbers that would not be read, or not be read rightly.

    Raises:
        UnsupportedTiff: another type of numbers.
        ValueError: a tag has an impossible value.
    """
    bits, kind = page.bitspersample, page.sampleformat
    if isinstance(bits, int) and (kind not in _KINDS or not 0 < bits <= _MAX_BITS):
        raise DamagedImage(f"the TIFF tags give impossible samples: {bits} bits of the type {kind}")
    if page.dtype is None or page.dtype.kind == "c" or kind not in _KINDS:
        what = _KINDS.get(kind, "samples of different types")
        raise UnsupportedTiff(f"of {_join_bits(bits)}-bit {what}")
    depths = _DEPTHS.get(photometric)
    if depths is not None and (bits not in depths or page.dtype.kind not in "bu"):
        raise UnsupportedTiff(
            f"of {_join_bits(bits)}-bit {_KINDS[kind]} in {name_value(PHOTOMETRIC, photometric)} "
            "colors"
        )


def _join_bits(bits: int | Sequence[int]) -> str:
    """The bits of a sample, or those of the first samples where they differ: 5, 6, 5."""
    if isinstance(bits, int):
        return str(bits)
    return ", ".join(map(str, bits[:_MAX_SHOWN])) + (", ..." if len(bits) > _MAX_SHOWN else "")


def name_value(names: type[Any], value: int) -> str:
    """Name a tag's value as TIFF does, with the number where it is unknown.

    Raises:
        DamagedImage: the tag has no value, or several.
    """
    if not isinstance(value, int):
        raise DamagedImage(f"the TIFF tag {names.__name__} has an impossible value")
    try:
        return f"{names(value).name} ({int(value)})"
    except ValueError:
        return str(value)


def to_pixels(
    page: TiffPage, meaning: Samples, samples: AnyArray, channel: int | None = None
) -> AnyArray:
    """Convert stored samples.

    Args:
        page: its directory.
        meaning: of the samples.
        samples: (H, W, S), native byte order.
        channel: the sample that makes up the image; None for its colors.

    Returns:
        (H, W) or (H, W, 3), uint8 or uint16.
    """
    if meaning.converted:
        pixels = _convert(page, meaning, samples)
        return pixels if channel is None else pixels[:, :, channel]
    shown = meaning.channels[: meaning.colors] if channel is None else (channel,)
    # A slice is a view; the samples that are shown lie side by side unless alpha is between them.
    colors = samples[:, :, shown[0] : shown[-1] + 1]
    if len(shown) != colors.shape[2]:
        colors = samples[:, :, shown]
    alpha = samples[:, :, :0]
    if meaning.alpha is not None:
        alpha = samples[:, :, meaning.alpha : meaning.alpha + 1]
    inverted = meaning.photometric == PHOTOMETRIC.MINISWHITE
    nodata = read_nodata(page)
    if colors.dtype not in (np.bool_, np.uint8, np.uint16):
        return _to_sixteen_bits(colors, alpha, inverted, nodata)
    empty = None if nodata is None else (colors == nodata).all(axis=2)
    bits = page.bitspersample if isinstance(page.bitspersample, int) else 8
    colors, alpha = (_to_depth(each, bits) for each in (colors, alpha))
    if inverted:
        white = np.iinfo(colors.dtype).max
        colors = map_rows(lambda rows: white - rows, colors.dtype.type, colors)
    if empty is not None and empty.any():
        colors = np.where(empty[:, :, None], colors.dtype.type(0), colors)
    return lay_on_black(colors, alpha)


def read_nodata(page: TiffPage) -> float | None:
    """Read the value that marks pixels without data, from the tag GDAL_NODATA; None without."""
    text = page.tags.valueof(_NODATA)
    try:
        return float(str(text).strip(" \0").replace(",", ".")) if text is not None else None
    except ValueError:
        return None


def _to_sixteen_bits(
    colors: AnyArray, alpha: AnyArray, inverted: bool, nodata: float | None
) -> AnyArray:
    """Spread wide or signed numbers over 16 bits."""
    if alpha.shape[2]:
        full = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
        colors = colors * (alpha / full).astype(np.float32)
    return lay_on_black(spread(colors, inverted=inverted, nodata=nodata), None)


def _convert(page: TiffPage, meaning: Samples, samples: AnyArray) -> AnyArray:
    """Convert samples of another color space to RGB: (H, W, 3)."""
    colors = samples[:, :, : meaning.colors]
    alpha = samples[:, :, :0]
    if meaning.alpha is not None:
        alpha = samples[:, :, meaning.alpha : meaning.alpha + 1]
    if meaning.photometric == PHOTOMETRIC.PALETTE:
        table = (np.asarray(page.colormap) >> 8).astype(np.uint8).T
        indices = colors[:, :, 0]
        shown: AnyArray = table[indices.view(np.uint8) if indices.dtype == np.bool_ else indices]
        return shown
    if meaning.photometric == PHOTOMETRIC.SEPARATED:
        colors = _from_cmyk(colors)
    elif meaning.photometric == PHOTOMETRIC.CIELAB:
        colors = _from_pillow("LAB", colors)
    elif page.planarconfig == _PLANAR:  # otherwise the JPEG codec has done so
        colors = _from_pillow("YCbCr", colors)
    return lay_on_black(colors, alpha)


def _to_depth(samples: AnyArray, bits: int) -> AnyArray:
    """Convert unsigned samples of a declared depth to the full range of uint8 or uint16."""
    return scale_to_bits(samples.view(np.uint8) if samples.dtype == np.bool_ else samples, bits)


def _from_cmyk(inks: AnyArray) -> AnyArray:
    """Convert (H, W, 4) inks of uint8 or uint16 to RGB, as Pillow does without a profile."""
    full = np.uint32(np.iinfo(inks.dtype).max)

    def mix(colors: AnyArray, black: AnyArray) -> AnyArray:
        light = full - black.astype(np.uint32)
        return light - (colors.astype(np.uint32) * light + full // 2) // full

    return map_rows(mix, inks.dtype.type, inks[:, :, :3], inks[:, :, 3:])


def _from_pillow(mode: str, samples: AnyArray) -> AnyArray:
    """Convert (H, W, 3) uint8 of a color space that Pillow knows to RGB."""
    height, width, _ = samples.shape
    image = Image.frombytes(mode, (width, height), np.ascontiguousarray(samples).tobytes())
    return np.asarray(image.convert("RGB"))
