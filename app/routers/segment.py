"""POST /segment: one image or several in, masks out."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import zipfile
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from app.errors import InvalidRequest, ServiceError, Unavailable
from app.handlers import describe
from app.registry import ServedModel
from app.routers.auth import authorized
from app.schemas import PROBLEM, SegmentQuery, segment_query
from app.segmenter import Options, Output, Segmentation
from app.service import Service
from app.uploads import Upload, read_uploads

T = TypeVar("T")

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

    Send `multipart/form-data` with one or more `file` parts, or the raw image as the body.
    """
    service: Service = request.app.state.service
    if cause := service.not_ready():
        raise Unavailable(cause, retry_after=2)
    seconds = _timeout(request, service.settings.request_timeout_s)
    with service.registry.lease(query.model) as model:
        uploads = await read_uploads(request, int(service.settings.max_upload_mb * 1e6))
        deadline = asyncio.get_running_loop().time() + seconds
        options = Options(query.output, query.threshold)
        results = await _unless_client_leaves(
            request, _segment_all(service, model, uploads, options, deadline)
        )
    if len(uploads) == 1 and isinstance(results[0], ServiceError):
        raise results[0]
    if query.output is Output.POLYGONS or _wants_json(request):
        document = _statistics(model, uploads, results)
        return JSONResponse(document, headers=_model_headers(model))
    if len(uploads) == 1:
        (result,) = results
        assert isinstance(result, Segmentation)
        return Response(result.png, media_type="image/png", headers=_headers(model, result))
    return Response(
        await asyncio.to_thread(_zip, uploads, results),
        media_type="application/zip",
        headers=_model_headers(model),
    )


async def _segment_all(
    service: Service,
    model: ServedModel,
    uploads: list[Upload],
    options: Options,
    deadline: float,
) -> list[Segmentation | ServiceError]:
    """One image after the other, so that a request with many takes turns with everybody's."""
    results: list[Segmentation | ServiceError] = []
    for upload in uploads:
        try:
            results.append(await service.segmenter.segment(model, upload.data, options, deadline))
        except ServiceError as error:
            results.append(error)
    return results


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client hangs up.

    Raises:
        ClientDisconnect: it did; there is nobody left to answer.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _timeout(request: Request, longest: float) -> float:
    given = request.headers.get("x-request-timeout")
    if given is None:
        return longest
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequest(f"X-Request-Timeout is a number of seconds above 0, not {given!r}")
    return min(seconds, longest)


def _wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "").lower()


def _model_headers(model: ServedModel) -> dict[str, str]:
    choice = model.choices[0]
    return {"X-Model": model.id, "X-Engine": f"{choice.device}/{choice.precision}"}


def _headers(model: ServedModel, result: Segmentation) -> dict[str, str]:
    headers = _model_headers(model) | {
        "X-Mask-Coverage": f"{result.coverage:.6f}",
        "X-Mask-Confidence": f"{result.confidence:.6f}",
        "Server-Timing": ", ".join(
            f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in result.seconds.items()
        ),
    }
    if result.objects is not None:
        headers["X-Mask-Objects"] = str(result.objects)
    return headers


def _statistics(
    model: ServedModel, uploads: list[Upload], results: list[Segmentation | ServiceError]
) -> dict[str, Any]:
    return {
        **{key.lower()[2:]: value for key, value in _model_headers(model).items()},
        "images": [
            {"name": name} | _statistics_of(result)
            for name, result in zip(_names(uploads), results, strict=True)
        ],
    }


def _statistics_of(result: Segmentation | ServiceError) -> dict[str, Any]:
    if isinstance(result, ServiceError):
        return {"error": _error(result)}
    statistics: dict[str, Any] = {
        "width": result.width,
        "height": result.height,
        "coverage": result.coverage,
        "confidence": result.confidence,
        "milliseconds": {
            stage: round(seconds * 1000, 1) for stage, seconds in result.seconds.items()
        },
    }
    if result.polygons is not None:
        statistics["polygons"] = result.polygons
    else:
        statistics["mask"] = base64.b64encode(result.png).decode()
    if result.objects is not None:
        statistics["objects"] = result.objects
    return statistics


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
