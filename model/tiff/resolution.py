"""The size of a pixel, from the metadata of a TIFF."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from xml.etree import ElementTree

from tifffile import TiffFile, TiffPage

_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
_UNITS = {2: 25_400.0, 3: 10_000.0}
"""ResolutionUnit -> micrometres: inch and centimetre."""
_MICROMETRES = {
    "pm": 1e-6,
    "\u00c5": 1e-4,
    "nm": 1e-3,
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer"), 1.0),
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    **dict.fromkeys(("inch", "in"), 25_400.0),
}
_PLAUSIBLE = (0.001, 1e5)
"""Micrometres per pixel that metadata may state."""
_PLAUSIBLE_TAGS = (0.01, 10.0)
"""The same for resolution tags alone. 10 micrometres are 2540 pixels per inch: scanners, screens
and printers have fewer."""
_SQUARE = 0.01
"""Largest relative difference between width and height of a pixel."""


def read_pixel_size(file: TiffFile, page: TiffPage) -> float | None:
    """Read the width of a pixel in micrometres; None if it is unknown.

    Trusted, in this order:

    1. OME-XML: PhysicalSizeX with its unit, which is the micrometre if it is missing.
    2. ImageJ: the tag XResolution in pixels per `unit`, where that is a length.
    3. The tags XResolution and ResolutionUnit (TIFF 6.0, page 38) in pixels per inch or
       centimetre, if a pixel is 0.01 to 10 micrometres wide. Anything coarser is most likely the
       72, 96 or 300 dots per inch that programs write for screens and printers.

    Pixels that are not square have no single size, and so None.
    """
    with contextlib.suppress(Exception):  # whatever damaged metadata make a parser stumble on
        if file.is_ome and file.ome_metadata is not None:
            return _read_ome(file.ome_metadata)
        if file.is_imagej:
            return _read_imagej(file.imagej_metadata or {}, page)
        unit = _UNITS.get(page.tags.valueof(_RESOLUTION_UNIT, 2))
        if unit is not None:
            return _check(unit, _read_resolution(page), _PLAUSIBLE_TAGS)
    return None


def _read_ome(xml: str) -> float | None:
    """Read the size from the first image of an OME-XML."""
    for element in ElementTree.fromstring(xml).iter():
        if element.tag.endswith("}Pixels"):
            sizes = [
                float(element.attrib[f"PhysicalSize{axis}"])
                * _MICROMETRES[element.get(f"PhysicalSize{axis}Unit", "\u00b5m")]
                for axis in "XY"
            ]
            return _check(1.0, (1 / sizes[0], 1 / sizes[1]), _PLAUSIBLE)
    return None


def _read_imagej(metadata: Mapping[str, object], page: TiffPage) -> float | None:
    # ImageJ writes non-ASCII characters as Java does.
    name = str(metadata.get("unit", "")).replace("\\u00B5", "\u00b5").strip()
    unit = _MICROMETRES.get(name)
    return None if unit is None else _check(unit, _read_resolution(page), _PLAUSIBLE)


def _read_resolution(page: TiffPage) -> tuple[float, float]:
    """Read the pixels per unit along x and y."""
    (x, by_x), (y, by_y) = (page.tags[code].value for code in (_X_RESOLUTION, _Y_RESOLUTION))
    return x / by_x, y / by_y


def _check(
    unit: float, resolution: tuple[float, float], plausible: tuple[float, float]
) -> float | None:
    """Compute the micrometres per pixel of square pixels; None if that is not plausible.

    Args:
        unit: in micrometres.
        resolution: pixels per unit along x and y.
    """
    across, down = (unit / each for each in resolution)
    if not math.isclose(across, down, rel_tol=_SQUARE):
        return None
    return across if plausible[0] <= across <= plausible[1] else None
