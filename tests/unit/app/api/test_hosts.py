"""The check of the host that a request asks for."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from app.api.hosts import AllowedHostsMiddleware

ALLOWED = ("unet.example", "*.lab.example", "127.0.0.1", "[::1]")


def get(path: str, host: str) -> httpx.Response:
    app = FastAPI()

    @app.get("/models")
    @app.get("/livez")
    async def route() -> str:
        return "ok"

    app.add_middleware(AllowedHostsMiddleware, allowed=ALLOWED)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://here"
        ) as client:
            return await client.get(path, headers={"Host": host})

    return asyncio.run(send())


@pytest.mark.parametrize(
    "host",
    [
        "unet.example", "UNET.example:8000", "unet.example.", "a.lab.example", "a.b.lab.example",
        "127.0.0.1:8000", "[::1]:8000", "[::1]",
    ],
)  # fmt: skip
def test_allowed_host_is_served(host: str) -> None:
    assert get("/models", host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "lab.example", "evillab.example", "unet.example.evil", "", "[::2]"]
)
def test_other_host_is_answered_with_421(host: str) -> None:
    response = get("/models", host)
    assert response.status_code == 421
    assert response.headers["content-type"] == "application/problem+json"


def test_probes_are_answered_under_any_host() -> None:
    assert get("/livez", "10.0.0.7:8000").status_code == 200
