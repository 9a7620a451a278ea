"""How the page reaches the service: model list, API key, path prefix, policy."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.conftest import (
    PREFIX,
    TIMEOUT_MS,
    advance_until,
    always_send_mask,
    choose_files,
    send_mask,
    settings_of,
    wait_done,
    wait_finished,
)
from tests.conftest import Server, encode, nuclei

CELLS = encode(nuclei(64, 64)[0])


def model_entry(name: str, ready: bool = True) -> dict[str, object]:
    """An entry of /models; model "a" is the default."""
    entry: dict[str, object] = {"name": name, "ready": ready, "default": name == "a", "error": None}
    if ready:
        entry |= {"classes": ["background", name], "id": f"{name}@1", "device": "cpu"}
        entry |= {"threshold": 0.4}
    return entry


def test_selected_model_is_kept_while_another_loads(page: Page) -> None:
    requests: list[Route] = []

    def models(route: Route) -> None:
        requests.append(route)
        entries = [model_entry("a"), model_entry("b"), model_entry("c", ready=len(requests) > 3)]
        route.fulfill(json={"default": "a", "models": entries})

    page.route("**/models", models)
    page.clock.install()  # the page asks again every second
    page.reload()
    page.wait_for_selector("#model", state="visible")
    assert page.input_value("#threshold") == "0.4"
    page.select_option("#model", "b")
    loaded = page.locator("#model option[value=c]")
    advance_until(page, lambda: loaded.count() > 0, step_ms=1_000)
    assert len(requests) == 4
    assert page.input_value("#model") == "b"


def test_changed_model_applies_to_the_shown_image_and_on_request_to_all(page: Page) -> None:
    entries = [model_entry("a"), model_entry("b"), model_entry("c")]
    used: list[str | None] = []

    def serve(route: Route) -> None:
        used.append(settings_of(route).get("model"))
        send_mask(route)

    page.route("**/models", lambda route: route.fulfill(json={"default": "a", "models": entries}))
    page.route("**/segment*", serve)
    page.reload()
    page.wait_for_selector("#model", state="visible")
    page.select_option("#model", "b")
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(4)])
    wait_done(page, 4)
    assert used == ["b"] * 4
    assert not page.is_visible("#apply-all")
    page.select_option("#model", "c")
    wait_finished(page)
    assert used[4:] == ["c"]
    page.click("#strip li:nth-child(2) button")
    assert page.input_value("#model") == "b"
    page.click("#strip li:nth-child(1) button")
    page.click("#apply-all")
    wait_finished(page)
    assert used[5:] == ["c"] * 3
    choose_files(page, ("new.png", CELLS))
    wait_done(page, 5)
    assert used[8:] == ["c"]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (None, "The server cannot be reached."),
        (502, "The server cannot be reached."),
        (503, "The server is restarting."),
    ],
)
def test_header_follows_the_server_while_nothing_is_sent(
    clocked_page: Page, expected_errors: list[str], status: int | None, text: str
) -> None:
    expected_errors += ["ERR_CONNECTION_REFUSED", "502", "503"]
    page = clocked_page
    line = page.locator("#service")
    expect(line).to_have_text("Ready. Finds cell nuclei.")

    def fail(route: Route) -> None:
        route.fulfill(status=status) if status else route.abort("connectionrefused")

    page.route("**/readyz", fail)
    page.evaluate("dispatchEvent(new Event('offline'))")  # probes at once
    expect(line).to_have_text(text)
    page.route(
        "**/models", lambda route: route.fulfill(json={"models": [model_entry("a")]})
    )  # another service than before
    page.unroute("**/readyz")
    advance_until(page, lambda: line.inner_text() != text, step_ms=1_000)
    expect(line).to_have_text("Ready. Finds a.")
    page.route("**/readyz", fail)
    advance_until(page, lambda: line.inner_text() == text, step_ms=1_000)


def test_header_agrees_with_the_reason_why_images_wait(
    clocked_page: Page, expected_errors: list[str]
) -> None:
    expected_errors += ["ERR_CONNECTION_REFUSED"]
    page = clocked_page
    line = page.locator("#service")
    expect(line).to_have_text("Ready. Finds cell nuclei.")
    for path in ("segment*", "livez", "readyz"):
        page.route(f"**/{path}", lambda route: route.abort("connectionrefused"))
    choose_files(page, ("a.png", CELLS))
    expect(page.locator("#waiting")).to_contain_text("The server cannot be reached.")
    expect(line).to_have_text("The server cannot be reached.")
    page.click("#stop")
    page.wait_for_timeout(200)
    expect(line).to_have_text("The server cannot be reached.")  # nothing is sent any more
    for path in ("segment*", "livez", "readyz"):
        page.unroute(f"**/{path}")
    page.route("**/segment*", always_send_mask)
    page.click("#resume")
    advance_until(page, lambda: line.inner_text() != "The server cannot be reached.", step_ms=500)
    expect(line).to_have_text("Ready. Finds cell nuclei.")
    wait_done(page)


def test_key_form_is_shown_until_the_key_is_accepted(browser: Browser, closed: Server) -> None:
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(closed.url)
    page.fill("#key", "wrong")
    page.click("#key-form button")
    expect(page.locator("#key-note")).to_have_text("The server rejected this key.")
    page.fill("#key", "sesame")
    page.click("#key-form button")
    page.wait_for_selector("text=Finds cell nuclei")
    assert not page.is_visible("#key-form")
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    page.close()


def test_key_form_rejects_characters_that_no_header_can_carry(
    page: Page, expected_errors: list[str]
) -> None:
    expected_errors.append("401")

    def models(route: Route) -> None:
        if route.request.headers.get("x-api-key") != "good":
            return route.fulfill(status=401, body="{}")
        return route.fulfill(json={"default": "a", "models": [model_entry("a")]})

    page.route("**/models", models)
    page.route("**/segment*", always_send_mask)
    page.evaluate("sessionStorage.setItem('unet-api-key', '“kept”')")
    page.reload()
    page.wait_for_selector("#key", state="visible")
    assert page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "“good”")
    page.keyboard.press("Enter")
    assert "“" in page.inner_text("#key-note")
    assert page.is_visible("#key-form")
    assert page.evaluate("sessionStorage.getItem('unet-api-key')") is None
    page.fill("#key", "good")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Finds a")
    assert not page.is_visible("#key-form")
    choose_files(page, ("a.png", CELLS))
    wait_done(page)


def test_page_works_behind_a_path_prefix(prefixed_page: Page) -> None:
    page = prefixed_page
    page.goto(f"{PREFIX}/")
    page.wait_for_selector("text=Finds cell nuclei")
    page.click("[data-sample*=fluorescence]")
    wait_done(page)
    assert f"{PREFIX}/segment" in page.inner_text("#curl")
    page.click("text=API")
    page.wait_for_url(f"{PREFIX}/docs")


def test_prefix_without_its_slash_is_completed(
    prefixed_page: Page, expected_errors: list[str]
) -> None:
    expected_errors += ["lab.example/static", "404"]  # requested before the script runs
    page = prefixed_page
    page.goto(f"{PREFIX}?a=b")
    page.wait_for_url(f"{PREFIX}/?a=b")
    page.wait_for_selector("text=Finds cell nuclei")


@pytest.mark.parametrize(
    ("path", "scripts", "images"),
    [
        ("/", "script-src 'self'", "img-src 'self'"),
        ("/docs", "script-src 'self'", "img-src 'self' blob: data:"),
    ],
)
def test_policy_allows_this_servers_files_only(
    server: Server, path: str, scripts: str, images: str
) -> None:
    response = httpx.get(server.url + path)
    assert sorted(response.headers["content-security-policy"].split("; ")) == sorted(
        [
            "default-src 'none'",
            "style-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'self'",
            scripts,
            images,
        ]
    )


def test_policy_blocks_inline_scripts(page: Page, expected_errors: list[str]) -> None:
    expected_errors.append("Content Security Policy")
    page.evaluate(
        """() => {
            const script = document.createElement('script');
            script.textContent = 'window.injected = true';
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.injected") is None
