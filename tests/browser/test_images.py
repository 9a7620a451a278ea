"""Images that browsers show wrongly, and masks that they cannot show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, Route

from tests.browser.conftest import (
    canvas_pixels,
    choose_files,
    send_mask,
    send_problem,
    square_mask,
    wait_done,
    wait_drawn,
)
from tests.conftest import decode, encode, nuclei


def image_pixels(page: Page) -> np.ndarray:
    """The pixels of the viewer without the overlay, (H, W, 3)."""
    wait_drawn(page)
    if page.get_attribute("#overlay", "aria-pressed") == "true":
        page.click("#overlay")
    return canvas_pixels(page)[..., :3].astype(int)


def test_sixteen_bit_png_is_shown_over_its_full_range(page: Page) -> None:
    grey = nuclei(60, 80)[0]
    grey[0, 0], grey[0, 1] = 0, 255
    choose_files(page, ("camera.png", encode(grey.astype(np.uint16) * 16)))  # as of a 12-bit camera
    wait_done(page)
    assert "8 of 16 bits" in page.inner_text("#note")
    assert np.abs(image_pixels(page) - grey[..., None]).max() <= 1


def test_orientation_that_browsers_ignore_is_applied(page: Page) -> None:
    grey = nuclei(40, 90)[0]
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees
    data = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(data, "WEBP", lossless=True, exif=exif)
    choose_files(page, ("phone.webp", data.getvalue()))
    wait_done(page)
    shown = image_pixels(page)
    assert shown.shape[:2] == (90, 40)
    assert np.abs(shown - np.rot90(grey, -1)[..., None]).max() <= 1


@pytest.mark.parametrize("error", ["problem", "damaged"])
def test_mask_is_kept_if_the_image_cannot_be_drawn(page: Page, error: str) -> None:
    mask = square_mask(50, 70)

    def serve(route: Route) -> None:
        if "overlay" not in route.request.url:
            return send_mask(route, mask)
        if error == "problem":
            return send_problem(route, 422, "overlay failed")
        return send_mask(route, b"not an image")

    page.route("**/segment*", serve)
    choose_files(page, ("a.tif", encode(nuclei(50, 70)[0], "TIFF")))
    wait_done(page)
    assert "the image cannot be shown" in page.inner_text("#note")
    assert page.is_visible("#stage")
    page.keyboard.press("m")
    assert (canvas_pixels(page)[..., 0] == decode(mask)).all()
    with page.expect_download() as event:
        page.click("#download")
    assert Path(event.value.path()).read_bytes() == mask


def test_mask_larger_than_a_canvas_can_be_downloaded(page: Page) -> None:
    mask = encode(np.zeros((20, 70_000), np.uint8))
    page.route("**/segment*", lambda route: send_mask(route, mask))
    choose_files(page, ("long.png", mask))
    wait_done(page)
    assert "can be downloaded" in page.inner_text("#note")
    assert not page.is_visible("#stage")
    with page.expect_download() as event:
        page.click("#download")
    assert Path(event.value.path()).read_bytes() == mask


def test_unknown_facts_have_no_row(page: Page) -> None:
    page.route(
        "**/segment*",
        lambda route: route.fulfill(status=200, body=square_mask(), content_type="image/png"),
    )
    choose_files(page, ("a.png", encode(nuclei(64, 64)[0])))
    wait_done(page)
    terms = page.locator("#facts dt").all_inner_texts()
    assert set(terms) <= {"Size", "Time", "Model"}
    assert not {"NaN", "null"} & set(page.inner_text("#facts").split())
