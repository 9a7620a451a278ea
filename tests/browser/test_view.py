"""The picture: zoom, pan, wipe, colors, and the preview of a threshold."""

from __future__ import annotations

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import (
    canvas_pixels,
    choose_files,
    read_table,
    save_file,
    saved_view,
    show,
    unzip,
    wait_done,
    wait_drawn,
    wait_finished,
)
from tests.browser.results import send_many, to_screen
from tests.conftest import encode, nuclei


def test_zoom_and_pan_by_mouse_keys_and_buttons(page: Page) -> None:
    page.click("[data-sample*=fluorescence]")
    wait_done(page)
    wait_drawn(page)
    zoom = lambda: int(page.inner_text("#zoom").removesuffix("%"))  # noqa: E731
    fitted, before = zoom(), canvas_pixels(page)
    page.mouse.move(*to_screen(page, 256, 256))
    page.mouse.wheel(0, -300)
    near = canvas_pixels(page)
    assert zoom() > fitted * 1.5
    page.mouse.down()
    page.mouse.move(700, 300, steps=4)
    page.mouse.up()
    assert (canvas_pixels(page) != near).any()
    assert not page.is_visible("#object")  # a drag is not a click
    page.click("#zoom-one")
    canvas_pixels(page)
    assert zoom() == 100
    page.click("#zoom-fit")
    assert (canvas_pixels(page) == before).all()
    page.dblclick("#canvas")
    canvas_pixels(page)
    assert zoom() == pytest.approx(2 * fitted, abs=2)
    page.focus("#stage")
    for key, expected in (("1", 100), ("0", fitted), ("+", fitted * 1.3), ("-", fitted)):
        page.keyboard.press(key)
        canvas_pixels(page)
        assert zoom() == pytest.approx(expected, abs=2)
    page.keyboard.press("Escape")  # the double-click has selected an object
    page.keyboard.press("n")
    expect(page.locator("#object-text")).to_contain_text("#1 ")
    page.keyboard.press("Delete")
    assert "1 deleted" in page.inner_text("#undelete")


def test_hold_to_hide_wipe_and_contrast(page: Page) -> None:
    choose_files(page, ("dim.png", encode(nuclei(120, 200)[0] // 6)))
    wait_done(page)
    wait_drawn(page)
    with_objects = canvas_pixels(page)
    page.hover("#hide")
    page.mouse.down()
    plain = canvas_pixels(page)
    page.mouse.up()
    assert (canvas_pixels(page) == with_objects).all()
    center = plain[plain.shape[0] // 2 - 50 : plain.shape[0] // 2 + 50, 300:400]
    assert (center[..., 0] == center[..., 1]).all()  # grey, so without colors
    page.fill("#wipe", "50")
    wiped = canvas_pixels(page)
    middle = wiped.shape[1] // 2
    assert (wiped[:, : middle - 2] == with_objects[:, : middle - 2]).all()
    assert (wiped[:, middle + 2 :] == plain[:, middle + 2 :]).all()
    page.fill("#wipe", "100")
    show(page, "image")
    page.check("#contrast")
    for _ in range(50):  # a worker computes it
        brightest = int(canvas_pixels(page)[..., :3].max())
        if brightest > 2 * int(plain[..., :3].max()):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"the brightest value is {brightest}")


def test_overlay_has_the_chosen_color_and_opacity(page: Page) -> None:
    page.route("**/segment*", send_many)
    choose_files(page, ("black.png", encode(np.zeros((512, 512), np.uint8))))
    wait_done(page)
    page.select_option("#colors", "one")
    page.fill("#color", "#00ff00")
    page.fill("#opacity", "50")
    found = saved_view(page, "fill")
    inside = found[8::32, 24::32]  # the middles of squares
    assert (np.abs(inside - (0, 128, 0)) <= 1).all()
    page.select_option("#colors", "each")
    assert len(np.unique(saved_view(page, "fill")[8::32, 24::32].reshape(-1, 3), axis=0)) > 100


def test_threshold_is_previewed_at_once_and_applied_on_release(page: Page) -> None:
    sent: list[str] = []
    page.on(
        "request", lambda request: sent.append(request.url) if "segment" in request.url else None
    )
    page.click("[data-sample*=fluorescence]")
    page.click("[data-sample*=histology]")
    wait_done(page, 2)
    page.click("#strip [title='fluorescence.png']")
    wait_drawn(page)
    count, before = page.inner_text("#count"), canvas_pixels(page)
    drag = """(value) => {
        const slider = document.getElementById('threshold');
        slider.value = value;
        slider.dispatchEvent(new Event('input', {bubbles: true}));
    }"""
    page.evaluate(drag, 0.1)
    expect(page.locator("#threshold-value")).to_have_text("0.10")
    page.wait_for_timeout(200)
    low = canvas_pixels(page)
    assert (low != before).any()
    page.evaluate(drag, 0.95)
    page.wait_for_timeout(200)
    high = canvas_pixels(page)
    tinted = [(each[..., 0] > each[..., 1].astype(int) + 20).sum() for each in (low, high)]
    assert tinted[0] > tinted[1] > 0
    assert len(sent) == 2  # no request until the slider is released
    page.evaluate(
        "document.getElementById('threshold').dispatchEvent(new Event('change', {bubbles: true}))"
    )
    expect(page.locator("#count")).not_to_have_text(count)
    wait_finished(page)
    assert "threshold=0.95" in sent[2]
    page.click("#apply-all")
    expect(page.locator("#apply-all")).to_be_hidden()
    wait_finished(page)
    assert "threshold=0.95" in sent[3]
    rows = read_table(unzip(save_file(page, "#download-all")[1]))
    assert [row["threshold"] for row in rows] == ["0.95", "0.95"]
