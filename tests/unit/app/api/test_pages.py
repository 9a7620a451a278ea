"""All pages of a file: the images of a request, and the stacks of their TIFFs."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from typing import Any, cast

import numpy as np
import pytest
import tifffile

from app.api.answers import Result
from app.api.pages import MAX_IMAGES, ImageRequest, join_stacks, list_images
from app.api.uploads import Upload
from app.errors import CorruptImage, InvalidRequest
from app.inference.outputs import Options, Output, Rendered, Segmentation
from app.inference.segmenter import Segmenter
from tests.conftest import tiff

OPTIONS = Options(threshold=0.5)


class PageCounter:
    """Takes the content of a file for the number of its pages."""

    async def count_pages(self, data: bytes) -> int:
        try:
            return int(data)
        except ValueError:
            raise CorruptImage("not a number") from None


def listed(*files: tuple[str, bytes], all_pages: bool = True) -> list[ImageRequest]:
    uploads = [Upload(name, data) for name, data in files]
    segmenter = cast(Segmenter, PageCounter())
    return asyncio.run(list_images(segmenter, uploads, OPTIONS, all_pages=all_pages))


def test_each_file_is_one_image_unless_all_pages_are_asked_for() -> None:
    images = listed(("a", b"3"), ("", b"no number"), all_pages=False)
    assert [(image.name, image.page, image.options) for image in images] == [
        ("a", None, OPTIONS),
        ("image", None, OPTIONS),
    ]


def test_each_page_is_an_image() -> None:
    images = listed(("a", b"3"), ("b", b"1"), ("c", b"damaged"))
    assert [(image.name, image.page) for image in images] == [
        *(("a-page1", 1), ("a-page2", 2), ("a-page3", 3)),
        *(("b", 1), ("c", None)),
    ]
    assert [image.options.page for image in images] == [1, 2, 3, 1, None]
    assert images[2].options == dataclasses.replace(OPTIONS, page=3)
    assert isinstance(images[-1].error, CorruptImage)


def test_pages_are_bounded() -> None:
    assert len(listed(("a", b"%d" % MAX_IMAGES))) == MAX_IMAGES
    with pytest.raises(InvalidRequest, match="'b' has 2 pages"):
        listed(("a", b"%d" % (MAX_IMAGES - 1)), ("b", b"2"))


CSV = Rendered(b"id\n", "text/csv", ".csv")


def mask(value: int, height: int = 20) -> Rendered:
    pixels = np.full((height, 30), value, np.uint8)
    return Rendered(tiff(pixels, compression="zlib", rows=7), "image/tiff", ".tiff")


def page_result(coverage: float, height: int = 20, **rendered: Rendered) -> Segmentation:
    outputs = {Output(name): each for name, each in rendered.items()}
    return Segmentation(outputs, 30, height, coverage, 0.9, 5, 2, {"infer": 0.25})


def joined(images: list[ImageRequest], results: list[Result]) -> list[tuple[str, Any, Any]]:
    return [
        (image.name, image.page, result)
        for image, result in zip(*join_stacks(images, results), strict=True)
    ]


def read_stack(data: bytes) -> list[int]:
    """The value of each page, whose pixels are all equal."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = [page.asarray() for page in file.pages]
    assert all(page.min() == page.max() for page in pages)
    return [int(page[0, 0]) for page in pages]


def test_tiffs_of_the_pages_become_one() -> None:
    images = listed(("a", b"2"), ("b", b"1"))
    results: list[Result] = [
        page_result(0.1, mask=mask(1)),
        page_result(0.4, mask=mask(2, height=40), height=40),
        page_result(0.5, mask=mask(3)),
    ]
    (first, second) = joined(images, results)
    assert first[:2] == ("a", None)
    stack = first[2]
    assert read_stack(stack.rendered[Output.MASK].content) == [1, 2]
    assert stack.coverage == pytest.approx(0.3)  # of the pixels of both
    assert stack.objects == 10
    assert stack.seconds == {"infer": 0.5}
    assert second == ("b", 1, results[2])


def test_other_outputs_stay_one_per_page() -> None:
    results: list[Result] = [
        page_result(0.1, mask=mask(1), measurements=CSV),
        page_result(0.4, mask=mask(2), measurements=CSV),
    ]
    stack, *pages = joined(listed(("a", b"2")), results)
    assert (stack[0], list(stack[2].rendered)) == ("a", [Output.MASK])
    assert [(name, page) for name, page, _ in pages] == [("a-page1", 1), ("a-page2", 2)]
    assert all(result.rendered == {Output.MEASUREMENTS: CSV} for _, _, result in pages)
    only = [page_result(0.1, measurements=CSV), page_result(0.4, measurements=CSV)]
    assert [name for name, _, _ in joined(listed(("a", b"2")), [*only])] == ["a-page1", "a-page2"]


def test_stack_without_one_of_its_pages_is_an_error() -> None:
    results: list[Result] = [page_result(0.1, mask=mask(1)), CorruptImage("damaged")]
    ((name, page, error),) = joined(listed(("a", b"2")), results)
    assert (name, page) == ("a", None)
    assert isinstance(error, CorruptImage)
    assert str(error) == "page 2: damaged"
