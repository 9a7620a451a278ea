"""The size of a pixel, from metadata that can be trusted."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import tifffile

from model.tiff.reader import TiffReader

GREY = np.zeros((8, 9), np.uint8)


def pixel_size(values: np.ndarray = GREY, **options: Any) -> float | None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="minisblack", **options)
    return TiffReader(buffer.getvalue()).select(0).pixel_size


@pytest.mark.parametrize(
    ("size", "unit", "expected"),
    [(0.25, "µm", 0.25), (250, "nm", 0.25), (0.00025, "mm", 0.25), (0.25, None, 0.25)],
)
def test_ome(size: float, unit: str | None, expected: float) -> None:
    metadata: dict[str, Any] = {"PhysicalSizeX": size, "PhysicalSizeY": size}
    if unit is not None:
        metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    assert pixel_size(ome=True, metadata=metadata) == pytest.approx(expected)


@pytest.mark.parametrize("unit", ["micron", "um", "\\u00B5m"])
def test_imagej(unit: str) -> None:
    assert pixel_size(imagej=True, resolution=(4, 4), metadata={"unit": unit}) == pytest.approx(
        0.25
    )
    assert pixel_size(imagej=True, resolution=(4, 4), metadata={"unit": "pixel"}) is None
    assert pixel_size(imagej=True, resolution=(72, 72)) is None


def test_tags_are_trusted_only_where_no_printer_would_write_them() -> None:
    assert pixel_size(resolution=(40_000, 40_000), resolutionunit="centimeter") == 0.25
    assert pixel_size(resolution=(101_600, 101_600), resolutionunit="inch") == 0.25
    for dots in (1, 72, 96, 300, 1200, 2400):
        assert pixel_size(resolution=(dots, dots), resolutionunit="inch") is None
    assert pixel_size(resolution=(4, 4), resolutionunit="none") is None
    assert pixel_size(resolution=(10**9, 10**9), resolutionunit="inch") is None


def test_pixels_that_are_not_square_have_no_size() -> None:
    assert pixel_size(resolution=(40_000, 20_000), resolutionunit="centimeter") is None
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}
    assert pixel_size(ome=True, metadata=sizes) is None


def test_no_metadata_and_damaged_ones() -> None:
    assert pixel_size(metadata=None) is None
    assert pixel_size(metadata=None, description="<OME><Pixels PhysicalSizeX='?'/></OME>") is None
