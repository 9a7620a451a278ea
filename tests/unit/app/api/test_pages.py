"""All pages of a file: the images of a request, and the stacks of their TIFFs."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, cast

import pytest

from app.api.answers import Result
from app.api.pages import MAX_IMAGES, ImageRequest, join_stacks, list_images
from app.api.uploads import Upload
from app.batching.deadline import Deadline
from app.errors import CorruptImage, DeadlineExceeded, InvalidRequest
from app.inference.outputs import Options, Output, Rendered, Segmentation
from app.inference.segmenter import Segmenter

OPTIONS = Options((Output.COCO,), threshold=0.5)


class FakeReader:
    """Takes the content of a file for the number of its pages."""

    async def count_pages(self, data: bytes) -> int:
        try:
            return int(data)
        except ValueError:
            raise CorruptImage("not a number") from None


class FakeSegmenter:
    """Joins pages with a comma."""

    reader = FakeReader()

    async def stack_tiffs(self, files: list[bytes], pixels: int, deadline: Deadline) -> bytes:
        if pixels > 100_000:
            raise DeadlineExceeded("too late")
        return b",".join(files)


def listed(*files: tuple[str, bytes], all_pages: bool = True) -> list[ImageRequest]:
    uploads = [Upload(name, data) for name, data in files]
    segmenter = cast(Segmenter, FakeSegmenter())
    return asyncio.run(list_images(segmenter, uploads, OPTIONS, all_pages=all_pages))


def test_each_file_is_one_image_unless_all_pages_are_asked_for() -> None:
    images = listed(("a", b"3"), ("", b"no number"), all_pages=False)
    assert [(image.name, image.page, image.options) for image in images] == [
        ("a", None, dataclasses.replace(OPTIONS, name="a")),
        ("image", None, dataclasses.replace(OPTIONS, name="image")),
    ]


def test_options_are_the_same_for_all_files_if_no_output_states_their_names() -> None:
    uploads = [Upload("a", b"1", "a.png"), Upload("b", b"1", "b.png")]
    masks = Options()
    segmenter = cast(Segmenter, FakeSegmenter())
    images = asyncio.run(list_images(segmenter, uploads, masks, all_pages=False))
    assert [image.options for image in images] == [masks, masks]


def test_each_page_is_an_image() -> None:
    images = listed(("a", b"3"), ("b", b"1"), ("c", b"damaged"))
    assert [(image.name, image.page) for image in images] == [
        *(("a-page0", 0), ("a-page1", 1), ("a-page2", 2)),
        *(("b", 0), ("c", None)),
    ]
    assert [image.options.page for image in images] == [0, 1, 2, 0, None]
    assert images[2].options == dataclasses.replace(OPTIONS, name="a", page=2)
    assert isinstance(images[-1].error, CorruptImage)


def test_pages_are_bounded() -> None:
    assert len(listed(("a", b"%d" % MAX_IMAGES))) == MAX_IMAGES
    with pytest.raises(InvalidRequest, match="'b' has 2 pages"):
        listed(("a", b"%d" % (MAX_IMAGES - 1)), ("b", b"2"))


CSV = Rendered(b"id\n", "text/csv", ".csv")


def mask(name: bytes) -> Rendered:
    return Rendered(name, "image/tiff", ".tiff")


def page_result(coverage: float, height: int = 20, **rendered: Rendered) -> Segmentation:
    outputs = {Output(name): each for name, each in rendered.items()}
    return Segmentation(outputs, 30, height, coverage, 0.9, 5, 2, {"infer": 0.25})


def joined(images: list[ImageRequest], results: list[Result]) -> list[tuple[str, Any, Any]]:
    segmenter = cast(Segmenter, FakeSegmenter())
    found = asyncio.run(join_stacks(segmenter, images, results, Deadline.never()))
    return [(image.name, image.page, result) for image, result in zip(*found, strict=True)]


def test_tiffs_of_the_pages_become_one() -> None:
    images = listed(("a", b"2"), ("b", b"1"))
    results: list[Result] = [
        page_result(0.1, mask=mask(b"1")),
        page_result(0.4, mask=mask(b"2"), height=40),
        page_result(0.5, mask=mask(b"3")),
    ]
    (first, second) = joined(images, results)
    assert first[:2] == ("a", None)
    stack = first[2]
    assert stack.rendered == {Output.MASK: mask(b"1,2")}
    assert stack.coverage == pytest.approx(0.3)  # of the pixels of both
    assert stack.objects == 10
    assert stack.seconds == {"infer": 0.5}
    assert second == ("b", 0, results[2])


def test_other_outputs_stay_one_per_page() -> None:
    results: list[Result] = [
        page_result(0.1, mask=mask(b"1"), measurements=CSV),
        page_result(0.4, mask=mask(b"2"), measurements=CSV),
    ]
    stack, *pages = joined(listed(("a", b"2")), results)
    assert (stack[0], list(stack[2].rendered)) == ("a", [Output.MASK])
    assert [(name, page) for name, page, _ in pages] == [("a-page0", 0), ("a-page1", 1)]
    assert all(result.rendered == {Output.MEASUREMENTS: CSV} for _, _, result in pages)
    only = [page_result(0.1, measurements=CSV), page_result(0.4, measurements=CSV)]
    assert [name for name, _, _ in joined(listed(("a", b"2")), [*only])] == ["a-page0", "a-page1"]


def test_stack_without_one_of_its_pages_is_an_error() -> None:
    results: list[Result] = [page_result(0.1, mask=mask(b"1")), CorruptImage("damaged")]
    ((name, page, error),) = joined(listed(("a", b"2")), results)
    assert (name, page) == ("a", None)
    assert isinstance(error, CorruptImage)
    assert str(error) == "page 1: damaged"


def test_stack_that_cannot_be_made_is_an_error() -> None:
    results: list[Result] = [page_result(0.1, 2000, mask=mask(b"1"))] * 2
    ((name, _, error),) = joined(listed(("a", b"2")), results)
    assert name == "a"
    assert isinstance(error, DeadlineExceeded)
