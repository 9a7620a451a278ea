"""Chromium, and pages whose console and requests are checked after each test."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, urlsplit

import httpx
import numpy as np
import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Locator,
    Page,
    Route,
    ViewportSize,
    expect,
    sync_playwright,
)
from scipy import ndimage

from model.objects import Objects
from model.polygons import encode_polygons
from tests.conftest import Server, decode, encode, serving

CHROMIUM = Path("/usr/bin/chromium")
TIMEOUT_MS = 60_000  # for a mask on a busy machine
PREFIX = "http://lab.example/unet"

expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium. It ends with this folder's tests: Playwright keeps an event loop running in this
    thread, and tests of other folders run loops of their own."""
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def closed() -> Iterator[Server]:
    """A service that requires the API key "sesame"."""
    with serving(UNET_API_KEYS="sesame") as running:
        yield running


@pytest.fixture
def expected_errors() -> list[str]:
    """Parts of console messages that a test expects. Chromium logs every response with an error
    status; tests check those responses by their text on the page."""
    return ["422"]


@contextlib.contextmanager
def opened_page(page: Page, server: Server, expected_errors: list[str]) -> Iterator[Page]:
    """Load the page and close it. Fails the test on a console error, such as a violation of the
    page's policy, and on a request to another host."""
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


DESKTOP: ViewportSize = {"width": 1440, "height": 900}


@pytest.fixture(scope="package")
def desktop(browser: Browser) -> BrowserContext:
    """A browser profile that tests share, so that files of the page come from its cache."""
    return browser.new_context(viewport=DESKTOP, accept_downloads=True)


@pytest.fixture
def page(desktop: BrowserContext, server: Server, expected_errors: list[str]) -> Iterator[Page]:
    """The loaded page on a desktop; see `opened_page`."""
    with opened_page(desktop.new_page(), server, expected_errors) as opened:
        yield opened


@pytest.fixture
def clocked_page(browser: Browser, server: Server, expected_errors: list[str]) -> Iterator[Page]:
    """The loaded page with a clock that only `advance_until` moves."""
    with opened_page(browser.new_page(viewport=DESKTOP), server, expected_errors) as opened:
        opened.clock.install()
        yield opened


def advance_until(page: Page, is_done: Callable[[], bool], step_ms: int = 5_000) -> None:
    """Let the time of a `clocked_page` pass quickly."""
    while not is_done():
        page.clock.run_for(step_ms)
        page.wait_for_timeout(50)


@pytest.fixture
def phone(browser: Browser, server: Server, expected_errors: list[str]) -> Iterator[Page]:
    """The loaded page on a phone with a touch screen; see `opened_page`."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    with opened_page(page, server, expected_errors) as opened:
        yield opened


@pytest.fixture
def prefixed_page(browser: Browser, server: Server, expected_errors: list[str]) -> Iterator[Page]:
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
        if not request.url.startswith((f"{PREFIX}/", f"{PREFIX}?")):
            complaints.append(request.url)
            route.fulfill(status=404)
            return
        response = client.request(
            request.method,
            server.url + "/" + request.url.removeprefix(PREFIX).removeprefix("/"),
            content=request.post_data_buffer,
            headers={"Content-Type": request.headers.get("content-type", "")},
        )
        headers = {
            name: value
            for name, value in response.headers.items()
            if name not in ("content-length", "transfer-encoding")
        }
        route.fulfill(status=response.status_code, body=response.content, headers=headers)

    with httpx.Client(timeout=60) as client:
        page.route("**/*", proxy)
        yield page
        page.close()
    unexpected = [each for each in complaints if not any(part in each for part in expected_errors)]
    assert unexpected == []


def canvas_pixels(page: Page) -> np.ndarray:
    """The pixels of the viewer as they are on the screen, (H, W, 4) uint8."""
    page.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)))")
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


ALL_KINDS = (
    *("mask", "overlay", "instances", "polygons", "rois"),
    *("measurements", "cutout", "probability", "coco"),
)
"""The files that can be downloaded."""


def choose_outputs(page: Page, *kinds: str) -> None:
    """Choose the files to download in their dialog."""
    page.click("#choose-outputs")
    for box in page.locator("#kinds input").all():
        box.set_checked(box.get_attribute("value") in kinds)
    page.click("#outputs button")


def show(page: Page, shown: str) -> None:
    """Show fill, outline, mask or image."""
    page.click(f"[data-shown={shown}]")


def save_file(page: Page, button: str = "#download") -> tuple[str, bytes]:
    """Press a button that saves a file; return the file's name and content."""
    with page.expect_download() as download:
        page.click(button)
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def saved_view(page: Page, shown: str) -> np.ndarray:
    """The whole image as the view shows it, (H, W, 3) int, saved as the overlay."""
    wait_drawn(page)
    show(page, shown)
    choose_outputs(page, "overlay")
    return decode(save_file(page)[1])[..., :3].astype(int)


def unzip(content: bytes) -> zipfile.ZipFile:
    """An archive whose checksums are right."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert archive.testzip() is None
    return archive


def read_table(archive: zipfile.ZipFile, name: str = "results.csv") -> list[dict[str, str]]:
    """The rows of a table in an archive."""
    return list(csv.DictReader(io.StringIO(archive.read(name).decode("utf-8-sig"))))


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
    "X-Mask-Confidence": "0.99",
    "X-Image-Pages": "1",
    "Server-Timing": "decode;dur=1.0, infer;dur=10.0",
    "X-Model": "nuclei@000000000000",
    "X-Engine": "cpu/int8",
}


def square_mask(height: int = 64, width: int = 64) -> np.ndarray:
    """A mask with a square in the middle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    return mask


def outputs_of(route: Route) -> list[str]:
    """The outputs that a request asks for."""
    return parse_qs(urlsplit(route.request.url).query)["output"]


def settings_of(route: Route) -> dict[str, str]:
    """The other parameters of a request."""
    query = dict(parse_qsl(urlsplit(route.request.url).query))
    return {name: value for name, value in query.items() if name != "output"}


def render_output(output: str, mask: np.ndarray) -> bytes:
    """An output for a mask whose parts are objects."""
    if output == "polygons":
        labels, count = ndimage.label(mask)
        areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        objects = Objects(labels, np.ones(count, np.uint8), areas, np.full(count, 0.9))
        columns = {"area_px": areas.astype(float)}
        return encode_polygons(
            objects, ("background", "nucleus"), ((0, 0, 0), (255, 0, 0)), columns
        )
    if output == "probability":
        return encode(mask.astype(np.uint16) * 257)
    assert output in ("mask", "preview")  # the page asks for no other
    return encode(mask)


def send_mask(route: Route, mask: np.ndarray | None = None, **headers: str) -> None:
    """Respond to a segmentation request in place of the service."""
    mask = square_mask() if mask is None else mask
    contents = {each: render_output(each, mask) for each in outputs_of(route)}
    send_outputs(route, contents, **headers)


def send_outputs(route: Route, contents: dict[str, bytes], **headers: str) -> None:
    """Respond with files by output: one as it is, several in a zip."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    outputs = outputs_of(route)
    body = contents[outputs[0]]
    if len(outputs) > 1:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for output in outputs:
                ending = ".geojson" if output == "polygons" else f"-{output}.png"
                archive.writestr(f"image{ending}", contents[output])
        body = buffer.getvalue()
    content_type = "application/zip" if len(outputs) > 1 else "image/png"
    route.fulfill(
        status=200, headers={"Content-Type": content_type} | MASK_HEADERS | more, body=body
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
