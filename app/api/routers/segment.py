"""POST /segment: images in, masks or other outputs out."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import re
import zipfile
from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from app.api.dependencies import (
    DeadlineDep,
    ServiceDep,
    accept_request,
    model_headers,
    reject_repeated_params,
)
from app.api.json_text import encode_json
from app.api.problems import classify_error
from app.api.schemas import PROBLEM_RESPONSES, SegmentQuery
from app.api.uploads import Upload, check_not_empty, read_uploads
from app.batching.deadline import Deadline
from app.errors import ServiceError
from app.inference.budget import Allocation
from app.inference.outputs import Options, Output, Rendered, Segmentation
from app.inference.registry import ServedModel
from app.inference.segmenter import Segmenter
from app.inference.service import Service

Result = Segmentation | ServiceError
"""The outcome for one image."""

_COPIED = 2
"""Memory for an output that is copied into a document, in multiples of its size."""
_PARSED = 10
"""The same for polygons: the Python objects of their JSON take so much more than its text."""

router = APIRouter(tags=["segmentation"])

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
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


@router.post(
    "/segment",
    summary="Segment images",
    response_class=Response,
    responses={
        200: {
            "description": "For one image a PNG, for several a zip of PNGs and errors.json.",
            "content": {"image/png": {}, "application/zip": {}, "application/json": {}},
        },
        **PROBLEM_RESPONSES,
    },
    openapi_extra=_BODY,
    dependencies=[Depends(reject_repeated_params)],
)
async def segment(
    request: Request,
    service: ServiceDep,
    deadline: DeadlineDep,
    query: Annotated[SegmentQuery, Query()],
) -> Response:
    """POST an image, get a PNG mask of exactly its upright size.

    Send `multipart/form-data` with one or more parts `file`, or the raw image as the body. Either
    may be compressed, with `Content-Encoding: gzip` or `deflate`.
    """
    allocation: Allocation = request.state.allocation
    options = Options((query.output,), query.threshold)
    check = functools.partial(Segmenter.check, options=options)
    as_json = query.output is Output.POLYGONS or prefers_json(request.headers.getlist("accept"))
    async with accept_request(request, service, query.model, deadline, read_uploads, check) as (
        model,
        uploads,
    ):
        copied = as_json or len(uploads) > 1
        factor = _PARSED if query.output is Output.POLYGONS else _COPIED if copied else 1
        results = await _segment_uploads(
            service, model, uploads, options, deadline, allocation, factor
        )
        _log_images(request, results)
        single = results[0] if len(results) == 1 else None
        if isinstance(single, ServiceError):
            raise single
        headers = model_headers(model) | (_mask_headers(single) if single else {})
        if as_json:
            content = await asyncio.to_thread(_write_json, model, uploads, results)
            return Response(content, media_type="application/json", headers=headers)
        if single:
            rendered = _only_output(single)
            return Response(rendered.content, media_type=rendered.media_type, headers=headers)
        content = await asyncio.to_thread(_write_zip, uploads, results)
        return Response(content, media_type="application/zip", headers=headers)


async def _segment_uploads(
    service: Service,
    model: ServedModel,
    uploads: list[Upload],
    options: Options,
    deadline: Deadline,
    allocation: Allocation,
    factor: int,
) -> list[Result]:
    """Segment images concurrently. An error of one does not affect the others.

    Args:
        factor: the memory to allocate for each output, in multiples of its size. It includes what
            joining the outputs will need: if that were allocated at the end and were not available,
            the images that are done would be lost as well.
    """
    group = service.segmenter.group(model)

    async def segment_upload(upload: Upload) -> Result:
        try:
            deadline.check()
            check_not_empty(upload)
            result = await service.segmenter.segment(model, upload.data, options, deadline, group)
            allocation.grow(factor * result.size)
            return result
        except ServiceError as error:
            # A traceback refers to its frames, and they to the error. Only the garbage collector
            # would free them, and it stops all threads.
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)

    return await group.run(uploads, segment_upload)


def prefers_json(accept: list[str]) -> bool:
    """Whether a client prefers JSON to an image (RFC 9110, section 12.5.1).

    It does if it accepts JSON with a higher quality than images, and with at least that of `*/*`.

    Args:
        accept: the values of its Accept headers.
    """
    quality = {"application/json": 0.0, "image": 0.0, "*/*": 0.0}
    for item in ",".join(accept).lower().split(","):
        media_type, *parameters = (part.strip() for part in item.split(";"))
        given = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        if media_type in ("image/png", "image/*", "application/zip"):
            media_type = "image"
        if media_type in quality and re.fullmatch(r"[01](\.\d*)?", given):
            quality[media_type] = max(quality[media_type], float(given))
    json_quality = quality["application/json"]
    return json_quality > quality["image"] and json_quality >= quality["*/*"]


def _log_images(request: Request, results: list[Result]) -> None:
    fields = request.state.log_fields
    if len(results) > 1:
        fields["images"] = len(results)
    elif isinstance(results[0], Segmentation):
        fields["size"] = f"{results[0].width}x{results[0].height}"


def _mask_headers(result: Segmentation) -> dict[str, str]:
    """The headers that describe the mask of a single image."""
    headers = {
        "X-Mask-Coverage": f"{result.coverage:.6f}",
        "X-Mask-Confidence": f"{result.confidence:.6f}",
        "Server-Timing": ", ".join(
            f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in result.seconds.items()
        ),
    }
    if result.objects is not None:
        headers["X-Mask-Objects"] = str(result.objects)
    return headers


def _only_output(result: Segmentation) -> Rendered:
    (rendered,) = result.rendered.values()
    return rendered


def _write_json(model: ServedModel, uploads: list[Upload], results: list[Result]) -> bytes:
    """The model, and the statistics of each image with its mask or its polygons."""
    document: dict[str, Any] = {
        name.lower().removeprefix("x-"): value for name, value in model_headers(model).items()
    }
    document["images"] = [
        _describe_image(name, result)
        for name, result in zip(unique_names(uploads), results, strict=True)
    ]
    return encode_json(document)


def _describe_image(name: str, result: Result) -> dict[str, Any]:
    if isinstance(result, ServiceError):
        return {"name": name, "error": _describe_failure(result)}
    described: dict[str, Any] = {
        "name": name,
        "width": result.width,
        "height": result.height,
        "coverage": result.coverage,
        "confidence": result.confidence,
        "milliseconds": {
            stage: round(seconds * 1000, 1) for stage, seconds in result.seconds.items()
        },
    }
    if result.objects is not None:
        described["objects"] = result.objects
    rendered = _only_output(result)
    if Output.POLYGONS in result.rendered:
        return described | {"polygons": json.loads(rendered.content)}
    return described | {"mask": base64.b64encode(rendered.content).decode()}


def _write_zip(uploads: list[Upload], results: list[Result]) -> bytes:
    """Each output as `<name>.png`, and `errors.json` with the images that failed."""
    failures = {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed
        for name, result in zip(unique_names(uploads), results, strict=True):
            if isinstance(result, ServiceError):
                failures[name] = _describe_failure(result)
            else:
                archive.writestr(f"{name}.png", _only_output(result).content)
        if failures:
            archive.writestr("errors.json", json.dumps(failures, indent=2))
    return buffer.getvalue()


def _describe_failure(error: ServiceError) -> dict[str, Any]:
    status, detail = classify_error(error)
    return {"status": status, "detail": detail}


def unique_names(uploads: list[Upload]) -> list[str]:
    """One name per upload; equal names get a number, so that no output overwrites another."""
    names: list[str] = []
    used = {"errors"}  # errors.json
    numbers: Counter[str] = Counter()  # the last one that each name was given
    for upload in uploads:
        stem = name = upload.name or "image"
        while name.lower() in used:
            numbers[stem.lower()] += 1
            name = f"{stem}-{numbers[stem.lower()] + 1}"
        used.add(name.lower())
        names.append(name)
    return names
