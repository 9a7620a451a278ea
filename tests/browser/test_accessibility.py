"""Accessibility of the page: axe-core, forced colors, reduced motion, and what is announced."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from tests.browser.conftest import choose_files, wait_done, wait_drawn
from tests.conftest import encode, nuclei

CELLS = encode(nuclei(120, 200)[0])


def violations(page: Page) -> list[str]:
    """List what axe-core finds, with the elements."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_any_state(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.wait_for_selector("#model option", state="attached")
    assert violations(page) == []
    choose_files(page, ("cells.png", CELLS), ("broken.png", b"not an image"))
    wait_done(page)
    page.wait_for_selector("#strip [data-state=failed]")
    page.click("#strip [data-state=done]")
    wait_drawn(page)
    page.click("#table tbody tr:first-child button")
    page.click("#details summary")
    assert violations(page) == []
    for button in ("#choose-outputs", "#about-open"):
        page.click(button)
        assert violations(page) == []
        page.keyboard.press("Escape")
    page.click("#strip [data-state=failed]")
    assert violations(page) == []


def test_pressed_buttons_are_visible_in_forced_colors(page: Page) -> None:
    page.emulate_media(forced_colors="active")
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    colors = [
        page.eval_on_selector(f"[data-shown={name}]", "(e) => getComputedStyle(e).backgroundColor")
        for name in ("fill", "outline")
    ]
    assert colors[0] != colors[1]


def test_nothing_moves_with_reduced_motion(page: Page) -> None:
    page.emulate_media(reduced_motion="reduce")
    page.route("**/segment*", lambda route: None)
    choose_files(page, ("cells.png", CELLS))
    page.wait_for_selector("#strip [data-state=working]")
    animation = page.eval_on_selector(
        "#strip button", "(e) => getComputedStyle(e, '::after').animationName"
    )
    assert animation == "none"


def test_picture_is_described(page: Page) -> None:
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    wait_drawn(page)
    description = page.text_content("#description")
    assert description is not None
    assert description.startswith("Image of 200 by 120 pixels with")
    assert "median" in description
    assert page.get_attribute("#canvas", "aria-labelledby") == "description"
