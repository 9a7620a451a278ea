"""Swagger UI on /docs, against a real service. The `page` fixture fails a test on any console
error, such as a violation of the page's policy, and on any request to another host."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, Response, expect

from tests.browser.conftest import PREFIX, TIMEOUT_MS
from tests.conftest import Server, decode, encode, nuclei


@pytest.fixture
def docs(page: Page, server: Server) -> Page:
    page.goto(f"{server.url}/docs")
    page.wait_for_selector(".opblock")
    return page


def open_operation(page: Page, method: str, path: str) -> Locator:
    """Unfold an operation and press "Try it out"."""
    operation = page.locator(f".opblock-{method}").filter(has=page.locator(f"[data-path='{path}']"))
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    return operation


def execute(page: Page, operation: Locator, path: str) -> Response:
    """Send the operation's request and return the response."""
    with page.expect_response(f"**{path}") as event:
        operation.get_by_role("button", name="Execute").click()
    return event.value


def status_of(operation: Locator) -> str:
    """The status of the response that the operation received."""
    text: str = operation.locator(".live-responses-table .response-col_status").last.inner_text()
    return text.split()[0]


def test_every_operation_is_listed(docs: Page, server: Server) -> None:
    openapi = httpx.get(f"{server.url}/openapi.json").json()
    shown = [
        (summary.locator(".opblock-summary-method").inner_text(), path.get_attribute("data-path"))
        for summary in docs.locator(".opblock-summary").all()
        for path in [summary.locator(".opblock-summary-path, .opblock-summary-path__deprecated")]
    ]
    assert sorted(shown) == sorted(
        (method.upper(), path)
        for path, operations in openapi["paths"].items()
        for method in operations
    )
    expect(docs.locator("h1.title, .title").first).to_contain_text(openapi["info"]["title"])


@pytest.mark.parametrize("kind", ["multipart/form-data", "image/*", "application/octet-stream"])
def test_try_it_out_segments_a_chosen_file(docs: Page, server: Server, kind: str) -> None:
    image = encode(nuclei(60, 90)[0])
    operation = open_operation(docs, "post", "/segment")
    operation.get_by_label("Request content type").select_option(kind)
    chooser = operation.locator("input[type=file]")
    expect(chooser).to_be_visible()
    chooser.set_input_files([{"name": "cells.png", "mimeType": "image/png", "buffer": image}])
    operation.get_by_role("button", name="Execute").click()
    shown = operation.locator(".live-responses-table img")
    shown.wait_for()
    assert status_of(operation) == "200"
    pixels = shown.evaluate(
        """async (image) => {
            await image.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
        }"""
    )
    response = httpx.post(
        f"{server.url}/segment", content=image, headers={"Content-Type": "image/png"}
    )
    mask = decode(response.content)
    assert (np.array(pixels).reshape(60, 90, 4)[..., 0] == mask).all()


def test_problem_document_is_shown(docs: Page) -> None:
    operation = open_operation(docs, "post", "/segment")
    operation.get_by_label("Request content type").select_option("application/octet-stream")
    file = {"name": "notes.png", "mimeType": "image/png", "buffer": b"<script>alert(1)</script>"}
    operation.locator("input[type=file]").set_input_files([file])
    operation.get_by_role("button", name="Execute").click()
    body = operation.locator(".live-responses-table pre").first
    expect(body).to_contain_text("request_id")
    assert status_of(operation) == "422"


def test_authorize_sends_the_api_key(browser: Browser, closed: Server) -> None:
    context = browser.new_context()  # the second page has its files from the first
    schemes = httpx.get(f"{closed.url}/openapi.json").json()["components"]["securitySchemes"]
    assert schemes
    for scheme in schemes.values():
        is_header = scheme["type"] == "apiKey"
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(f"{closed.url}/docs")
        operation = open_operation(page, "get", "/models")
        assert execute(page, operation, "/models").status == 401
        page.locator(".auth-wrapper .authorize").click()
        form = page.locator(".auth-container").filter(
            has_text="X-API-Key" if is_header else "http, Bearer"
        )
        form.locator("input").fill("sesame")
        form.get_by_role("button", name="Apply credentials").click()
        form.get_by_role("button", name="Close").click()
        response = execute(page, operation, "/models")
        assert response.status == 200
        sent = response.request.headers["x-api-key" if is_header else "authorization"]
        assert sent == ("sesame" if is_header else "Bearer sesame")
        page.close()
    context.close()


def test_requests_keep_the_path_prefix(prefixed_page: Page) -> None:
    page = prefixed_page
    page.goto(f"{PREFIX}/docs")
    operation = open_operation(page, "get", "/models/{name}")
    operation.get_by_placeholder("name").fill("nuclei")
    response = execute(page, operation, "/models/nuclei")
    assert response.url == f"{PREFIX}/models/nuclei"
    assert response.json()["name"] == "nuclei"
    assert f"'{PREFIX}/models/nuclei'" in operation.locator(".curl").inner_text()


def test_page_has_no_inline_scripts_or_styles(docs: Page, server: Server) -> None:
    html = httpx.get(f"{server.url}/docs").text
    assert "<style" not in html
    assert " style=" not in html
    scripts = docs.locator("script").all()
    assert scripts
    assert all(each.get_attribute("src") and not each.inner_text() for each in scripts)


@pytest.mark.parametrize("width", [390, 768])
def test_operations_fit_a_small_screen(docs: Page, width: int) -> None:
    docs.set_viewport_size({"width": width, "height": 800})
    open_operation(docs, "post", "/segment")
    assert docs.evaluate("document.documentElement.scrollWidth") <= width
