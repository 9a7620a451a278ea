"""The documentation in headless Chromium, against a real service."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route

from tests.browser.conftest import ROOM
from tests.conftest import Server, encode, nuclei, serving

STRICT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pytest.fixture
def docs(page: Page, server: Server) -> Page:
    """The documentation, under a policy that is stricter than the service's own."""

    def strictly(route: Route) -> None:
        answer = route.fetch()
        headers = {**answer.headers, "content-security-policy": STRICT}
        route.fulfill(response=answer, headers=headers)

    page.route("**/docs", strictly)
    page.goto(f"{server.url}/docs")
    page.wait_for_selector("article")
    return page


def article(page: Page, name: str) -> Locator:
    return page.locator("article").filter(has=page.locator("h3 code", has_text=name)).first


def test_every_route_with_its_parameters_bodies_and_answers(docs: Page, server: Server) -> None:
    api = httpx.get(f"{server.url}/openapi.json").json()
    shown = docs.locator("article h3 code").all_inner_texts()
    assert sorted(shown) == sorted(
        f"{method.upper()} {path}" for path, methods in api["paths"].items() for method in methods
    )
    segment = article(docs, "POST /segment").inner_text()
    about = api["paths"]["/segment"]["post"]
    for word in (
        *(each["name"] for each in about["parameters"]),
        *about["requestBody"]["content"],
        *about["responses"],
        *("number from 0 to 1", "polygons", "default mask"),
    ):
        assert word in segment, word
    docs.locator("a[href='#Problem']").first.click()
    assert docs.url.endswith("#Problem")
    assert "request_id" in docs.locator("article#Problem").inner_text()


def test_the_command_line_does_what_the_form_does(
    docs: Page, server: Server, tmp_path: Path
) -> None:
    data = encode(nuclei(60, 90)[0])
    (tmp_path / "it's.png").write_bytes(data)
    segment = article(docs, "POST /segment")
    segment.locator("summary").first.click()
    segment.get_by_label("threshold").fill("0.4")
    segment.get_by_label("output").select_option("overlay")
    segment.get_by_label("files").set_input_files(tmp_path / "it's.png")
    segment.get_by_role("button", name="Send").click()
    segment.locator(".answer img").wait_for()
    assert "200 OK" in segment.locator(".answer").inner_text()
    size = segment.locator(".answer img").evaluate("e => [e.naturalWidth, e.naturalHeight]")
    assert size == [90, 60]
    expected = httpx.post(
        f"{server.url}/segment",
        params={"threshold": 0.4, "output": "overlay"},
        content=data,
        headers={"Content-Type": "image/png"},
    ).content
    for kind in ("multipart/form-data", "image/*", "application/octet-stream"):
        segment.get_by_label("Content-Type").select_option(kind)
        words = shlex.split(segment.locator(".example code").inner_text())
        assert words[0] == "curl"
        if shutil.which("curl"):
            subprocess.run([*words, "-s"], cwd=tmp_path, check=True, timeout=60)
            assert (tmp_path / "answer.png").read_bytes() == expected
            (tmp_path / "answer.png").unlink()
    segment.get_by_label("Accept").select_option("application/json")
    segment.get_by_role("button", name="Send").click()
    segment.locator(".answer pre").wait_for()
    assert json.loads(segment.locator(".answer pre").inner_text())["images"][0]["width"] == 90


def test_documents_as_bodies_may_contain_themselves(page: Page, server: Server) -> None:
    tree = {
        "type": "object",
        "required": ["name", "shape", "children"],
        "properties": {
            "name": {"type": "string", "description": "of the `tree`"},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "children": {"type": "array", "items": {"$ref": "#/components/schemas/Tree"}},
            "left": {"type": "boolean"},
        },
    }
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Tree"}}}}
    api = {
        "info": {"title": "trees", "version": "1"},
        "paths": {"/segment": {"post": {"requestBody": body, "responses": {}}}},
        "components": {"schemas": {"Tree": tree}},
    }
    page.route("**/openapi.json", lambda route: route.fulfill(json=api))
    page.goto(f"{server.url}/docs")
    plant = article(page, "POST /segment")
    assert "Tree" in plant.get_by_label("Body", exact=True).first.inner_text()
    assert "may be left out" in page.locator("article#Tree").inner_text()
    plant.locator("summary").first.click()
    assert not plant.get_by_label("files").is_visible()
    sample = json.loads(plant.get_by_label("body", exact=True).last.input_value())
    assert (sample["name"], sample["shape"]) == ("", [0])
    assert sample["children"][0]["shape"] == [0]
    plant.get_by_label("body", exact=True).last.fill('{"name": "it\'s"}')
    words = shlex.split(plant.locator(".example code").inner_text())
    assert words[words.index("--data-binary") + 1] == '{"name": "it\'s"}'
    assert words[words.index("-H") + 1] == "Content-Type: application/json"
    plant.get_by_role("button", name="Send").click()
    plant.locator(".answer pre").wait_for()  # the service's word on JSON
    assert "422" in plant.locator(".answer p").inner_text()


def test_a_refusal_is_shown_as_it_is(docs: Page) -> None:
    segment = article(docs, "POST /segment")
    segment.locator("summary").first.click()
    segment.get_by_role("button", name="Send").click()
    segment.locator("text=Choose a file first.").wait_for()
    file = {"name": "notes.png", "mimeType": "image/png", "buffer": b"<script>alert(1)</script>"}
    segment.get_by_label("files").set_input_files([file])
    segment.get_by_role("button", name="Send").click()
    segment.locator(".answer pre").wait_for()
    assert "422" in segment.locator(".answer p").inner_text()
    assert json.loads(segment.locator(".answer pre").inner_text())["status"] == 422


def test_parts_of_a_path_are_filled_in(docs: Page) -> None:
    model = article(docs, "GET /models/{name}")
    assert model.locator(".example code").inner_text().endswith("/models/NAME")
    model.locator("summary").first.click()
    model.get_by_label("name", exact=True).fill("nuclei")
    assert model.locator(".example code").inner_text().endswith("/models/nuclei")
    model.get_by_role("button", name="Send").click()
    model.locator(".answer pre").wait_for()
    assert json.loads(model.locator(".answer pre").inner_text())["name"] == "nuclei"


def test_a_key_is_sent_but_not_shown(browser: Browser, tiny: Path) -> None:
    with serving(UNET_API_KEYS="sesame", UNET_WEIGHTS_DIR=str(tiny)) as closed:
        page = browser.new_page()
        page.set_default_timeout(ROOM)
        page.goto(f"{closed.url}/docs")
        page.fill("#key", "sesame")
        models = article(page, "GET /models")
        assert "X-API-Key: KEY" in models.locator(".example code").inner_text()
        models.locator("summary").first.click()
        models.get_by_role("button", name="Send").click()
        models.locator("text=200 OK").wait_for()
        assert "sesame" not in page.inner_text("body")
        page.close()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_sticks_out_on_a_small_screen(docs: Page, width: int) -> None:
    docs.set_viewport_size({"width": width, "height": 800})
    for summary in docs.locator("article > details > summary").all():
        summary.click()
    assert docs.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_and_every_id_is_one(docs: Page) -> None:
    unnamed = docs.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, a')]
            .filter((e) => !e.textContent.trim() && !e.getAttribute('aria-label'))
            .filter((e) => !e.labels?.length)
            .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    ids = docs.evaluate("() => [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
