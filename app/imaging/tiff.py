"""Arrays -> TIFF bytes, by tifffile, which is imported with the first TIFF. Knows no HTTP."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from model.arrays import AnyArray

_MICROMETRES = 1e4
"""In a centimetre, the only metric unit of a TIFF."""
_RESOLUTION_TAGS = ("XResolution", "YResolution", "ResolutionUnit")


def encode_tiff(values: AnyArray, pixel_size: float | None = None) -> bytes:
    """Encode an image as a TIFF with Deflate compression.

    Args:
        values: (H, W), or (H, W, 3) RGB, or (H, W, 4) RGBA, of any type.
        pixel_size: in micrometres, which becomes the resolution; None leaves that out.
    """
    import tifffile

    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        _write_page(writer, values, _make_resolution(pixel_size))
    return buffer.getvalue()


def stack_tiff(pages: Sequence[bytes]) -> bytes:
    """Join TIFFs from `encode_tiff` to one, in their order, with the resolution of each.

    All pages get the type that holds the values of every page, because programs for stacks expect
    a single one.
    """
    import tifffile

    dtype = np.result_type(*(_read_type(page) for page in pages))
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in pages:
            with tifffile.TiffFile(io.BytesIO(page)) as file:
                first = file.pages.first
                _write_page(
                    writer, first.asarray().astype(dtype, copy=False), _read_resolution(first)
                )
    return buffer.getvalue()


def _write_page(writer: Any, values: AnyArray, resolution: dict[str, Any]) -> None:
    writer.write(
        values,
        photometric="minisblack" if values.ndim == 2 else "rgb",
        extrasamples=["unassalpha"] if values.shape[2:] == (4,) else None,
        compression="adobe_deflate",
        metadata=None,  # no description of one page's shape, which would be wrong in a stack
        maxworkers=1,
        **resolution,
    )


def _make_resolution(pixel_size: float | None) -> dict[str, Any]:
    if pixel_size is None:
        return {}
    per_centimetre = _MICROMETRES / pixel_size
    return {"resolution": (per_centimetre, per_centimetre), "resolutionunit": "CENTIMETER"}


def _read_resolution(page: Any) -> dict[str, Any]:
    if page.tags.valueof("ResolutionUnit") != 3:
        return {}
    return {
        "resolution": (page.tags.valueof("XResolution"), page.tags.valueof("YResolution")),
        "resolutionunit": "CENTIMETER",
    }


def _read_type(data: bytes) -> Any:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        return file.pages.first.dtype
