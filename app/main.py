"""The application: service, routes, middleware, error handlers, static files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.cors import CORSMiddleware

from app.api.dependencies import require_api_key
from app.api.hosts import AllowedHostsMiddleware
from app.api.keys import Authenticator, KeyStore
from app.api.middleware import (
    PROBE_PATHS,
    AbsoluteTargetMiddleware,
    AccessLogMiddleware,
    LingeringCloseMiddleware,
    MemoryBudgetMiddleware,
    PlainErrorMiddleware,
    ServerErrorMiddleware,
)
from app.api.problems import install_handlers
from app.api.routers import models, probes, remove, segment, v2
from app.api.schemas import Application
from app.inference.registry import WrapEngineFn, use_as_built
from app.inference.service import Service
from app.settings import Settings
from app.tracing import load_tracing

if TYPE_CHECKING:
    from app.tracing.spans import Tracing

_STATIC = Path(__file__).parent / "static"

_EXPOSED_HEADERS = [
    "X-Request-ID",
    "X-Model",
    "X-Engine",
    "X-Mask-Coverage",
    "X-Mask-Confidence",
    "X-Mask-Objects",
    "X-Image-Pages",
    "Server-Timing",
    "Retry-After",
    "traceresponse",
    "Inference-Header-Content-Length",
]


class RevalidatedStaticFiles(StaticFiles):
    """Static files that browsers cache but revalidate by ETag before each use.

    Without Cache-Control, browsers guess how long a file stays valid. After an update they would
    mix the page's modules of two versions.
    """

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _describe_telemetry(tracing: Tracing | None) -> TelemetryConfig:
    """Let FastAPI make a span of each request except probes, if there are traces, and no more.

    The service has its own metrics and logs. Providers that other packages set up for the whole
    process are not used.
    """
    config: TelemetryConfig = {
        "tracing": tracing is not None,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
    }
    if tracing is not None:
        config["tracer_provider"] = tracing.provider
        config["exclude"] = lambda scope: scope["path"] in PROBE_PATHS
    return config


def create_app(settings: Settings, wrap_engine: WrapEngineFn = use_as_built) -> FastAPI:
    """Assemble the application. `app.state.service` is the service that its routes use.

    Args:
        wrap_engine: see `app.inference.registry.Registry`.

    Raises:
        SettingsError, EngineUnavailable: the settings, or the variables OTEL_*, ask for what this
            machine does not have.
    """
    authenticator = Authenticator(KeyStore(settings.api_keys, settings.api_keys_file))
    tracing = load_tracing()
    service = Service(settings, wrap_engine, tracing)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        key_watch = asyncio.create_task(authenticator.store.watch())
        await service.start()
        try:
            yield
        finally:
            key_watch.cancel()
            await service.stop()

    app = Application(
        title="unet-server",
        summary="U-Net segmentation: POST an image, get a PNG mask.",
        license_info={"name": "MIT"},
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load Swagger UI and ReDoc from another host
        redoc_url=None,
        openapi_url=None,  # served below by a route of its own, which the metrics name
        telemetry=_describe_telemetry(tracing),
        redirect_slashes=False,  # a path with one slash too many is an error that says so
    )
    app.state.service = service
    app.state.authenticator = authenticator
    _add_api(app, with_keys=settings.requires_keys)
    _add_pages(app)
    install_handlers(app)
    _add_middleware(app, settings, service, tracing)
    return app


def _add_api(app: FastAPI, *, with_keys: bool) -> None:
    """Add the routes of the API. Probes never need a key."""
    authentication = [Depends(require_api_key)] if with_keys else []
    for router in (
        segment.router,
        remove.router,
        models.router,
        probes.metrics_router,
        v2.router,
    ):
        app.include_router(router, dependencies=authentication)
    for router in (probes.router, v2.health_router):
        app.include_router(router)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())


def _add_pages(app: FastAPI) -> None:
    """Add the web page, Swagger UI, and the files of both."""
    # The package is located, not imported: only its copy of Swagger UI is used.
    static = RevalidatedStaticFiles(directory=_STATIC, packages=[("fastapi_swagger", "resources")])
    app.mount("/static", static, name="static")

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        """The page, and its first script, which a browser finds without the slash of a prefix."""
        script = request.url.query == "slash.js"
        return await static.get_response("slash.js" if script else "index.html", request.scope)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return await static.get_response("docs.html", request.scope)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon(request: Request) -> Response:
        """The icon of responses that are not HTML, such as JSON; pages link to it themselves."""
        return await static.get_response("icon.svg", request.scope)


def _add_middleware(
    app: FastAPI, settings: Settings, service: Service, tracing: Tracing | None
) -> None:
    """Wrap the application in its middleware, from the innermost to the outermost."""
    app.add_middleware(LingeringCloseMiddleware)
    app.add_middleware(MemoryBudgetMiddleware, budget=service.bytes)
    app.add_middleware(ServerErrorMiddleware)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(PlainErrorMiddleware)
    if settings.allowed_hosts:
        app.add_middleware(AllowedHostsMiddleware, allowed=settings.allowed_hosts)
    app.add_middleware(AccessLogMiddleware, metrics=service.metrics, tracing=tracing)
    app.add_middleware(AbsoluteTargetMiddleware)
