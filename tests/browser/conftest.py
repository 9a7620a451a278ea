"""Chromium, and pages whose console and requests are checked after each test."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from tests.conftest import Server, encode

CHROMIUM = Path("/usr/bin/chromium")
TIMEOUT_MS = 60_000  # for a mask on a busy machine
PREFIX = "http://lab.example/unet"

expect.set_options(timeout=TIMEOUT_MS)


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
def expected_errors() -> list[str]:
    """Parts of console messages that a test expects. Chromium logs every response with an error
    status; tests check those responses by their text on the page."""
    return ["422"]


@pytest.fixture
def page(browser: Browser, server: Server, expected_errors: list[str]) -> Iterator[Page]:
    """The loaded page. Fails the test on a console error, such as a violation of the page's
    policy, and on a request to another host."""
    page = browser.new_page(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page.set_default_timeout(TIMEOUT_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text)
            if message.type == "error" and not any(each in message.text for each in expected_errors)
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


@pytest.fixture
def prefixed_page(browser: Browser, server: Server) -> Iterator[Page]:
    """A blank page whose browser reaches the service under `PREFIX` alone, as behind a reverse
    proxy. Fails the test on a request outside the prefix and on a console error."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(TIMEOUT_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )

    def proxy(route: Route) -> None:
        request = route.request
        if not request.url.startswith(f"{PREFIX}/"):
            complaints.append(request.url)
            route.fulfill(status=404)
            return
        response = httpx.request(
            request.method,
            server.url + request.url.removeprefix(PREFIX),
            content=request.post_data_buffer,
            headers={"Content-Type": request.headers.get("content-type", "")},
            timeout=60,
        )
        headers = {
            name: value
            for name, value in response.headers.items()
            if name not in ("content-length", "transfer-encoding")
        }
        route.fulfill(status=response.status_code, body=response.content, headers=headers)

    page.route("**/*", proxy)
    yield page
    page.close()
    assert complaints == []


def canvas_pixels(page: Page) -> np.ndarray:
    """The pixels of the viewer, (H, W, 4) uint8."""
    width, height, data = page.evaluate(
        """() => {
            const c = document.getElementById('canvas');
            const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height);
            let bytes = '';  // returning a list of numbers takes ten seconds for one image
            for (let i = 0; i < pixels.data.length; i += 32768)
                bytes += String.fromCharCode(...pixels.data.subarray(i, i + 32768));
            return [c.width, c.height, btoa(bytes)];
        }"""
    )
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)


def thumbnails(page: Page, *states: str) -> Locator:
    """The thumbnails in any of the given states."""
    return page.locator(", ".join(f"#strip [data-state={state}]" for state in states))


def wait_done(page: Page, count: int = 1) -> None:
    """Wait until `count` images have a mask."""
    expect(thumbnails(page, "done")).to_have_count(count)


def wait_finished(page: Page) -> None:
    """Wait until every image is done or failed."""
    expect(thumbnails(page, "waiting", "working")).to_have_count(0)


def wait_drawn(page: Page) -> None:
    """Wait until the selected image is on the canvas."""
    page.wait_for_selector("#stage:not([aria-busy])", state="attached")


def choose_files(page: Page, *files: tuple[str, bytes]) -> None:
    """Choose files, given as names and contents, with the page's file input."""
    page.set_input_files(
        "#files",
        [
            {"name": name, "mimeType": "application/octet-stream", "buffer": data}
            for name, data in files
        ],
    )


MASK_HEADERS = {
    "X-Mask-Coverage": "0.25",
    "X-Mask-Confidence": "0.9",
    "Server-Timing": "decode;dur=1.0, infer;dur=10.0",
    "X-Model": "nuclei@000000000000",
    "X-Engine": "cpu/int8",
}


def square_mask(height: int = 64, width: int = 64) -> bytes:
    """A mask PNG with a square in the middle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    return encode(mask)


def send_mask(route: Route, body: bytes | None = None, **headers: str) -> None:
    """Respond to a segmentation request in place of the service."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    route.fulfill(
        status=200,
        headers={"Content-Type": "image/png"} | MASK_HEADERS | more,
        body=body or square_mask(),
    )


def always_send_mask(route: Route) -> None:
    """Route handler that responds to every request with a mask."""
    send_mask(route)


def send_problem(route: Route, status: int, detail: str, **headers: str) -> None:
    """Respond with a problem document in place of the service."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    route.fulfill(
        status=status,
        headers={"Content-Type": "application/problem+json"} | more,
        body=f'{{"detail": "{detail}"}}',
    )
