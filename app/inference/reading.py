"""Images as clients send them -> their sizes and their prepared pixels, by image workers.

Knows shared blocks and calls; no decoder runs here. Knows no queue and no HTTP.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from app.batching.deadline import Deadline
from app.imaging.bounds import check_size
from app.imaging.workers.pool import WorkerPool
from app.imaging.workers.shared import SharedBlock, StoredArray
from app.inference.blocks import Blocks
from app.inference.job import ImageJob
from app.inference.limits import DECODING_SECONDS, decoding_limit
from app.inference.steps import (
    EncodedImage,
    count_image_pages,
    decode_and_prepare,
    inspect_and_decode,
    inspect_image,
    prepare_image,
)
from model.arrays import AnyArray, Shape

_SMALL_PIXELS = 1_000_000
"""Most pixels of an image that is decoded in the call that reads its header."""


class ImageReader:
    """Reads headers, decodes and prepares images in image workers.

    Args:
        workers: processes that make the calls.
        blocks: for the bytes of the images.
        max_pixels: of one image.
    """

    def __init__(self, workers: WorkerPool, blocks: Blocks, max_pixels: int) -> None:
        self._workers = workers
        self._blocks = blocks
        self._max_pixels = max_pixels

    async def size(self, image: bytes | AnyArray) -> Shape:
        """(height, width) of an upright image, encoded or decoded.

        Raises:
            ImageError: not an image, an unsupported format, or too large.
        """
        if isinstance(image, bytes):
            with self._blocks.borrow() as block:
                data = await self._blocks.share(image, block)
                limit = decoding_limit(0, Deadline.never())
                header = await self._workers.call(limit, inspect_image, data, self._max_pixels)
            return header["height"], header["width"]
        height, width = image.shape[:2]
        check_size(height, width, self._max_pixels)
        return height, width

    async def count_pages(self, data: bytes) -> int:
        """Count the pages of an encoded image: several in a TIFF, one in other formats.

        Raises:
            ImageError: a damaged TIFF.
            ImageTooLarge: its pages have more pixels together than one image may have.
        """
        with self._blocks.borrow() as block:
            encoded = await self._blocks.share(data, block)
            limit = decoding_limit(0, Deadline.never())
            pages: int = await self._workers.call(
                limit, count_image_pages, encoded, self._max_pixels
            )
        return pages

    async def open(
        self,
        job: ImageJob,
        source: EncodedImage,
        pixels: SharedBlock,
        image: SharedBlock | None,
        deadline: Deadline,
        *,
        decode: bool,
    ) -> dict[str, Any]:
        """Read the header of an encoded image. See `inspect_and_decode`.

        Args:
            decode: decode and prepare it as well if it is small.
        """
        small = _SMALL_PIXELS if decode else 0
        # The pixels of a small image need more memory than a header, but no more time.
        limit = dataclasses.replace(decoding_limit(small, deadline), seconds=DECODING_SECONDS)
        result: dict[str, Any] = await self._workers.call(
            limit,
            inspect_and_decode,
            source,
            self._max_pixels,
            small,
            job.page,
            job.channel,
            job.preprocess,
            pixels,
            image,
        )
        return result

    async def prepare(
        self,
        job: ImageJob,
        source: EncodedImage | StoredArray,
        opened: dict[str, Any],
        pixels: SharedBlock,
        image: SharedBlock | None,
        deadline: Deadline,
    ) -> dict[str, Any]:
        """Decode an image if it is encoded, and prepare it. See `decode_and_prepare`.

        Args:
            opened: what `open` returned, if the image is encoded.
        """
        result: dict[str, Any]
        if isinstance(source, StoredArray):
            limit = decoding_limit(math.prod(source.shape), deadline)
            result = await self._workers.call(limit, prepare_image, source, job.preprocess, pixels)
            return result
        header = opened["header"]
        limit = decoding_limit(header["height"] * header["width"], deadline)
        result = await self._workers.call(
            limit, decode_and_prepare, source, header, job.preprocess, pixels, image
        )
        return result
