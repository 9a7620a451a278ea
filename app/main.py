"""The application: service, routes, middleware, errors, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles

from app.api import problems as handlers
from app.api.dependencies import SCHEMES
from app.api.middleware import (
    AbsoluteTargetMiddleware,
    AccessLogMiddleware,
    Cors,
    LingeringCloseMiddleware,
    MemoryBudgetMiddleware,
    ServerErrorMiddleware,
)
from app.api.routers import models, probes, segment, v2
from app.api.schemas import Problem
from app.inference.service import Service
from app.settings import Settings

_STATIC = Path(__file__).parent / "static"

_EXPOSED = [
    "X-Request-ID",
    "X-Model",
    "X-Engine",
    "X-Mask-Coverage",
    "X-Mask-Confidence",
    "X-Mask-Objects",
    "Server-Timing",
    "Retry-After",
    "Inference-Header-Content-Length",
]


class _Fresh(StaticFiles):
    """Files that a browser keeps, but asks about each time, by their ETag. Without a word on it
    browsers guess how long a file lasts, and run the modules of two versions together."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def create_app(settings: Settings) -> FastAPI:
    """The whole application; `app.state.service` is what is behind the routes.

    Raises:
        SettingsError, EngineUnavailable: the settings ask for what is not there.
    """
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="unet-server",
        summary="Bytes of an image in, a PNG mask out, made by a trained U-Net.",
        license_info={"name": "MIT"},
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load their scripts from another host
        redoc_url=None,
        redirect_slashes=False,  # a request that is nearly right is told so, not sent elsewhere
    )
    app.state.service = service
    for router in (segment.router, models.router, probes.router, v2.router, v2.health):
        app.include_router(router)
    static = _Fresh(directory=_STATIC)
    app.mount("/static", static, name="static")

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await static.get_response("index.html", request.scope)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return await static.get_response("docs.html", request.scope)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon(request: Request) -> Response:
        """What browsers ask for beside all that is no page: JSON, a licence."""
        return await static.get_response("icon.svg", request.scope)

    handlers.install(app)
    # From the inside out: each wraps those before it.
    app.add_middleware(LingeringCloseMiddleware)
    app.add_middleware(MemoryBudgetMiddleware, budget=service.bytes)
    app.add_middleware(ServerErrorMiddleware)
    if settings.cors_origins:
        app.add_middleware(
            Cors,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(AccessLogMiddleware, metrics=service.metrics)
    app.add_middleware(AbsoluteTargetMiddleware)
    _mend_description(app, keys=bool(settings.api_keys))
    return app


def _mend_description(app: FastAPI, *, keys: bool) -> None:
    """What `/openapi.json` says, where FastAPI does not know better.

    Routes refer to the problem document by name, and FastAPI lists only models it sees itself. Of
    any other route with a parameter it says that it answers 422, in a form that is not ours. Keys
    are asked for where `keys` are set, by every route that answers 401.
    """
    plain = app.openapi

    def openapi() -> dict[str, object]:
        document = plain()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas["Problem"] = Problem.model_json_schema()
        if schemas.pop("HTTPValidationError", None):
            del schemas["ValidationError"]
        for operations in document["paths"].values():
            for operation in operations.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
                if keys and "401" in operation["responses"]:
                    operation["security"] = [{name: []} for name in SCHEMES]
        if keys:
            document["components"]["securitySchemes"] = SCHEMES
        return document

    app.openapi = openapi  # type: ignore[method-assign]
