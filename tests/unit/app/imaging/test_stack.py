"""Stacks of TIFFs: every page keeps its pixels and its tags."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile

from app.imaging.stack import stack_tiffs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib", "rowsperstrip": 5},
        {"compression": "zlib", "predictor": 2},
        {"compression": "lzw"},
        {"tile": (16, 16), "compression": "zlib"},
        {"resolution": (15384.6, 15384.6), "resolutionunit": "CENTIMETER"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("shape", "kind", "photometric"),
    [
        ((40, 50), np.uint8, "minisblack"),
        ((40, 50), np.uint16, "minisblack"),
        ((40, 50), np.uint32, "minisblack"),
        ((40, 50), np.float32, "minisblack"),
        ((40, 50, 3), np.uint8, "rgb"),
        ((40, 50, 4), np.uint8, "rgb"),
    ],
)
def test_pages_keep_their_pixels(
    options: dict[str, object], shape: tuple[int, ...], kind: type, photometric: str
) -> None:
    if kind is np.float32 and "predictor" in options:
        options = {**options, "predictor": 3}
    rng = np.random.default_rng(0)
    pages = [(rng.random(shape) * 200).astype(kind) for _ in range(3)]
    files = []
    for page in pages:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, page, photometric=photometric, metadata=None, **options)
        files.append(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(stack_tiffs(files))) as stack:
        assert len(stack.pages) == 3
        for page, expected in zip(stack.pages, pages, strict=True):
            assert np.array_equal(page.asarray(), expected)
            assert page.asarray().dtype == kind
            with tifffile.TiffFile(io.BytesIO(files[0])) as file:
                assert page.resolution == file.pages.first.resolution
                assert page.resolutionunit == file.pages.first.resolutionunit
                assert page.extrasamples == file.pages.first.extrasamples


def test_palette_is_kept() -> None:
    colors = np.zeros((3, 256), np.uint16)
    colors[0, 1] = 65535
    buffer = io.BytesIO()
    labels = np.eye(9, dtype=np.uint8)
    tifffile.imwrite(buffer, labels, photometric="palette", colormap=colors, metadata=None)
    with tifffile.TiffFile(io.BytesIO(stack_tiffs([buffer.getvalue()] * 2))) as stack:
        for page in stack.pages:
            assert np.array_equal(page.colormap, colors)
            assert np.array_equal(page.asarray(), labels)
