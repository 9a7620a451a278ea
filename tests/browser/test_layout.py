"""One screen on desktops and phones, and every control by keyboard."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import canvas_pixels, choose_files, wait_done, wait_drawn
from tests.browser.results import CELLS, send_many


@pytest.mark.parametrize("width", [320, 390, 768])
def test_page_fits_a_small_screen(page: Page, width: int) -> None:
    page.route("**/segment*", send_many)
    page.set_viewport_size({"width": width, "height": 800})
    page.click("[data-sample*=histology]")
    wait_done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_result_controls_and_downloads_are_on_one_screen(page: Page) -> None:
    page.route("**/segment*", send_many)
    page.click("[data-sample*=histology]")
    wait_done(page)
    for part in ("#strip", "#canvas", "#tools", "#count", "#threshold", "#table", "#download"):
        box = page.locator(part).bounding_box()
        assert box is not None
        assert box["y"] >= 0
        assert box["x"] + box["width"] <= 1440
    assert page.locator("#drop").bounding_box()["height"] < 60  # type: ignore[index]
    for part in ("#canvas", "#download", "#status", "#clear"):
        box = page.locator(part).bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 900
    assert page.evaluate("document.documentElement.scrollHeight") <= 900
    assert page.locator("#canvas").bounding_box()["height"] > 500  # type: ignore[index]


def tab(page: Page) -> str:
    """Press Tab; return the id of the focused control, or its text if it has no id."""
    page.keyboard.press("Tab")
    name: str = page.evaluate(
        "() => document.activeElement.id || document.activeElement.textContent.trim()"
    )
    return name


def test_every_control_works_by_keyboard(page: Page) -> None:
    """Visits the controls from top to bottom and uses each with the usual keys."""
    page.route("**/segment*", send_many)
    press = page.keyboard.press
    page.on("filechooser", lambda _: None)  # expect_file_chooser alone misses the second dialog
    page.wait_for_selector("#model option", state="attached")
    assert tab(page) == "about-open"
    press("Enter")
    assert page.is_visible("#about")
    press("Escape")
    assert tab(page) == "API"
    for name in ("files", "folder"):
        assert tab(page) == name
        with page.expect_file_chooser():
            press("Space")
    assert tab(page) == "model"
    for key, chosen in (("ArrowDown", "person"), ("ArrowUp", "nuclei")):
        press(key)
        assert page.input_value("#model") == chosen
    assert tab(page) == "threshold"
    for count, name in enumerate(("fluorescence", "histology"), start=1):
        assert tab(page) == f"Sample: {name}"
        press("Enter")
        wait_done(page, count)
    assert tab(page) == "clear"
    assert tab(page).endswith("histology.jpg")  # the strip is one tab stop
    for key, name in (("ArrowUp", "fluorescence.png"), ("ArrowDown", "histology.jpg")):
        press(key)
        assert page.inner_text("#name") == name
        wait_drawn(page)
    for name in ("Filled", "Outlines", "Mask", "Image"):
        assert tab(page) == name
        before = canvas_pixels(page)
        press("Enter")
        assert (canvas_pixels(page) != before).any() == (name != "Filled")
    page.focus("[data-shown=fill]")
    press("Enter")
    page.focus("[data-shown=image]")
    assert tab(page) == "hide"
    before = canvas_pixels(page)
    page.keyboard.down("Space")
    assert (canvas_pixels(page) != before).any()
    page.keyboard.up("Space")
    for name in ("zoom-out", "zoom-in", "zoom-fit", "zoom-one"):
        assert tab(page) == name
        press("Enter")
    for name in ("opacity", "colors", "contrast", "wipe", "stage"):
        assert tab(page) == name
    for name in ("shortcuts", "remove", "model", "threshold"):
        assert tab(page) == name
    for name in ("min-area", "max-area", "min-score", "exclude-edges", "pixel-size", "table-box"):
        assert tab(page) == name
    page.focus("#details summary")
    assert tab(page) == "download"
    with page.expect_download() as download:
        press("Enter")
    assert download.value.suggested_filename == "histology-mask.png"
    page.wait_for_selector("#download-all:enabled")
    page.focus("#download")
    assert tab(page) == "download-all"
    assert tab(page) == "choose-outputs"
    press("Enter")
    assert page.is_visible("#outputs")
    press("Escape")
    assert page.evaluate("document.activeElement.id") == "choose-outputs"
    page.focus("#clear")  # last, because it hides the controls
    press("Enter")
    page.wait_for_selector("#work", state="hidden")
    assert page.evaluate("document.activeElement.id") == "files"


def test_single_letters_do_nothing_outside_the_picture(page: Page) -> None:
    page.route("**/segment*", send_many)
    page.click("[data-sample*=histology]")
    wait_done(page)
    page.focus("#zoom-fit")
    before = canvas_pixels(page)
    for key in ("o", "l", "m", "h", "n", "1", "+", "Delete"):
        page.keyboard.press(key)
    assert (canvas_pixels(page) == before).all()


def test_character_keys_can_be_turned_off(page: Page) -> None:
    page.route("**/segment*", send_many)
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    wait_drawn(page)
    page.uncheck("#shortcuts")
    page.focus("#stage")
    before = canvas_pixels(page)
    for key in ("n", "+", "1", "h"):
        page.keyboard.press(key)
    assert (canvas_pixels(page) == before).all()
    assert not page.is_visible("#object")
    page.keyboard.press("ArrowRight")
    assert (canvas_pixels(page) != before).any()
    page.reload()
    assert not page.is_checked("#shortcuts")
    page.evaluate("localStorage.clear()")


@pytest.mark.parametrize("name", ["files", "folder"])
def test_focused_file_button_has_a_focus_ring(page: Page, name: str) -> None:
    for _ in range(10):
        if tab(page) == name:
            break
    ringed = page.evaluate(
        """() => [...document.querySelectorAll('label.button')]
            .filter((each) => getComputedStyle(each).outlineStyle !== 'none')
            .map((each) => each.htmlFor)"""
    )
    assert ringed == [name]


def test_every_control_has_an_accessible_name(page: Page) -> None:
    page.route("**/segment*", send_many)
    page.click("[data-sample*=histology]")
    wait_done(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, a')]
            .filter((e) => !e.textContent.trim() && !e.getAttribute('aria-label'))
            .filter((e) => !e.labels?.length)
            .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
