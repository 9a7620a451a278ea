"""What an orchestrator asks: is the process sound, is it ready, is its start over."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from app.api.dependencies import authorized
from app.api.schemas import NO, PROBLEM
from app.inference.service import Service

router = APIRouter(tags=["probes"])


def _answer(cause: str | None) -> JSONResponse:
    if cause is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "cause": cause}, 503, {"Retry-After": "2"})


@router.get("/livez", summary="Is the process sound?", response_description="Yes.", responses=NO)
async def livez(request: Request) -> Response:
    """503 with the cause when the engine is hung or lost: restart the process."""
    service: Service = request.app.state.service
    return _answer(service.liveness_error())


@router.get(
    "/readyz", summary="Should requests come here now?", response_description="Yes.", responses=NO
)
@router.get("/healthz", summary="The same as /readyz", response_description="Yes.", responses=NO)
async def readyz(request: Request) -> Response:
    """200 when the default model is warm and reproduced its golden mask; 503 while draining."""
    service: Service = request.app.state.service
    return _answer(service.readiness_error())


@router.get("/startupz", summary="Is the start over?", response_description="Yes.", responses=NO)
async def startupz(request: Request) -> Response:
    """200 once the default model was loaded, warmed and proven."""
    service: Service = request.app.state.service
    return _answer(None if service.started else service.readiness_error())


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    dependencies=[Depends(authorized)],
    response_class=PlainTextResponse,
    response_description="All of them.",
    responses={401: PROBLEM[401]},
)
async def metrics(request: Request) -> Response:
    """Counts, latencies by stage, queue, engine and process, in Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
