"""Authentication, and cancellation when a client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from starlette.requests import ClientDisconnect, Request

from app.api.dependencies import cancel_on_disconnect, require_api_key
from app.api.keys import MAX_WRONG_KEYS, Authenticator, KeyStore
from app.api.problems import install_handlers

KEYS = ("one", "two")


@pytest.fixture
def app() -> FastAPI:
    made = FastAPI()
    made.state.authenticator = Authenticator(KeyStore(KEYS))
    install_handlers(made)

    @made.get("/key", dependencies=[Depends(require_api_key)])
    async def key() -> None:
        return None

    return made


def get(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def test_guessing_keys_is_answered_with_429_and_when_to_retry(app: FastAPI) -> None:
    for number in range(MAX_WRONG_KEYS):
        assert get(app, "/key", **{"X-API-Key": f"guess{number}"}).status_code == 401
    response = get(app, "/key", **{"X-API-Key": "another"})
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("bearer", "header", "status"),
    [
        ("Bearer one", None, 200),
        ("bearer two", None, 200),
        (None, "two", 200),
        ("Bearer of-a-gateway", "two", 200),
        ("Bearer two", "of-a-gateway", 200),
        ("Basic one", None, 401),
        ("Bearer three", "four", 401),
        ("Bearer", None, 401),
        (None, "", 401),
        (None, "éé", 401),
        (None, None, 401),
    ],
)
def test_either_header_may_carry_a_valid_key(
    app: FastAPI, bearer: str | None, header: str | None, status: int
) -> None:
    given = {"Authorization": bearer, "X-API-Key": header}
    headers = {name: value.encode() for name, value in given.items() if value is not None}
    response = get(app, "/key", **headers)  # type: ignore[arg-type]
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["content-type"] == "application/problem+json"


@pytest.fixture(autouse=True, params=[0.0, 0.05])
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch for a disconnect begins at once, or when most blocks here have ended."""
    monkeypatch.setattr("app.api.dependencies._QUICK_S", request.param)


def disconnecting(event: asyncio.Event) -> Request:
    async def receive() -> dict[str, Any]:
        await event.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http"}, receive)


def run(test: Callable[[asyncio.Event], Any]) -> None:
    async def main() -> None:
        await test(asyncio.Event())
        await asyncio.sleep(0)
        (remaining,) = asyncio.all_tasks()  # the watcher has ended
        assert remaining is asyncio.current_task()
        assert remaining.cancelling() == 0

    asyncio.run(main())


def test_block_ends_normally_while_the_client_is_connected() -> None:
    async def test(left: asyncio.Event) -> None:
        with cancel_on_disconnect(disconnecting(left)):
            await asyncio.sleep(0.01)

    run(test)


def test_disconnect_cancels_the_block() -> None:
    async def test(left: asyncio.Event) -> None:
        cleaned_up = False

        async def compute() -> None:
            nonlocal cleaned_up
            left.set()
            try:
                await asyncio.sleep(60)
            finally:
                cleaned_up = True

        with pytest.raises(ClientDisconnect), cancel_on_disconnect(disconnecting(left)):
            await compute()
        assert cleaned_up

    run(test)


def test_disconnect_at_the_end_of_the_block_does_not_cancel_later() -> None:
    async def test(left: asyncio.Event) -> None:
        with cancel_on_disconnect(disconnecting(left)):
            await asyncio.sleep(0.01)
            left.set()
        await asyncio.sleep(0)

    run(test)


def test_error_of_the_block_is_raised_as_it_is() -> None:
    async def test(left: asyncio.Event) -> None:
        with pytest.raises(KeyError), cancel_on_disconnect(disconnecting(left)):
            raise KeyError

    run(test)


def test_cancellation_by_the_server_is_not_a_disconnect() -> None:
    async def test(left: asyncio.Event) -> None:
        async def handle() -> None:
            with cancel_on_disconnect(disconnecting(left)):
                await asyncio.sleep(60)

        task = asyncio.create_task(handle())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test)
