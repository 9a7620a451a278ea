"""Files of several pages: one image per page in, and stacks of all pages out. Knows no HTTP."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from app.api.answers import Result
from app.api.uploads import Upload
from app.batching.deadline import Deadline
from app.errors import InvalidRequest, ServiceError
from app.inference.outputs import Options, Output, Rendered, Segmentation
from app.inference.segmenter import Segmenter

MAX_IMAGES = 10_000
"""Images of one request, where all pages of its files are segmented."""

_TIFF = ".tiff"


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """One image to segment.

    Attributes:
        name: of its file, and the number of its page if the file has several.
        data: of its file.
        options: what is asked of it.
        upload: index of its file in the request.
        page: from 0, if the client asked for all pages.
        error: why it cannot be segmented, if that is known already.
    """

    name: str
    data: bytes
    options: Options
    upload: int
    page: int | None = None
    error: ServiceError | None = None


async def list_images(
    segmenter: Segmenter, uploads: Sequence[Upload], options: Options, *, all_pages: bool
) -> list[ImageRequest]:
    """The images of a request: one per file, or one per page.

    Raises:
        InvalidRequest: more than `MAX_IMAGES` pages.
    """
    images: list[ImageRequest] = []
    for index, upload in enumerate(uploads):
        name = upload.name or "image"
        of_file = options
        if options.needs_name:
            of_file = dataclasses.replace(options, name=upload.file_name or name)
        whole = ImageRequest(name, upload.data, of_file, index)
        if not all_pages:
            images.append(whole)
            continue
        try:
            pages = await segmenter.reader.count_pages(upload.data)
        except ServiceError as error:
            images.append(dataclasses.replace(whole, error=error))
            continue
        if len(images) + pages > MAX_IMAGES:
            raise InvalidRequest(
                f"{name!r} has {pages} pages; page=all is for up to {MAX_IMAGES} in a "
                "request; choose page=N"
            )
        images += [_choose_page(whole, page, pages) for page in range(pages)]
    return images


def _choose_page(whole: ImageRequest, page: int, pages: int) -> ImageRequest:
    return dataclasses.replace(
        whole,
        name=whole.name if pages == 1 else f"{whole.name}-page{page}",
        options=dataclasses.replace(whole.options, page=page),
        page=page,
    )


async def join_stacks(
    segmenter: Segmenter,
    images: Sequence[ImageRequest],
    results: Sequence[Result],
    deadline: Deadline,
) -> tuple[list[ImageRequest], list[Result]]:
    """Join the TIFFs of each file's pages into one.

    Outputs in other formats stay one per page. If a page failed, the stack is left out: the error
    of the page takes its place.
    """
    joined: list[tuple[ImageRequest, Result]] = []
    pairs = zip(images, results, strict=True)
    for _, group in itertools.groupby(pairs, lambda pair: pair[0].upload):
        pages = list(group)
        joined += pages if len(pages) == 1 else await _join_pages(segmenter, pages, deadline)
    return [image for image, _ in joined], [result for _, result in joined]


async def _join_pages(
    segmenter: Segmenter, pages: list[tuple[ImageRequest, Result]], deadline: Deadline
) -> list[tuple[ImageRequest, Result]]:
    first = pages[0][0]
    whole = dataclasses.replace(first, name=first.name.removesuffix("-page0"), page=None)
    done: list[Segmentation] = []
    for image, result in pages:
        if isinstance(result, ServiceError):
            return [(whole, type(result)(f"page {image.page}: {result}"))]
        done.append(result)
    stacked = [output for output, each in done[0].rendered.items() if each.suffix == _TIFF]
    if not stacked:
        return pages
    try:
        stacks = {output: await _stack(segmenter, done, output, deadline) for output in stacked}
    except ServiceError as error:
        return [(whole, error)]
    joined: list[tuple[ImageRequest, Result]] = [(whole, _summarize(done, stacks))]
    if len(stacked) == len(done[0].rendered):
        return joined
    for (image, _), result in zip(pages, done, strict=True):
        others = {key: each for key, each in result.rendered.items() if key not in stacked}
        joined.append((image, dataclasses.replace(result, rendered=others)))
    return joined


async def _stack(
    segmenter: Segmenter, pages: Sequence[Segmentation], output: Output, deadline: Deadline
) -> Rendered:
    files = [page.rendered[output] for page in pages]
    pixels = sum(page.width * page.height for page in pages)
    content = await segmenter.stack_tiffs([file.content for file in files], pixels, deadline)
    return dataclasses.replace(files[0], content=content)


def _summarize(pages: list[Segmentation], stacks: Mapping[Output, Rendered]) -> Segmentation:
    """The stacks, with the statistics of all pages together."""
    pixels = [page.width * page.height for page in pages]

    def mean(values: Sequence[float]) -> float:
        weighted = zip(values, pixels, strict=True)
        return sum(value * count for value, count in weighted) / sum(pixels)

    objects = [page.objects for page in pages if page.objects is not None]
    stages = pages[0].seconds.keys()
    return dataclasses.replace(
        pages[0],
        rendered=stacks,
        coverage=mean([page.coverage for page in pages]),
        confidence=mean([page.confidence for page in pages]),
        objects=sum(objects) if objects else None,
        seconds={stage: sum(page.seconds.get(stage, 0.0) for page in pages) for stage in stages},
    )
