"""A real browser, and a page in it that is watched."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

from tests.conftest import Server, encode

CHROMIUM = Path("/usr/bin/chromium")
ROOM = 60_000  # milliseconds for a mask on a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def tolerated() -> list[str]:
    """What a test expects on the console. A refused image is logged there by the browser itself;
    those answers are tested by their text."""
    return ["422"]


@pytest.fixture
def page(browser: Browser, server: Server, tolerated: list[str]) -> Iterator[Page]:
    """The loaded page; afterwards: no error on its console, no request to another place."""
    page = browser.new_page(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page.set_default_timeout(ROOM)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text)
            if message.type == "error" and not any(each in message.text for each in tolerated)
            else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            complaints.append(request.url)
            if not request.url.startswith((server.url, "blob:", "data:"))
            else None
        ),
    )
    page.goto(server.url)
    yield page
    page.close()
    assert complaints == []


def canvas(page: Page) -> np.ndarray:
    """The pixels that the viewer shows, (H, W, 4)."""
    width, height, data = page.evaluate(
        """() => {
            const c = document.getElementById('canvas');
            const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height);
            let bytes = '';  // as a list of numbers a picture takes ten seconds
            for (let i = 0; i < pixels.data.length; i += 32768)
                bytes += String.fromCharCode(...pixels.data.subarray(i, i + 32768));
            return [c.width, c.height, btoa(bytes)];
        }"""
    )
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)


def done(page: Page, count: int = 1) -> None:
    page.wait_for_function(
        "n => document.querySelectorAll('#strip [data-state=done]').length === n", arg=count
    )


def choose(page: Page, *files: tuple[str, bytes]) -> None:
    page.set_input_files(
        "#files",
        [
            {"name": name, "mimeType": "application/octet-stream", "buffer": data}
            for name, data in files
        ],
    )


FIGURES = {
    "X-Mask-Coverage": "0.25",
    "X-Mask-Confidence": "0.9",
    "Server-Timing": "decode;dur=1.0, infer;dur=10.0",
    "X-Model": "nuclei@000000000000",
    "X-Engine": "cpu/int8",
}


def square(height: int = 64, width: int = 64) -> bytes:
    """A mask, as the service might send it."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    return encode(mask)


def answer(route: Route, body: bytes | None = None, **headers: str) -> None:
    """A good answer in the service's place, where a test is about what the page makes of it."""
    figures = FIGURES | {name.replace("_", "-"): value for name, value in headers.items()}
    route.fulfill(
        status=200, headers={"Content-Type": "image/png", **figures}, body=body or square()
    )


def always(route: Route) -> None:
    """The handler of a service with which all is well."""
    answer(route)


def refuse(route: Route, status: int, detail: str, **headers: str) -> None:
    """A problem document in the service's place."""
    kind = {"Content-Type": "application/problem+json"}
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    route.fulfill(status=status, headers=kind | more, body=f'{{"detail": "{detail}"}}')


def over(page: Page) -> None:
    """Until nothing is left to do."""
    page.wait_for_function(
        "() => !document.querySelector('#strip [data-state=waiting], #strip [data-state=working]')"
    )


def drawn(page: Page) -> None:
    """Until the chosen image is on the canvas."""
    page.wait_for_selector("#stage:not([aria-busy])", state="attached")
