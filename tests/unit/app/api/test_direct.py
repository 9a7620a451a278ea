"""Routes that FastAPI describes and Starlette calls."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute

from app.api.direct import DirectRoute
from app.api.problems import install_handlers
from app.errors import InvalidRequest, Unauthorized
from app.main import create_app
from app.settings import Settings
from tests.conftest import ROOT


def check_word(request: Request) -> None:
    if request.headers.get("x-word") != "please":
        raise Unauthorized("say please")


def send(
    app: FastAPI, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> httpx.Response:
    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, headers=headers, content=body)

    return asyncio.run(exchange())


@pytest.fixture
def echoing() -> FastAPI:
    router = APIRouter()

    @router.post("/echo")
    async def echo(request: Request) -> Response:
        body = await request.body()
        if not body:
            raise InvalidRequest("nothing to repeat")
        return Response(body, headers={"x-route": request.scope["route"].path})

    app = FastAPI()
    (route,) = router.routes
    assert isinstance(route, APIRoute)
    app.router.routes.append(DirectRoute(route, check_word))
    app.include_router(router)
    install_handlers(app)
    return app


def test_function_answers_and_its_route_is_known(echoing: FastAPI) -> None:
    response = send(echoing, "POST", "/echo", {"X-Word": "please"}, b"a")
    assert (response.status_code, response.content) == (200, b"a")
    assert response.headers["x-route"] == "/echo"


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [("POST", {}, 401), ("POST", {"X-Word": "please"}, 422), ("GET", {}, 405)],
)
def test_errors_are_problem_documents(
    echoing: FastAPI, method: str, headers: dict[str, str], status: int
) -> None:
    response = send(echoing, method, "/echo", headers)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("keys", [(), ("one",)])
def test_routes_of_images_are_direct_and_check_the_key(keys: tuple[str, ...]) -> None:
    settings: dict[str, Any] = {"weights_dir": ROOT / "weights", "device": "cpu"}
    app = create_app(Settings(api_keys=keys, **settings))
    direct = {route.path for route in app.router.routes if isinstance(route, DirectRoute)}
    assert direct == {"/segment", "/api/remove"}
    for path in direct:
        assert path in app.openapi()["paths"]
        expected = 401 if keys else 503  # no model is loaded yet
        assert send(app, "POST", path, {}, b"x").status_code == expected
