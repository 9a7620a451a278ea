"""Probes for orchestrators, and the metrics."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from app.api.dependencies import ServiceDep
from app.api.schemas import PROBLEM_RESPONSES, UNAVAILABLE_RESPONSE

router = APIRouter(tags=["probes"])
metrics_router = APIRouter(tags=["probes"])


def _probe_response(cause: str | None) -> JSONResponse:
    if cause is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "cause": cause}, 503, {"Retry-After": "2"})


@router.get(
    "/livez",
    summary="Liveness probe",
    response_description="Healthy",
    responses=UNAVAILABLE_RESPONSE,
)
async def livez(service: ServiceDep) -> Response:
    """503 with the cause when the engine is hung or lost: restart the process."""
    return _probe_response(service.liveness_error())


@router.get(
    "/readyz",
    summary="Readiness probe",
    response_description="Healthy",
    responses=UNAVAILABLE_RESPONSE,
)
@router.get(
    "/healthz",
    summary="Readiness probe, the same as /readyz",
    response_description="Healthy",
    responses=UNAVAILABLE_RESPONSE,
)
async def readyz(service: ServiceDep) -> Response:
    """200 when the default model has reproduced its golden mask; 503 while draining."""
    return _probe_response(service.readiness_error())


@router.get(
    "/startupz",
    summary="Startup probe",
    response_description="Healthy",
    responses=UNAVAILABLE_RESPONSE,
)
async def startupz(service: ServiceDep) -> Response:
    """200 once the default model has been loaded and has reproduced its golden mask."""
    return _probe_response(None if service.started else service.readiness_error())


@metrics_router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=PlainTextResponse,
    response_description="All metrics in the Prometheus text format",
    responses={401: PROBLEM_RESPONSES[401]},
)
async def metrics(service: ServiceDep) -> Response:
    """Counts, latencies by stage, the queue, the engine and the process."""
    text = service.metrics.format_text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
