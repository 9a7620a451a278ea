"""The page against a real service: masks, downloads, formats, keyboard and layout."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Page

from tests.browser.conftest import (
    canvas_pixels,
    choose_files,
    wait_done,
    wait_drawn,
    wait_finished,
)
from tests.conftest import Server, decode, encode, nuclei


def test_sample_shows_its_mask_and_facts(page: Page) -> None:
    page.click("[data-sample*=fluorescence]")
    wait_done(page)
    with_mask = canvas_pixels(page)
    page.click("#overlay")
    plain = canvas_pixels(page)
    assert with_mask.shape == plain.shape == (512, 512, 4)
    changed = (with_mask != plain).any(axis=2)
    assert 0.05 < changed.mean() < 0.6
    assert (plain[..., 0] == plain[..., 1]).all()  # grey, so without tint
    page.keyboard.press("o")
    assert (canvas_pixels(page) == with_mask).all()
    page.keyboard.press("l")
    outlined = (canvas_pixels(page) != plain).any(axis=2)
    assert 0 < outlined.mean() < changed.mean() / 2
    facts = page.inner_text("#facts")
    for word in ("512 × 512", "Foreground", "Time", "nuclei@", "int8"):
        assert word in facts
    assert "nucleus" in page.inner_text("#service")


def test_downloaded_mask_equals_the_response_of_the_service(page: Page, server: Server) -> None:
    data = encode(nuclei(120, 200)[0])
    choose_files(page, ("cells.png", data))
    wait_done(page)
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "cells-mask.png"
    content = Path(download.value.path()).read_bytes()
    headers = {"Content-Type": "image/png"}
    assert content == httpx.post(f"{server.url}/segment", content=data, headers=headers).content
    mask = decode(content)
    assert mask.shape == (120, 200)
    page.keyboard.press("m")
    assert (canvas_pixels(page)[..., 0] == mask).all()


def test_outlines_and_objects_can_be_downloaded(page: Page) -> None:
    choose_files(page, ("cells.png", encode(nuclei(120, 200)[0])))
    wait_done(page)
    found = {}
    for kind, name in (("polygons", "cells.geojson"), ("instances", "cells-instances.png")):
        page.select_option("#kind", kind)
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename == name
        found[kind] = Path(download.value.path()).read_bytes()
    features = json.loads(found["polygons"])["features"]
    assert len(features) == decode(found["instances"]).max() > 0


def test_failed_image_does_not_affect_the_others(page: Page, server: Server) -> None:
    images = [(f"{seed}.png", encode(nuclei(64, 96, seed)[0])) for seed in range(3)]
    choose_files(page, *images, ("notes.png", b"not an image"))
    wait_done(page, 3)
    page.wait_for_selector("#strip [data-state=failed]")
    page.click("#strip [data-state=failed]")
    problem = httpx.post(
        f"{server.url}/segment",
        content=b"not an image",
        headers={"Content-Type": "application/octet-stream"},
    )
    assert page.inner_text("#error") == problem.json()["detail"]
    assert page.is_disabled("#download")
    assert not page.is_visible("#stage")
    assert page.inner_text("#status") == "3 done, 1 failed"
    with page.expect_download() as download:
        page.click("#download-all")
    archive = zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))
    assert archive.testzip() is None
    masks = ["0-mask.png", "1-mask.png", "2-mask.png"]
    assert sorted(archive.namelist()) == [*masks, "results.csv"]
    assert decode(archive.read("1-mask.png")).shape == (64, 96)


@pytest.mark.parametrize("name", ["grey.tif", "sixteen bits.tif", "colours.tiff"])
def test_service_draws_formats_that_browsers_cannot_show(
    page: Page, server: Server, name: str
) -> None:
    grey = nuclei(100, 140)[0]
    grey[0, 0], grey[0, 1] = 0, 255  # the full range
    colours = np.dstack([grey, grey // 2, grey // 3])
    image, expected = {
        "grey.tif": (grey, np.dstack([grey, grey, grey])),
        "sixteen bits.tif": (grey.astype(np.uint16) * 257, np.dstack([grey, grey, grey])),
        "colours.tiff": (colours, colours),
    }[name]
    data = encode(image, "TIFF")
    choose_files(page, (name, data))
    wait_done(page)
    assert page.is_visible("#note")

    headers = {"Content-Type": "image/tiff"}
    url = f"{server.url}/segment"
    mask = decode(httpx.post(url, content=data, headers=headers).content) > 0
    assert 0.02 < mask.mean() < 0.8
    tinted = canvas_pixels(page)
    assert page.is_enabled("#overlay")
    page.click("#overlay")
    plain = canvas_pixels(page)[..., :3].astype(int)
    assert np.abs(plain - expected).max() <= 1
    page.click("#overlay")
    assert (canvas_pixels(page) == tinted).all()
    assert ((tinted[..., :3] != plain).any(axis=2) == mask).mean() > 0.99
    page.keyboard.press("l")
    outlined = (canvas_pixels(page)[..., :3] != plain).any(axis=2)
    assert 0 < outlined.sum() < mask.sum()
    page.keyboard.press("l")
    page.fill("#opacity", "10")
    assert np.abs(canvas_pixels(page)[..., :3].astype(int) - plain).max() < 30
    page.click("#mask")
    assert (canvas_pixels(page)[..., 0] == mask * 255).all()

    page.select_option("#kind", "overlay")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == f"{name.partition('.')[0]}-overlay.png"
    expected_overlay = httpx.post(url, content=data, params={"output": "overlay"}, headers=headers)
    assert Path(download.value.path()).read_bytes() == expected_overlay.content
    assert decode(expected_overlay.content).shape == (100, 140, 3)


def test_dropped_files_are_segmented(page: Page) -> None:
    page.evaluate(
        """async (bytes) => {
            const transfer = new DataTransfer();
            for (const name of ['a.png', 'b.png']) {
                transfer.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
            }
            dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, cancelable: true}));
        }""",
        list(encode(nuclei(48, 48)[0])),
    )
    wait_done(page, 2)


def test_files_of_a_folder_that_are_not_images_are_skipped(page: Page, tmp_path: Path) -> None:
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(encode(nuclei(40, 40, seed)[0]))
    (tmp_path / "readme.txt").write_text("text")
    page.set_input_files("#folder", tmp_path)
    wait_done(page, 3)
    assert page.locator("#strip li").count() == 3


@pytest.mark.parametrize("width", [320, 390, 768])
def test_page_fits_a_small_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.click("[data-sample*=histology]")
    wait_done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def tab(page: Page) -> str:
    """Press Tab; return the id of the focused control, or its text if it has no id."""
    page.keyboard.press("Tab")
    name: str = page.evaluate(
        "() => document.activeElement.id || document.activeElement.textContent.trim()"
    )
    return name


def test_every_control_works_by_keyboard(page: Page) -> None:
    """Visits the controls from top to bottom and uses each with the usual keys."""
    press = page.keyboard.press
    page.on("filechooser", lambda _: None)  # expect_file_chooser alone misses the second dialog
    page.wait_for_selector("#model")  # shown once the list of models has arrived
    assert [tab(page) for _ in range(2)] == ["API", "Models"]
    for name in ("files", "folder"):
        assert tab(page) == name
        with page.expect_file_chooser():
            press("Space")
    assert tab(page) == "model"
    for key, chosen in (("ArrowDown", "person"), ("ArrowUp", "nuclei")):
        press(key)
        assert page.input_value("#model") == chosen
    assert tab(page) == "threshold"
    for key, value in (("ArrowUp", "0.05"), ("Backspace", "")):
        press("Control+a")
        press(key)
        assert page.input_value("#threshold") == value
    for count, name in enumerate(("fluorescence", "histology"), start=1):
        assert tab(page) == f"Sample: {name}"
        press("Enter")
        wait_done(page, count)

    assert tab(page) == "again"
    press("Enter")
    wait_finished(page)
    wait_done(page, 2)
    assert tab(page) == "clear"
    assert tab(page) == "histology.jpg"  # the strip is one tab stop
    for key, name in (("ArrowLeft", "fluorescence.png"), ("ArrowRight", "histology.jpg")):
        press(key)
        assert page.inner_text("#name") == name
        wait_drawn(page)
    for name, key in (("overlay", "Enter"), ("outline", "Space"), ("mask", "Enter")):
        assert tab(page) == name
        before = canvas_pixels(page)
        press(key)
        assert (canvas_pixels(page) != before).any()
    assert tab(page) == "opacity"
    press("ArrowRight")
    assert page.input_value("#opacity") == "56"
    assert tab(page) == "kind"
    press("ArrowDown")
    assert page.input_value("#kind") == "overlay"
    for name, file in (("download", "histology-overlay.png"), ("download-all", "overlay.zip")):
        assert tab(page) == name
        with page.expect_download() as download:
            press("Enter")
        assert download.value.suggested_filename == file
    assert tab(page) == "licence"
    page.focus("#clear")  # last, because it hides the controls
    press("Enter")
    page.wait_for_selector("#work", state="hidden")
    page.focus("footer a")
    press("Enter")
    page.wait_for_url("**/LICENSE.txt")


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
    page.click("[data-sample*=histology]")
    wait_done(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, a')]
            .filter((e) => !e.textContent.trim() && !e.getAttribute('aria-label'))
            .filter((e) => !e.labels?.length)
            .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
