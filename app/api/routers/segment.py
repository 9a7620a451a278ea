"""POST /segment: one image or several in, masks out."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import zipfile
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from app.api.dependencies import (
    authorized,
    cancel_on_disconnect,
    deadline_of,
    model_headers,
    read_body_before,
)
from app.api.problems import describe
from app.api.schemas import PROBLEM, SegmentQuery, segment_query
from app.api.uploads import Upload, read_uploads
from app.errors import ServiceError
from app.inference.budget import Allocation
from app.inference.outputs import Options, Output, Segmentation
from app.inference.registry import ServedModel
from app.inference.service import Service

router = APIRouter(tags=["segmentation"], dependencies=[Depends(authorized)])

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
    summary="Segment an image",
    response_class=Response,
    responses={
        200: {
            "description": "One image: a PNG. Several: a zip of PNGs and errors.json.",
            "content": {"image/png": {}, "application/zip": {}, "application/json": {}},
        },
        **PROBLEM,
    },
    openapi_extra=_BODY,
)
async def segment(
    request: Request, query: Annotated[SegmentQuery, Depends(segment_query)]
) -> Response:
    """Bytes of an image in, a PNG mask of exactly its upright size out.

    Send `multipart/form-data` with one or more `file` parts, or the raw image as the body. Either
    may be packed as `Content-Encoding: gzip` or `deflate`.
    """
    service: Service = request.app.state.service
    share: Allocation = request.state.share
    deadline = deadline_of(request)
    as_json = query.output is Output.POLYGONS or _wants_json(request)
    service.check_ready()  # before the image is on its way, and again when it is here
    with service.registry.lease(query.model) as model:
        options = Options(query.output, query.threshold)
        service.segmenter.check(model, options)
        service.segmenter.precheck_admission(model, deadline)
        max_bytes = int(service.settings.max_upload_mb * 1e6)
        uploads = await read_body_before(request, deadline, read_uploads(request, max_bytes, share))
        with service.track_request():
            joined = as_json or len(uploads) > 1
            results = await cancel_on_disconnect(
                request, _segment_all(service, model, uploads, options, deadline, share, joined)
            )
            single = results[0] if len(uploads) == 1 else None
            if isinstance(single, ServiceError):
                raise single
            headers = _headers(model, single)
            if single is not None and not as_json:
                return Response(single.png, media_type="image/png", headers=headers)
            if as_json:  # joining takes its time: on another thread
                content = await asyncio.to_thread(_document, model, uploads, results)
                return Response(content, media_type="application/json", headers=headers)
            content = await asyncio.to_thread(_zip, uploads, results)
            return Response(content, media_type="application/zip", headers=headers)


async def _segment_all(
    service: Service,
    model: ServedModel,
    uploads: list[Upload],
    options: Options,
    deadline: float,
    share: Allocation,
    joined: bool,
) -> list[Segmentation | ServiceError]:
    """One image after the other, so that a request with many takes turns with everybody's.

    Args:
        joined: afterwards, which copies. Room for that is taken with each image: once all are done,
            a lack of it would cost those that have theirs, too.
    """
    results: list[Segmentation | ServiceError] = []
    for upload in uploads:
        try:
            result = await service.segmenter.segment(model, upload.data, options, deadline)
            share.take(2 * result.size if joined else result.size)
            results.append(result)
        except ServiceError as error:
            results.append(error)
    return results


def _wants_json(request: Request) -> bool:
    """Whether the client prefers JSON to an image: it names JSON, and nothing it likes better.

    A client that names both alike has the image; one that takes anything besides has JSON.
    """
    likes = {"application/json": 0.0, "image": 0.0, "anything": 0.0}
    for each in ",".join(request.headers.getlist("accept")).lower().split(","):
        kind, *parameters = (part.strip() for part in each.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        if kind in ("image/png", "image/*", "application/zip"):
            kind = "image"
        elif kind == "*/*":
            kind = "anything"
        if kind in likes and re.fullmatch(r"[01](\.\d*)?", quality):
            likes[kind] = max(likes[kind], float(quality))
    json_ = likes["application/json"]
    return json_ > likes["image"] and json_ >= likes["anything"]


def _headers(model: ServedModel, result: Segmentation | None) -> dict[str, str]:
    """Of the model, and of the mask if there is one alone."""
    if result is None:
        return model_headers(model)
    headers = model_headers(model) | {
        "X-Mask-Coverage": f"{result.coverage:.6f}",
        "X-Mask-Confidence": f"{result.confidence:.6f}",
        "Server-Timing": ", ".join(
            f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in result.seconds.items()
        ),
    }
    if result.objects is not None:
        headers["X-Mask-Objects"] = str(result.objects)
    return headers


def _document(
    model: ServedModel, uploads: list[Upload], results: list[Segmentation | ServiceError]
) -> bytes:
    """JSON: the model, and for each image its statistics with its mask or its outlines."""
    head = _json({key.lower()[2:]: value for key, value in model_headers(model).items()})
    images = ",".join(
        _image_json(name, result) for name, result in zip(_names(uploads), results, strict=True)
    )
    return f'{head[:-1]},"images":[{images}]}}'.encode()


def _image_json(name: str, result: Segmentation | ServiceError) -> str:
    if isinstance(result, ServiceError):
        return _json({"name": name, "error": _error(result)})
    statistics: dict[str, Any] = {
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
        statistics["objects"] = result.objects
    if result.polygons is None:
        return _json(statistics | {"mask": base64.b64encode(result.png).decode()})
    return f'{_json(statistics)[:-1]},"polygons":{result.polygons}}}'


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _zip(uploads: list[Upload], results: list[Segmentation | ServiceError]) -> bytes:
    """Every good mask as `<name>.png`, and `errors.json` with the others' names and reasons."""
    errors = {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for name, result in zip(_names(uploads), results, strict=True):
            if isinstance(result, ServiceError):
                errors[name] = _error(result)
            else:
                archive.writestr(f"{name}.png", result.png)
        if errors:
            archive.writestr("errors.json", json.dumps(errors, indent=2))
    return buffer.getvalue()


def _error(error: ServiceError) -> dict[str, Any]:
    status, detail = describe(error)
    return {"status": status, "detail": detail}


def _names(uploads: list[Upload]) -> list[str]:
    """One name each: equal ones get a number, so that no mask overwrites another."""
    names: list[str] = []
    taken: set[str] = set()
    for upload in uploads:
        stem = name = upload.name or "image"
        number = 1
        while name.lower() in taken or name.lower() == "errors":
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names
