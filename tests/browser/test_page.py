"""The page in headless Chromium, against a real service."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from tests.browser.conftest import ROOM, canvas, choose, done, drawn, over
from tests.conftest import Server, decode, encode, nuclei, serving


def test_a_sample_shows_its_mask_and_what_it_cost(page: Page) -> None:
    page.click("[data-sample*=fluorescence]")
    done(page)
    with_mask = canvas(page)
    page.click("#overlay")
    plain = canvas(page)
    assert with_mask.shape == plain.shape == (512, 512, 4)
    changed = (with_mask != plain).any(axis=2)
    assert 0.05 < changed.mean() < 0.6
    assert (plain[..., 0] == plain[..., 1]).all()  # the sample is grey, and nothing tints it now
    page.keyboard.press("o")
    assert (canvas(page) == with_mask).all()
    page.keyboard.press("l")
    outlined = (canvas(page) != plain).any(axis=2)
    assert 0 < outlined.mean() < changed.mean() / 2
    facts = page.inner_text("#facts")
    for word in ("512 × 512", "Foreground", "Time", "nuclei@", "int8"):
        assert word in facts
    assert "nucleus" in page.inner_text("#service")


def test_the_downloaded_mask_is_the_services(page: Page, server: Server) -> None:
    data = encode(nuclei(120, 200)[0])
    choose(page, ("cells.png", data))
    done(page)
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "cells-mask.png"
    content = Path(download.value.path()).read_bytes()
    headers = {"Content-Type": "image/png"}
    assert content == httpx.post(f"{server.url}/segment", content=data, headers=headers).content
    mask = decode(content)
    assert mask.shape == (120, 200)
    page.keyboard.press("m")
    assert (canvas(page)[..., 0] == mask).all()


def test_outlines_and_objects_can_be_downloaded_too(page: Page) -> None:
    choose(page, ("cells.png", encode(nuclei(120, 200)[0])))
    done(page)
    found = {}
    for kind, name in (("polygons", "cells.geojson"), ("instances", "cells-instances.png")):
        page.select_option("#kind", kind)
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename == name
        found[kind] = Path(download.value.path()).read_bytes()
    features = json.loads(found["polygons"])["features"]
    assert len(features) == decode(found["instances"]).max() > 0


def test_a_service_with_keys_asks_for_one(browser: Browser) -> None:
    with serving(UNET_API_KEYS="sesame") as closed:
        page = browser.new_page()
        page.set_default_timeout(ROOM)
        page.goto(closed.url)
        for key in ("wrong", "sesame"):
            page.fill("#key", key)
            page.click("#key-form button")
            if key == "wrong":
                page.wait_for_selector("text=That key was refused.")
        page.wait_for_selector("text=finds: nucleus")
        assert not page.is_visible("#key-form")
        choose(page, ("cells.png", encode(nuclei(64, 64)[0])))
        done(page)
        page.close()


def test_several_images_one_of_them_bad(page: Page) -> None:
    images = [(f"{seed}.png", encode(nuclei(64, 96, seed)[0])) for seed in range(3)]
    choose(page, *images, ("notes.png", b"not an image"))
    done(page, 3)
    page.wait_for_selector("#strip [data-state=failed]")
    page.click("#strip [data-state=failed]")
    assert "not an image" in page.inner_text("#error")
    assert page.is_disabled("#download")
    assert not page.is_visible("#stage")
    assert "3 masks made, 1 failed" in page.inner_text("#status")
    with page.expect_download() as download:
        page.click("#download-all")
    archive = zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))
    assert archive.testzip() is None
    masks = ["0-mask.png", "1-mask.png", "2-mask.png"]
    assert sorted(archive.namelist()) == [*masks, "results.csv"]
    assert decode(archive.read("1-mask.png")).shape == (64, 96)


@pytest.mark.parametrize("name", ["grey.tif", "sixteen bits.tif", "colours.tiff"])
def test_a_format_only_the_service_can_show(page: Page, server: Server, name: str) -> None:
    grey = nuclei(100, 140)[0]
    grey[0, 0], grey[0, 1] = 0, 255  # the range that 16 bits are shown over
    image, expected = {
        "grey.tif": (grey, grey),
        "sixteen bits.tif": (grey.astype(np.uint16) * 257, grey),
        "colours.tiff": (colours := np.dstack([grey, grey // 2, grey // 3]), colours),
    }[name]
    data = encode(image, "TIFF")
    choose(page, (name, data))
    done(page)
    assert page.is_visible("#note")

    headers = {"Content-Type": "image/tiff"}
    url = f"{server.url}/segment"
    mask = decode(httpx.post(url, content=data, headers=headers).content) > 0
    assert 0.02 < mask.mean() < 0.8
    tinted = canvas(page)
    assert page.is_enabled("#overlay")
    page.click("#overlay")
    plain = canvas(page)[..., :3].astype(int)
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    assert np.abs(plain - expected).max() <= 1
    page.click("#overlay")
    assert (canvas(page) == tinted).all()
    assert ((tinted[..., :3] != plain).any(axis=2) == mask).mean() > 0.99
    page.keyboard.press("l")
    outlined = (canvas(page)[..., :3] != plain).any(axis=2)
    assert 0 < outlined.sum() < mask.sum()
    page.keyboard.press("l")
    page.fill("#opacity", "10")
    assert np.abs(canvas(page)[..., :3].astype(int) - plain).max() < 30
    page.click("#mask")
    assert (canvas(page)[..., 0] == mask * 255).all()

    page.select_option("#kind", "overlay")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == f"{name.partition('.')[0]}-overlay.png"
    theirs = httpx.post(url, content=data, params={"output": "overlay"}, headers=headers)
    assert Path(download.value.path()).read_bytes() == theirs.content
    assert decode(theirs.content).shape == (100, 140, 3)


def test_dropping_files(page: Page) -> None:
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
    done(page, 2)


def test_a_folder(page: Page, tmp_path: Path) -> None:
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(encode(nuclei(40, 40, seed)[0]))
    (tmp_path / "readme.txt").write_text("not for the service")
    page.set_input_files("#folder", tmp_path)
    done(page, 3)
    assert page.locator("#strip li").count() == 3


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_sticks_out_on_a_small_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.click("[data-sample*=histology]")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def tab(page: Page) -> str:
    """Go on to the next control; its id or its text."""
    page.keyboard.press("Tab")
    name: str = page.evaluate(
        "() => document.activeElement.id || document.activeElement.textContent.trim()"
    )
    return name


def test_everything_can_be_reached_and_operated_by_keyboard(page: Page) -> None:
    """From top to bottom, each control with the keys that its kind has."""
    press = page.keyboard.press
    page.on("filechooser", lambda _: None)  # all along: turned on for each, it misses the second
    page.wait_for_selector("#model")  # once there are several to choose from
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
        done(page, count)

    assert tab(page) == "again"
    press("Enter")
    over(page)
    done(page, 2)
    assert tab(page) == "clear"
    assert tab(page) == "histology.jpg"  # the chosen one; inside the strip arrows lead
    for key, name in (("ArrowLeft", "fluorescence.png"), ("ArrowRight", "histology.jpg")):
        press(key)
        assert page.inner_text("#name") == name
        drawn(page)
    for name, key in (("overlay", "Enter"), ("outline", "Space"), ("mask", "Enter")):
        assert tab(page) == name
        before = canvas(page)
        press(key)
        assert (canvas(page) != before).any()
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
    page.focus("#clear")  # last: what is there goes
    press("Enter")
    page.wait_for_selector("#work", state="hidden")
    page.focus("footer a")
    press("Enter")
    page.wait_for_url("**/LICENSE.txt")


def test_every_control_has_a_name(page: Page) -> None:
    page.click("[data-sample*=histology]")
    done(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, a')]
            .filter((e) => !e.textContent.trim() && !e.getAttribute('aria-label'))
            .filter((e) => !e.labels?.length)
            .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
