"""POST /segment: images in, masks or other outputs out."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.answers import (
    COPIES_IN_JSON,
    COPIES_IN_ZIP,
    JSON,
    ZIP,
    Answer,
    Result,
    mask_headers,
    only_output,
    prefers_json,
    unique_names,
    write_json,
    write_zip,
)
from app.api.dependencies import accept_request, find_service, model_headers
from app.api.pages import ImageRequest, join_stacks, list_images
from app.api.parameters import describe_parameters, read_deadline, read_query
from app.api.schemas import ALL_PAGES, PROBLEM_RESPONSES, SegmentQuery
from app.api.uploads import Upload, check_upload, read_uploads
from app.batching.deadline import Deadline
from app.errors import ServiceError
from app.inference.budget import Allocation
from app.inference.outputs import FileFormat, Options, Segmentation
from app.inference.registry import ServedModel
from app.inference.segmenter import Segmenter
from app.inference.service import Service

router = APIRouter(tags=["segmentation"])

_read_files = functools.partial(read_uploads, parameters=SegmentQuery.model_fields)

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            },
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
        },
    }
}
_CONTENT: dict[str, Any] = {
    media_type: {}
    for media_type in (
        *("image/png", "image/tiff", "image/webp", "application/geo+json", "text/csv"),
        *(ZIP, JSON),
    )
}


@router.post(
    "/segment",
    summary="Segment images",
    response_class=Response,
    responses={
        200: {
            "description": "For one output of one image that output, otherwise a zip of all and "
            "errors.json.",
            "content": _CONTENT,
        },
        **PROBLEM_RESPONSES,
    },
    openapi_extra=_BODY | {"parameters": describe_parameters(SegmentQuery)},
)
async def segment(request: Request) -> Response:
    """POST an image, get a PNG mask of exactly its upright size.

    Send `multipart/form-data` with one or more parts `file`, or the raw image as the body. Either
    may be compressed, with `Content-Encoding: gzip` or `deflate`.
    """
    service = find_service(request)
    deadline = read_deadline(request, service.settings)
    query = read_query(request, SegmentQuery)
    options = query.options
    as_json = prefers_json(request.headers.getlist("accept"))
    check = functools.partial(Segmenter.check, options=options)
    async with accept_request(request, service, query.model, deadline, _read_files, check) as (
        model,
        uploads,
    ):
        images = await list_images(
            service.segmenter, uploads, options, all_pages=query.page == ALL_PAGES
        )
        stacked = query.page == ALL_PAGES and options.format is FileFormat.TIFF
        copies = _count_copies(images, options, as_json=as_json, stacked=stacked)
        results = await _segment_images(
            service, model, uploads, images, deadline, request.state.allocation, copies
        )
        if stacked:
            images, results = await join_stacks(service.segmenter, images, results, deadline)
        names = unique_names(image.name for image in images)
        answers = [
            Answer(name, result, image.page)
            for name, image, result in zip(names, images, results, strict=True)
        ]
        _log_images(request, answers)
        return await _respond(model, answers, as_json=as_json)


async def _respond(model: ServedModel, answers: Sequence[Answer], *, as_json: bool) -> Response:
    """The response with these answers.

    Raises:
        ServiceError: there is one image, and it failed.
    """
    headers = model_headers(model)
    if len(answers) == 1:
        (answer,) = answers
        if isinstance(answer.result, ServiceError):
            raise answer.result
        headers |= mask_headers(answer.result)
    if as_json:
        named = model_headers(model).items()
        head = {name.lower().removeprefix("x-"): value for name, value in named}
        content = await asyncio.to_thread(write_json, head, answers)
        return Response(content, media_type=JSON, headers=headers)
    rendered = only_output(answers)
    if rendered is not None:
        return Response(rendered.content, headers=headers | {"Content-Type": rendered.media_type})
    content = await asyncio.to_thread(write_zip, answers)
    return Response(content, media_type=ZIP, headers=headers)


async def _segment_images(
    service: Service,
    model: ServedModel,
    uploads: Sequence[Upload],
    images: Sequence[ImageRequest],
    deadline: Deadline,
    allocation: Allocation,
    copies: int,
) -> list[Result]:
    """Segment images concurrently. An error of one does not affect the others.

    Args:
        copies: the memory to allocate for each output, in multiples of its size. It includes what
            joining the outputs will need: if that were allocated at the end and were not available,
            the images that are done would be lost as well.
    """
    group = service.segmenter.group(model)

    async def segment_image(image: ImageRequest) -> Result:
        try:
            deadline.check()
            check_upload(uploads[image.upload])
            if image.error is not None:
                raise image.error
            result = await service.segmenter.segment(
                model, image.data, image.options, deadline, group
            )
            allocation.grow(copies * result.size)
            return result
        except ServiceError as error:
            # A traceback refers to its frames, and they to the error. Only the garbage collector
            # would free them, and it stops all threads.
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)

    return await group.run(images, segment_image)


def _count_copies(
    images: Sequence[ImageRequest], options: Options, *, as_json: bool, stacked: bool
) -> int:
    """How many times its size each output takes in memory, with the response made from it."""
    if as_json:
        copies = COPIES_IN_JSON
    else:
        copies = COPIES_IN_ZIP if len(images) > 1 or len(options.outputs) > 1 else 1
    return copies + stacked


def _log_images(request: Request, answers: Sequence[Answer]) -> None:
    """Add the number of images, or the size of the only one, to the log line of a request."""
    fields = request.state.log_fields
    if len(answers) > 1:
        fields["images"] = len(answers)
    elif isinstance(answers[0].result, Segmentation):
        fields["size"] = f"{answers[0].result.width}x{answers[0].result.height}"
