"""How the page finds the service: behind a prefix, with a key, and with which model."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route

from tests.browser.conftest import ROOM, always, answer, choose, done, over
from tests.conftest import Server, encode, nuclei

CELLS = encode(nuclei(64, 64)[0])


def described(name: str, ready: bool = True) -> dict[str, object]:
    """A model, as /models tells of it."""
    about: dict[str, object] = {"name": name, "ready": ready, "default": name == "a", "error": None}
    if ready:
        about |= {"classes": ["background", name], "id": f"{name}@1", "device": "cpu"}
        about |= {"threshold": 0.4}
    return about


def test_the_chosen_model_stays_while_another_loads(page: Page) -> None:
    asked: list[Route] = []
    queries: list[str] = []

    def models(route: Route) -> None:
        asked.append(route)
        each = [described("a"), described("b"), described("c", ready=len(asked) > 3)]
        route.fulfill(json={"default": "a", "models": each})

    def serve(route: Route) -> None:
        queries.append(route.request.url.partition("?")[2])
        answer(route)

    page.route("**/models", models)
    page.route("**/segment*", serve)
    page.reload()
    page.wait_for_selector("#model", state="visible")
    assert "0.4" in (page.get_attribute("#threshold", "placeholder") or "")
    page.select_option("#model", "b")
    page.wait_for_selector("#model option[value=c]", state="attached")
    assert page.input_value("#model") == "b"
    held: list[Route] = []
    page.unroute("**/segment*")
    page.route("**/segment*", lambda route: held.append(route))
    choose(page, *[(f"{n}.png", CELLS) for n in range(4)])
    page.wait_for_function("document.querySelectorAll('[data-state=working]').length === 3")
    assert "Model\nb" in page.inner_text("#facts")
    page.select_option("#model", "c")  # for what comes, not for what waits
    while len(held) < 3:
        page.wait_for_timeout(20)
    page.unroute("**/segment*")
    page.route("**/segment*", serve)
    queries += [route.request.url.partition("?")[2] for route in held]
    for route in held:
        answer(route)
    done(page, 4)
    assert queries == ["output=mask&model=b"] * 4
    page.click("#again")
    over(page)
    assert queries[4:] == ["output=mask&model=c"] * 4


def test_a_key_that_cannot_be_sent_is_refused_in_the_form(page: Page, tolerated: list[str]) -> None:
    tolerated.append("401")

    def models(route: Route) -> None:
        if route.request.headers.get("x-api-key") != "good":
            return route.fulfill(status=401, body="{}")
        return route.fulfill(json={"default": "a", "models": [described("a")]})

    page.route("**/models", models)
    page.route("**/segment*", always)
    page.evaluate("sessionStorage.setItem('unet-api-key', '“kept”')")  # by an older page
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
    page.wait_for_selector("text=finds: a")
    assert not page.is_visible("#key-form")
    choose(page, ("a.png", CELLS))
    done(page)


def test_the_page_works_behind_a_prefix(browser: Browser, server: Server) -> None:
    page = browser.new_page()
    page.set_default_timeout(ROOM)
    outside: list[str] = []

    def proxy(route: Route) -> None:
        path = route.request.url.removeprefix("http://lab.example")
        if not path.startswith("/unet/"):
            outside.append(path)
            return route.fulfill(status=404)
        if path.startswith("/unet/segment"):
            return answer(route)
        theirs = httpx.get(server.url + path.removeprefix("/unet"))
        kept = ("content-type", "content-security-policy")
        headers = {name: theirs.headers[name] for name in kept if name in theirs.headers}
        return route.fulfill(status=theirs.status_code, body=theirs.content, headers=headers)

    page.route("**/*", proxy)
    page.goto("http://lab.example/unet/")
    page.wait_for_selector("text=finds: nucleus")
    page.click("[data-sample*=fluorescence]")
    done(page)
    assert "http://lab.example/unet/segment" in page.inner_text("#curl")
    page.click("text=API")
    page.wait_for_selector("article h3")
    assert "http://lab.example/unet/" in (page.locator(".example code").first.text_content() or "")
    assert outside == []
    page.close()


@pytest.mark.parametrize("name", ["files", "folder"])
def test_the_ring_is_around_the_button_that_has_the_focus(page: Page, name: str) -> None:
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == name:
            break
    ringed = page.evaluate(
        """() => [...document.querySelectorAll('label.button')]
            .filter((each) => getComputedStyle(each).outlineStyle !== 'none')
            .map((each) => each.htmlFor)"""
    )
    assert ringed == [name]
