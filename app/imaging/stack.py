"""TIFFs of one page -> one TIFF with all pages. Decodes no pixels. Knows no HTTP."""

from __future__ import annotations

import io
from collections.abc import Iterable


def stack_tiffs(files: Iterable[bytes]) -> bytes:
    """Join TIFFs that this service wrote, in their order. Their strips or tiles are copied as they are."""
    import tifffile

    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for data in files:
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                page = file.pages.first
                segments = zip(page.dataoffsets, page.databytecounts, strict=True)
                writer.write(
                    iter([data[start : start + size] for start, size in segments]),
                    shape=page.shape,
                    dtype=page.dtype,
                    rowsperstrip=None if page.is_tiled else page.rowsperstrip,
                    tile=page.tile,
                    compression=page.compression,
                    predictor=page.predictor,
                    photometric=page.photometric,
                    extrasamples=page.extrasamples,
                    planarconfig=page.planarconfig,
                    colormap=page.colormap,
                    resolution=page.resolution,
                    resolutionunit=page.resolutionunit,
                    metadata=None,
                )
    return buffer.getvalue()
