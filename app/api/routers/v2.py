"""The Open Inference Protocol over HTTP, as clients of Triton, KServe and others speak it.

Sources: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and
.../v2-protocol/binary-tensor-data-extension.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from app.api.dependencies import (
    authorized,
    cancel_on_disconnect,
    deadline_of,
    model_headers,
    read_body_before,
)
from app.api.schemas import NO, PROBLEM, Timeout
from app.api.uploads import read_body
from app.api.v2 import codec as tensors
from app.api.v2 import model as inference
from app.errors import ImageError, ImageTooLarge, InvalidRequest, UnknownModel
from app.inference.budget import Allocation
from app.inference.registry import ServedModel
from app.inference.segmenter import Prediction
from app.inference.service import Service

NAME = "unet-server"
JSON_LENGTH = "Inference-Header-Content-Length"
"""Header, of requests and of answers: where the JSON ends and binary data begins."""

router = APIRouter(prefix="/v2", tags=["inference"], dependencies=[Depends(authorized)])
health = APIRouter(prefix="/v2/health", tags=["probes"])

try:
    _version = version_of(NAME)
except PackageNotFoundError:  # run from a folder that was never installed
    _version = "unknown"

_PLACES = {
    "model": "/models/{name}",
    "version": "/models/{name}/versions/{version}",
}
_OF_A_MODEL: dict[int | str, dict[str, Any]] = {
    status: PROBLEM[status] for status in (401, 404, 503)
}


def _answer(what: str, cause: str | None) -> JSONResponse:
    if cause is None:
        return JSONResponse({what: True})
    return JSONResponse({what: False, "error": cause}, 503, {"Retry-After": "2"})


@health.get("/live", summary="The same as /livez", response_description="Yes.", responses=NO)
async def live(request: Request) -> Response:
    """503 with the cause when the engine is hung or lost."""
    service: Service = request.app.state.service
    return _answer("live", service.liveness_error())


@health.get("/ready", summary="The same as /readyz", response_description="Yes.", responses=NO)
async def ready(request: Request) -> Response:
    """200 when requests should come here now."""
    service: Service = request.app.state.service
    return _answer("ready", service.readiness_error())


@router.get("", summary="The server, in the Open Inference Protocol", responses={401: PROBLEM[401]})
async def server() -> dict[str, Any]:
    """Its name, its version, and what it knows beyond the protocol itself."""
    return {"name": NAME, "version": _version, "extensions": ["binary_tensor_data"]}


@router.get(_PLACES["version"], include_in_schema=False)
@router.get(_PLACES["model"], summary="A model's tensors", responses=_OF_A_MODEL)
async def metadata(request: Request, name: str) -> dict[str, Any]:
    """Also below `/versions/{version}`: the first 12 hex digits of the weights' sha256."""
    with _leased(request, name) as model:
        return inference.describe(model)


@router.get(f"{_PLACES['version']}/ready", include_in_schema=False)
@router.get(f"{_PLACES['model']}/ready", summary="Is a model ready?", responses=_OF_A_MODEL)
async def model_ready(request: Request, name: str) -> dict[str, Any]:
    """200 when it is in service, proven and warm; 503 with the cause when it is not."""
    service: Service = request.app.state.service
    with _leased(request, name):
        service.check_ready()
        return {"name": name, "ready": True}


_BODY = {
    "parameters": [
        {
            "name": JSON_LENGTH,
            "in": "header",
            "schema": {"type": "integer"},
            "description": "where the JSON ends, if binary data follows it",
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object"},
                "example": {
                    "inputs": [
                        {
                            "name": inference.IMAGE,
                            "datatype": "BYTES",
                            "shape": [1],
                            "data": ["iVBORw0KGgo..."],
                        }
                    ],
                    "outputs": [{"name": inference.MASK}],
                },
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}


@router.post(f"{_PLACES['version']}/infer", include_in_schema=False)
@router.post(
    f"{_PLACES['model']}/infer",
    summary="Segment images, tensors in and out",
    response_class=Response,
    responses={
        200: {
            "description": "The outputs: in JSON, or behind it.",
            "content": {"application/json": {}, "application/octet-stream": {}},
        },
        **PROBLEM,
    },
    openapi_extra=_BODY,
)
async def infer(request: Request, name: str, _timeout: Timeout = None) -> Response:
    """One input, `image`: UINT8 of shape (N, H, W, C), or BYTES of shape (N), encoded images of one
    size (base64 in JSON). Outputs: `mask`, UINT8 (N, H, W), and `probabilities`, FP32
    (N, channels, H, W). Parameters: `threshold` (0..1), `timeout` (microseconds),
    `binary_data_output`.
    """
    service: Service = request.app.state.service
    share: Allocation = request.state.share
    started = asyncio.get_running_loop().time()
    deadline = deadline_of(request)
    json_length = _json_length(request)
    service.check_ready()  # before the images are on their way, and again when they are here
    with _leased(request, name) as model:
        service.segmenter.precheck_admission(model, deadline)
        max_bytes = int(service.settings.max_upload_mb * 1e6)
        body = await read_body_before(request, deadline, read_body(request, max_bytes, share))
        with service.track_request():
            with service.bytes.share() as parsed:
                takes = tensors.parsing_takes(body, json_length)
                _check_ever(service, share, takes, "the JSON", "send binary data")
                parsed.take(takes)
                asked = inference.read(
                    model, await asyncio.to_thread(tensors.parse, body, json_length)
                )
            del body  # the images hold what they need of it
            deadline = min(deadline, started + asked.seconds)
            predictions = await cancel_on_disconnect(
                request, _predict_all(service, model, asked, deadline, share)
            )
            content, length = await asyncio.to_thread(inference.write, model, asked, predictions)
    headers = model_headers(model)
    if length is None:
        return Response(content, media_type="application/json", headers=headers)
    headers[JSON_LENGTH] = str(length)
    return Response(content, media_type="application/octet-stream", headers=headers)


async def _predict_all(
    service: Service,
    model: ServedModel,
    asked: inference.Inference,
    deadline: float,
    share: Allocation,
) -> list[Prediction]:
    """One image after the other, so that a request with many takes turns with everybody's.

    Raises:
        ImageTooLarge: an answer that there would never be room for.
        QueueFull: there is none now.
        ServiceError: of the first image that fails; the others are of no use without it.
    """
    size = await inference.size(service.segmenter, asked)
    takes = asked.answer_takes(model, size)
    advice = "ask for fewer images or outputs, or for binary data"
    _check_ever(service, share, takes, "the answer", advice)
    share.take(takes)  # nothing is computed that could not be sent
    predictions = []
    for index, image in enumerate(asked.images):
        try:
            predictions.append(
                await service.segmenter.predict(
                    model,
                    image,
                    deadline,
                    threshold=asked.threshold,
                    probabilities=asked.wants_probabilities,
                )
            )
        except ImageError as error:
            raise inference.named(error, index, asked) from error
    return predictions


def _check_ever(service: Service, share: Allocation, takes: int, what: str, advice: str) -> None:
    """
    Raises:
        ImageTooLarge: there would be no room for it if nobody else were here: to come again later,
            as `QueueFull` says, would be of no use.
    """
    if share.amount + takes > service.bytes.limit:
        raise ImageTooLarge(
            f"{what} takes up to {takes / 1e6:.0f} MB of memory, and UNET_QUEUE_MB is "
            f"{service.bytes.limit / 1e6:g}; {advice}"
        )


@contextmanager
def _leased(request: Request, name: str) -> Iterator[ServedModel]:
    """The model of that name, if it is of the version in the path, where there is one.

    Raises:
        UnknownModel: no such model, or another version of it.
        Unavailable: it is there, but not (or not yet) fit to serve.
    """
    service: Service = request.app.state.service
    version = request.path_params.get("version")
    with service.registry.lease(name) as model:
        if version not in (None, inference.version(model)):
            raise UnknownModel(
                f"there is no version {version!r} of {name!r} here; there is "
                f"{inference.version(model)}"
            )
        yield model


def _json_length(request: Request) -> int | None:
    given = request.headers.get(JSON_LENGTH)
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", given):
        raise InvalidRequest(f"{JSON_LENGTH} is a number of bytes, not {given[:100]!r}")
    return int(given)
