"""The Open Inference Protocol over HTTP, as clients of Triton, KServe and others use it.

Sources: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and
.../v2-protocol/binary-tensor-data-extension.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response

from app.api.dependencies import ServiceDep, accept_request, find_service, model_headers
from app.api.parameters import TIMEOUT_PARAMETER, read_deadline
from app.api.schemas import PROBLEM_RESPONSES, UNAVAILABLE_RESPONSE
from app.api.uploads import read_body
from app.api.v2 import codec
from app.api.v2 import model as tensors
from app.batching.deadline import Deadline
from app.errors import ImageError, ImageTooLarge, RequestTooLarge, ResponseTooLarge, UnknownModel
from app.inference.budget import Allocation, Budget
from app.inference.registry import ModelEntry, ServedModel
from app.inference.segmenter import Prediction
from app.inference.service import Service

SERVER_NAME = "unet-server"
JSON_LENGTH = "Inference-Header-Content-Length"
"""Header of requests and responses: the length of the JSON, which binary data follows."""

router = APIRouter(prefix="/v2", tags=["inference"])
health_router = APIRouter(prefix="/v2/health", tags=["probes"])

try:
    _VERSION = metadata.version(SERVER_NAME)
except metadata.PackageNotFoundError:  # run from a folder that was never installed
    _VERSION = "unknown"

_EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics"]
_PATHS = {
    "model": "/models/{name}",
    "version": "/models/{name}/versions/{version}",
}
_MODEL_RESPONSES = {status: PROBLEM_RESPONSES[status] for status in (401, 404, 503, "default")}
_MAX_INDEX_BODY = 10_000
"""Bytes of a request for the index of models."""
_INDEX_BODY = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {"type": "object", "properties": {"ready": {"type": "boolean"}}}
            }
        }
    }
}
_INFER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object"},
                "example": {
                    "inputs": [
                        {
                            "name": tensors.IMAGE,
                            "datatype": "BYTES",
                            "shape": [1],
                            "data": ["iVBORw0KGgo..."],
                        }
                    ],
                    "outputs": [{"name": tensors.MASK}],
                },
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}
_INFER_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs, in JSON or as binary data after it.",
        "content": {"application/json": {}, "application/octet-stream": {}},
    },
    **PROBLEM_RESPONSES,
}

JsonLength = Annotated[
    int | None,
    Header(
        alias=JSON_LENGTH,
        ge=0,
        le=10**15,
        description="the length of the JSON in bytes, if binary data follows it",
    ),
]


def _health_response(member: str, cause: str | None) -> JSONResponse:
    if cause is None:
        return JSONResponse({member: True})
    return JSONResponse({member: False, "error": cause}, 503, {"Retry-After": "2"})


@health_router.get(
    "/live",
    summary="Liveness probe, the same as /livez",
    response_description="Healthy",
    responses=UNAVAILABLE_RESPONSE,
)
async def server_live(service: ServiceDep) -> Response:
    """503 with the cause when the engine is hung or lost."""
    return _health_response("live", service.liveness_error())


@health_router.get(
    "/ready",
    summary="Readiness probe, the same as /readyz",
    response_description="Healthy",
    responses=UNAVAILABLE_RESPONSE,
)
async def server_ready(service: ServiceDep) -> Response:
    """200 when requests can be processed."""
    return _health_response("ready", service.readiness_error())


@router.get("", summary="Describe the server", responses={401: PROBLEM_RESPONSES[401]})
async def server_metadata() -> dict[str, Any]:
    """Its name, its version, and the extensions of the protocol that it supports."""
    return {"name": SERVER_NAME, "version": _VERSION, "extensions": _EXTENSIONS}


@router.post(
    "/repository/index",
    summary="List all models",
    responses={status: PROBLEM_RESPONSES[status] for status in (401, 413, 422)},
    openapi_extra=_INDEX_BODY,
)
async def repository_index(request: Request, service: ServiceDep) -> list[dict[str, Any]]:
    """Every model with its version and state: READY, LOADING, or UNAVAILABLE with the reason. The
    body may be empty; `{"ready": true}` leaves out models that are not served.
    """
    body = await read_body(request, _MAX_INDEX_BODY, request.state.allocation)
    only_ready = codec.parse_index_request(body)
    models = [_describe_entry(name, entry) for name, entry in service.registry.entries.items()]
    return [each for each in models if each["state"] == "READY" or not only_ready]


@router.get(
    "/models/stats", summary="Statistics of all models", responses={401: PROBLEM_RESPONSES[401]}
)
async def all_statistics(service: ServiceDep) -> dict[str, Any]:
    """Images and durations of every model that is served."""
    served = [entry.served for entry in service.registry.entries.values() if entry.served]
    return {"model_stats": [tensors.describe_statistics(model) for model in served]}


@router.get(_PATHS["model"], summary="Describe a model's tensors", responses=_MODEL_RESPONSES)
async def model_metadata(service: ServiceDep, name: str) -> dict[str, Any]:
    """Inputs, outputs and version: the first 12 hex digits of the SHA-256 of the weights."""
    with _lease_model(service, name) as model:
        return tensors.describe_tensors(model)


@router.get(_PATHS["version"], summary="Describe a version's tensors", responses=_MODEL_RESPONSES)
async def version_metadata(service: ServiceDep, name: str, version: str) -> dict[str, Any]:
    """The same for one version; 404 if another version is served."""
    with _lease_model(service, name, version) as model:
        return tensors.describe_tensors(model)


@router.get(
    _PATHS["model"] + "/config", summary="A model's configuration", responses=_MODEL_RESPONSES
)
async def model_config(service: ServiceDep, name: str) -> dict[str, Any]:
    """The tensors of a model, as Triton's clients read them."""
    with _lease_model(service, name) as model:
        return tensors.describe_config(model)


@router.get(
    _PATHS["version"] + "/config", summary="A version's configuration", responses=_MODEL_RESPONSES
)
async def version_config(service: ServiceDep, name: str, version: str) -> dict[str, Any]:
    """The same for one version; 404 if another version is served."""
    with _lease_model(service, name, version) as model:
        return tensors.describe_config(model)


@router.get(_PATHS["model"] + "/stats", summary="A model's statistics", responses=_MODEL_RESPONSES)
async def model_statistics(service: ServiceDep, name: str) -> dict[str, Any]:
    """Images and durations since the model was loaded."""
    with _lease_model(service, name) as model:
        return {"model_stats": [tensors.describe_statistics(model)]}


@router.get(
    _PATHS["version"] + "/stats", summary="A version's statistics", responses=_MODEL_RESPONSES
)
async def version_statistics(service: ServiceDep, name: str, version: str) -> dict[str, Any]:
    """The same for one version; 404 if another version is served."""
    with _lease_model(service, name, version) as model:
        return {"model_stats": [tensors.describe_statistics(model)]}


@router.get(_PATHS["model"] + "/ready", summary="Is a model ready?", responses=_MODEL_RESPONSES)
async def model_ready(service: ServiceDep, name: str) -> dict[str, Any]:
    """200 when the model is served; 503 with the cause when it is not."""
    with _lease_model(service, name):
        service.check_ready()
        return {"name": name, "ready": True}


@router.get(_PATHS["version"] + "/ready", summary="Is a version ready?", responses=_MODEL_RESPONSES)
async def version_ready(service: ServiceDep, name: str, version: str) -> dict[str, Any]:
    """The same for one version; 404 if another version is served."""
    with _lease_model(service, name, version):
        service.check_ready()
        return {"name": name, "ready": True}


@router.post(
    _PATHS["model"] + "/infer",
    summary="Segment images, as tensors",
    response_class=Response,
    responses=_INFER_RESPONSES,
    openapi_extra=_INFER_BODY | {"parameters": [TIMEOUT_PARAMETER]},
)
async def infer(
    request: Request,
    name: str,
    json_length: JsonLength = None,
) -> Response:
    """One input, `image`: UINT8 of shape (N, H, W, C), or BYTES of shape (N): encoded images of one
    size, as base64 in JSON. Outputs: `mask`, UINT8 (N, H, W), and `probabilities`, FP32
    (N, channels, H, W). Parameters: `threshold` (0..1), `timeout` (microseconds),
    `binary_data_output`. JSON may hold up to 500,000 values and 16 MB; send larger tensors as
    binary data.
    """
    return await _infer(request, name, None, json_length)


@router.post(
    _PATHS["version"] + "/infer",
    summary="Segment images with one version of a model",
    response_class=Response,
    responses=_INFER_RESPONSES,
    openapi_extra=_INFER_BODY | {"parameters": [TIMEOUT_PARAMETER]},
)
async def infer_version(
    request: Request,
    name: str,
    version: str,
    json_length: JsonLength = None,
) -> Response:
    """The same for one version; 404 if another version is served."""
    return await _infer(request, name, version, json_length)


async def _infer(
    request: Request, name: str, version: str | None, json_length: int | None
) -> Response:
    started = time.monotonic()
    service = find_service(request)
    deadline = read_deadline(request, service.settings)
    allocation: Allocation = request.state.allocation
    read = functools.partial(_read_request, budget=service.bytes, json_length=json_length)
    check = functools.partial(_check_version, version=version)
    async with accept_request(request, service, name, deadline, read, check) as (model, parsed):
        inference = tensors.read_inference(model, parsed)
        deadline = deadline.earlier(Deadline(started + inference.timeout))
        predictions = await _predict_all(service, model, inference, deadline, allocation)
        content, length = await asyncio.to_thread(
            tensors.write_response, model, inference, predictions
        )
    request.state.log_fields["images"] = len(inference.images)
    headers = model_headers(model)
    if length is None:
        return Response(content, media_type="application/json", headers=headers)
    headers[JSON_LENGTH] = str(length)
    return Response(content, media_type="application/octet-stream", headers=headers)


async def _read_request(
    request: Request,
    max_bytes: int,
    allocation: Allocation,
    *,
    budget: Budget,
    json_length: int | None,
) -> codec.InferenceRequest:
    """Read and parse a body. The memory for parsing is allocated meanwhile.

    Raises:
        RequestTooLarge: there would never be enough memory to parse it.
        QueueFull: there is not enough memory now.
    """
    body = await read_body(request, max_bytes, allocation)
    needed = await asyncio.to_thread(codec.estimate_parse_bytes, body, json_length)
    _check_fits_budget(budget, allocation, needed, RequestTooLarge, "the JSON", "send binary data")
    with budget.allocate() as parsing:
        parsing.grow(needed)
        return await asyncio.to_thread(codec.parse, body, json_length)


async def _predict_all(
    service: Service,
    model: ServedModel,
    inference: tensors.Inference,
    deadline: Deadline,
    allocation: Allocation,
) -> list[Prediction]:
    """Segment images concurrently.

    Raises:
        ResponseTooLarge: there would never be enough memory for the response.
        QueueFull: there is not enough memory now.
        ServiceError: from the first image that fails; a response needs all images.
    """
    group = service.segmenter.group(model)
    size = await tensors.common_size(service.segmenter, inference, group)
    needed = tensors.estimate_response_bytes(model, inference, size)
    advice = "ask for fewer images or outputs, or for binary data"
    _check_fits_budget(service.bytes, allocation, needed, ResponseTooLarge, "the response", advice)
    allocation.grow(needed)  # before the computation, which would be in vain if this failed

    async def predict(index: int) -> Prediction:
        try:
            return await service.segmenter.predict(
                model,
                inference.images[index],
                deadline,
                threshold=inference.threshold,
                probabilities=inference.wants_probabilities,
                group=group,
            )
        except (ImageError, ImageTooLarge) as error:
            raise tensors.name_image(error, index, inference) from error

    return await group.run(range(len(inference.images)), predict)


def _check_fits_budget(
    budget: Budget,
    allocation: Allocation,
    needed: int,
    error: type[RequestTooLarge],
    what: str,
    advice: str,
) -> None:
    """Raise `error` if a request needs more memory than it would get if it were alone. A retry, as
    QueueFull suggests, would never succeed."""
    if allocation.amount + needed > budget.limit:
        raise error(
            f"{what} needs up to {needed / 1e6:.0f} MB of memory, UNET_QUEUE_MB is "
            f"{budget.limit / 1e6:g}; {advice}"
        )


def _describe_entry(name: str, entry: ModelEntry) -> dict[str, Any]:
    """A model in the index of the repository."""
    if entry.served is not None:
        version = tensors.model_version(entry.served)
        return {"name": name, "version": version, "state": "READY"}
    if entry.error is None:
        return {"name": name, "state": "LOADING"}
    return {"name": name, "state": "UNAVAILABLE", "reason": entry.error}


def _check_version(model: ServedModel, version: str | None) -> None:
    served = tensors.model_version(model)
    if version is not None and version != served:
        name = model.checkpoint.name
        raise UnknownModel(f"unknown version {version[:100]!r} of {name!r}; available: {served}")


@contextmanager
def _lease_model(service: Service, name: str, version: str | None = None) -> Iterator[ServedModel]:
    """Hold a model while its metadata are read.

    Raises:
        UnknownModel: unknown, or another version of it is served.
        Unavailable: not ready.
    """
    with service.registry.lease(name) as model:
        _check_version(model, version)
        yield model
