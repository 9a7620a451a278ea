"""The steps of an image that run in image workers: every function here is called in such a process.

Pixels come and go in shared blocks. Arguments must be picklable, and results representable as JSON.
Imports no engine and no web framework: each worker imports this module.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

from app.imaging.decode import ImageHeader, count_pages, decode, inspect, open_and_inspect
from app.imaging.tiff import stack_tiff
from app.imaging.workers.shared import SharedBlock, StoredArray, pickle_once
from app.inference.outputs import Options
from app.inference.rendering import Decision, render
from model.arrays import AnyArray
from model.config import PreprocessConfig
from model.readers.base import ImageReader
from model.transforms import mask_and_confidence, prepare, resize_to_image
from model.windows import to_floats

pickle_once(Options, PreprocessConfig)


@dataclasses.dataclass(frozen=True)
class Stitched:
    """The probabilities of an image, and how to decide on its mask.

    Attributes:
        probabilities: `Probabilities` (C, h, w) of the pixels that the windows were cut from.
        height, width: of the upright image.
        preprocess: of the model, with the percentiles of the request.
        threshold: of the mask.
        full: the outputs need the probabilities at the size of the image.
        image: the decoded image, if an output needs it.
        pages, pixel_size: of the file, as in `ImageHeader`.
    """

    probabilities: StoredArray
    height: int
    width: int
    preprocess: PreprocessConfig
    threshold: float
    full: bool
    image: StoredArray | None = None
    pages: int = 1
    pixel_size: float | None = None

    def decide(self, options: Options) -> Decision:
        """Decide on the mask, for the outputs of `options`."""
        probabilities, size = to_floats(self.probabilities.load()), (self.height, self.width)
        if self.full:  # resized once, for the mask as well
            probabilities = resize_to_image(probabilities, *size)
        mask, confidence = mask_and_confidence(
            probabilities, *size, self.preprocess, self.threshold
        )
        image = None if self.image is None else self.image.load()
        return Decision(
            probabilities,
            mask,
            confidence,
            self.threshold,
            self.preprocess,
            options,
            image,
            options.pixel_size or self.pixel_size,
        )


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file at the beginning of a block."""

    block: SharedBlock
    size: int

    def read(self) -> bytes:
        """Copy the bytes."""
        return self.block.read(self.size)


def inspect_image(
    data: EncodedImage, max_pixels: int, page: int | None = None, channel: int | None = None
) -> dict[str, Any]:
    """Read the header of an encoded image, and return its fields.

    Raises:
        ImageError: not an image that is accepted, or not such a page or channel.
        ImageTooLarge: more than `max_pixels`.
    """
    return vars(inspect(data.read(), max_pixels=max_pixels, page=page, channel=channel))


def count_image_pages(data: EncodedImage, max_pixels: int) -> int:
    """Count the pages of an encoded image.

    Raises:
        ImageError: a damaged TIFF.
        ImageTooLarge: its pages have more than `max_pixels` together.
    """
    return count_pages(data.read(), max_pixels=max_pixels)


def inspect_and_decode(
    data: EncodedImage,
    max_pixels: int,
    small: int,
    page: int | None,
    channel: int | None,
    preprocess: PreprocessConfig,
    pixels: SharedBlock,
    image: SharedBlock | None,
) -> dict[str, Any]:
    """Read the header of an encoded image, and decode and prepare the image if it is small.

    For a small image a second call would cost about as much as decoding.

    Args:
        small: most pixels of an image that is decoded.
        page, channel: see `inspect_image`.

    Returns:
        `header`, its fields; for a small image also what `decode_and_prepare` returns.

    Raises:
        ImageError, ImageTooLarge: see `inspect_image` and `decode_and_prepare`.
    """
    content = data.read()
    header, reader = open_and_inspect(content, max_pixels=max_pixels, page=page, channel=channel)
    fields = {"header": vars(header)}
    if header.height * header.width > small:
        return fields
    return fields | _decode_and_prepare(content, header, preprocess, pixels, image, reader)


def decode_and_prepare(
    data: EncodedImage,
    header: dict[str, Any],
    preprocess: PreprocessConfig,
    pixels: SharedBlock,
    image: SharedBlock | None,
) -> dict[str, Any]:
    """Decode an image, and prepare it for cutting into windows.

    Args:
        header: from `inspect_image`.
        pixels: receives the prepared pixels, (h, w, C) uint8.
        image: receives the decoded image, if an output needs it.

    Returns:
        The shape of the prepared pixels, and shape and type of the decoded image.

    Raises:
        ImageError: truncated or damaged.
    """
    return _decode_and_prepare(data.read(), ImageHeader(**header), preprocess, pixels, image)


def _decode_and_prepare(
    content: bytes,
    header: ImageHeader,
    preprocess: PreprocessConfig,
    pixels: SharedBlock,
    image: SharedBlock | None,
    reader: ImageReader | None = None,
) -> dict[str, Any]:
    # An image that is resized anyway may be decoded at a fraction of its size.
    smaller = preprocess.mode == "resize" and image is None
    size = preprocess.resized if smaller else None
    decoded = decode(content, header, at_least=size, reader=reader)
    result: dict[str, Any] = {"pixels": _prepare_to(pixels, decoded, preprocess)}
    if image is not None:
        stored = image.store(decoded)
        result["image"] = (stored.shape, stored.dtype)
    return result


def prepare_image(
    image: StoredArray, preprocess: PreprocessConfig, pixels: SharedBlock
) -> dict[str, Any]:
    """Prepare an image that was sent as pixels. See `decode_and_prepare`."""
    return {"pixels": _prepare_to(pixels, image.load(), preprocess)}


def _prepare_to(block: SharedBlock, image: AnyArray, preprocess: PreprocessConfig) -> Any:
    """Store the prepared pixels, and return their shape. Grey ones keep a single channel."""
    prepared = prepare(image, preprocess)
    if prepared.strides[2] == 0:
        prepared = prepared[:, :, :1]
    return block.store(prepared).shape


def render_outputs(stitched: Stitched, options: Options, outputs: SharedBlock) -> dict[str, Any]:
    """Decide on the mask and render the outputs.

    Args:
        outputs: receives the files, one after the other.

    Returns:
        The fields of a `Segmentation`; for `rendered` media type, suffix and size of each output.

    Raises:
        InvalidRequest: the file format cannot hold an output.
    """
    start = time.perf_counter()
    decision = stitched.decide(options)
    decided = time.perf_counter()
    segmentation = dataclasses.replace(render(decision), pages=stitched.pages)
    rendered, end = [], 0
    for each in segmentation.rendered.values():
        end = outputs.write(each.content, end)
        rendered.append((each.media_type, each.suffix, len(each.content)))
    seconds = {"stitch": decided - start, "encode": time.perf_counter() - decided}
    return vars(segmentation) | {"rendered": rendered, "seconds": seconds}


def join_pages(pages: SharedBlock, sizes: list[int], stack: SharedBlock) -> int:
    """Join TIFFs of one page, as `render_outputs` makes them.

    Args:
        pages: the files, one after the other, and
        sizes: of each, in bytes.
        stack: receives the TIFF with all pages.

    Returns:
        Its size in bytes.
    """
    ends = list(itertools.accumulate(sizes))
    files = [pages.read(size, end - size) for size, end in zip(sizes, ends, strict=True)]
    return stack.write(stack_tiff(files))


def write_mask(
    stitched: Stitched, mask: SharedBlock, probabilities: SharedBlock | None
) -> dict[str, Any]:
    """Decide on the mask and store it, (H, W) uint8.

    Args:
        probabilities: receives the probabilities at the size of the image.

    Returns:
        The seconds that it took.
    """
    start = time.perf_counter()
    decision = stitched.decide(Options())
    mask.store(decision.whole_mask)
    if probabilities is not None:
        probabilities.store(decision.probabilities)
    return {"seconds": {"stitch": time.perf_counter() - start}}
