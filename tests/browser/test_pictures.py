"""Images that a browser shows wrongly, and masks that it cannot show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, Route

from tests.browser.conftest import answer, canvas, choose, done, drawn, refuse, square
from tests.conftest import decode, encode, nuclei


def plain(page: Page) -> np.ndarray:
    """The image as it is shown, without its mask."""
    drawn(page)
    if page.get_attribute("#overlay", "aria-pressed") == "true":
        page.click("#overlay")
    return canvas(page)[..., :3].astype(int)


def test_a_png_of_16_bits_is_shown_over_its_range(page: Page) -> None:
    grey = nuclei(60, 80)[0]
    grey[0, 0], grey[0, 1] = 0, 255
    choose(page, ("camera.png", encode(grey.astype(np.uint16) * 16)))  # of 12 bits
    done(page)
    assert "16 bits" in page.inner_text("#note")
    assert np.abs(plain(page) - grey[..., None]).max() <= 1


def test_what_a_browser_does_not_turn_is_turned(page: Page) -> None:
    grey = nuclei(40, 90)[0]
    turned = Image.Exif()
    turned[274] = 6
    data = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(data, "WEBP", lossless=True, exif=turned)
    choose(page, ("phone.webp", data.getvalue()))
    done(page)
    shown = plain(page)
    assert shown.shape[:2] == (90, 40)
    assert np.abs(shown - np.rot90(grey, -1)[..., None]).max() <= 1


@pytest.mark.parametrize("trouble", ["refused", "damaged"])
def test_a_mask_outlives_its_picture(page: Page, trouble: str) -> None:
    mask = square(50, 70)

    def serve(route: Route) -> None:
        if "overlay" not in route.request.url:
            return answer(route, mask)
        if trouble == "refused":
            return refuse(route, 422, "no overlay today")
        return answer(route, b"not a picture")

    page.route("**/segment*", serve)
    choose(page, ("a.tif", encode(nuclei(50, 70)[0], "TIFF")))
    done(page)
    assert "there is no picture" in page.inner_text("#note")
    assert page.is_visible("#stage")
    page.keyboard.press("m")
    assert (canvas(page)[..., 0] == decode(mask)).all()
    with page.expect_download() as event:
        page.click("#download")
    assert Path(event.value.path()).read_bytes() == mask


def test_a_mask_larger_than_a_canvas_can_be_downloaded(page: Page) -> None:
    mask = encode(np.zeros((20, 70_000), np.uint8))
    page.route("**/segment*", lambda route: answer(route, mask))
    choose(page, ("long.png", mask))
    done(page)
    assert "can be downloaded" in page.inner_text("#note")
    assert not page.is_visible("#stage")
    with page.expect_download() as event:
        page.click("#download")
    assert Path(event.value.path()).read_bytes() == mask


def test_facts_that_are_not_known_are_left_out(page: Page) -> None:
    page.route(
        "**/segment*",
        lambda route: route.fulfill(status=200, body=square(), content_type="image/png"),
    )
    choose(page, ("a.png", encode(nuclei(64, 64)[0])))
    done(page)
    terms = page.locator("#facts dt").all_inner_texts()
    assert set(terms) <= {"Size", "Time", "Model"}
    assert not {"NaN", "null"} & set(page.inner_text("#facts").split())
