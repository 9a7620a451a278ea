"""Files that fail, that browsers cannot show, that have pages, or that are not images."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.conftest import (
    choose_files,
    choose_outputs,
    save_file,
    saved_view,
    unzip,
    wait_done,
    wait_drawn,
)
from tests.browser.results import ASTRONAUT, segment
from tests.conftest import Server, decode, encode, nuclei


def test_failed_image_does_not_affect_the_others(page: Page, server: Server) -> None:
    images = [(f"{seed}.png", encode(nuclei(64, 96, seed)[0])) for seed in range(3)]
    choose_files(page, *images, ("notes.png", b"not an image"))
    wait_done(page, 3)
    page.wait_for_selector("#strip [data-state=failed]")
    page.click("#strip [data-state=failed]")
    detail = segment(server, b"not an image").json()["detail"].partition(";")[0]
    assert page.inner_text("#error").lower().startswith(f"{detail.lower()}. use jpeg")
    assert page.is_disabled("#download")
    assert page.inner_text("#status") == "3 done, 1 failed"
    archive = unzip(save_file(page, "#download-all")[1])
    masks = ["0-mask.png", "1-mask.png", "2-mask.png"]
    assert sorted(archive.namelist()) == [*masks, "objects.csv", "results.csv"]
    assert decode(archive.read("1-mask.png")).shape == (64, 96)
    page.click("#remove")
    assert page.inner_text("#status") == "3 done"


@pytest.mark.parametrize("name", ["grey.tif", "sixteen bits.tif", "colours.tiff"])
def test_service_draws_formats_that_browsers_cannot_show(
    page: Page, server: Server, name: str
) -> None:
    grey = nuclei(100, 140)[0]
    colours = np.dstack([grey, grey // 2, grey // 3])
    image = {
        "grey.tif": grey,
        "sixteen bits.tif": grey.astype(np.uint16) * 257,
        "colours.tiff": colours,
    }
    data = encode(image[name], "TIFF")
    choose_files(page, (name, data))
    wait_done(page)
    assert "as the model sees it" in page.inner_text("#note")
    preview = decode(segment(server, data, output="preview").content)
    expected = preview if preview.ndim == 3 else preview[..., None]
    assert (saved_view(page, "image") == expected).all()
    mask = decode(segment(server, data).content)
    assert 0.02 < (mask > 0).mean() < 0.8
    assert (saved_view(page, "mask")[..., 0] == mask).all()


@pytest.mark.parametrize("axes", ["page", "channel"])
def test_pages_and_channels_that_were_not_read_are_said_and_can_be_chosen(
    page: Page, server: Server, tmp_path: Path, axes: str
) -> None:
    planes = np.stack([nuclei(96, 128, seed)[0] for seed in range(3)])
    path = tmp_path / "stack.tif"
    tifffile.imwrite(
        path, planes, imagej=True, metadata={"axes": "ZYX" if axes == "page" else "CYX"}
    )
    choose_files(page, ("stack.tif", path.read_bytes()))
    wait_done(page)
    noun = f"{axes}s"
    assert f"has 3 {noun}. Only {axes} 1 was used" in page.inner_text("#choices-text")
    page.select_option(f"#{axes}", "2")
    expect(page.locator("#choices-text")).to_contain_text(f"Only {axes} 3 was used")
    wait_done(page)
    page.wait_for_timeout(100)
    wait_drawn(page)
    choose_outputs(page, "mask")
    mask = decode(save_file(page)[1])
    assert (mask == decode(segment(server, path.read_bytes(), **{axes: "2"}).content)).all()
    if axes == "page":
        page.click("#all-pages")
        wait_done(page, 3)
        names = unzip(save_file(page, "#download-all")[1]).namelist()
        assert sorted(names[:3]) == [f"stack-page{number}-mask.png" for number in (1, 2, 3)]


def test_frames_that_were_not_read_are_said(page: Page) -> None:
    frames = [Image.fromarray(nuclei(96, 128, seed)[0]) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    choose_files(page, ("cells.gif", buffer.getvalue()))
    wait_done(page)
    assert page.is_visible("#choices-text")
    assert page.inner_text("#choices-text") == "This file has 3 frames. Only frame 1 was used."
    assert not page.is_visible("#page")
    assert not page.is_visible("#all-pages")


def test_person_model_finds_and_cuts_out_regions_of_people(page: Page, server: Server) -> None:
    page.select_option("#model", "person")
    choose_files(page, ("astronaut.jpg", ASTRONAUT))
    wait_done(page)
    assert re.fullmatch(r"\d+ regions?", page.inner_text("#count"))
    choose_outputs(page, "cutout")
    name, content = save_file(page)
    assert name == "astronaut-cutout.png"
    found = decode(content).astype(int)
    expected = decode(segment(server, ASTRONAUT, output="cutout", model="person").content)
    opacity, expected_opacity = found[..., 3], expected[..., 3]
    assert (np.abs(opacity - expected_opacity) <= 1).all()
    seen = opacity > 0
    assert (np.abs(found[seen] - expected[seen]) <= 3).all()  # decoders of JPEG differ by as much


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


def test_dropped_picture_of_a_page_is_explained_or_read(page: Page) -> None:
    drop = """(url) => {
        const transfer = new DataTransfer();
        transfer.setData('text/uri-list', url);
        dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, cancelable: true}));
    }"""
    page.evaluate(drop, "https://elsewhere.example/cells.png")
    expect(page.locator("#notice")).to_contain_text("Save it, then drop the file")
    page.evaluate(drop, page.evaluate("document.querySelector('[data-sample] img').src"))
    wait_done(page)


def test_files_of_a_folder_that_are_not_images_are_skipped(page: Page, tmp_path: Path) -> None:
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(encode(nuclei(40, 40, seed)[0]))
    (tmp_path / "readme.txt").write_text("text")
    page.set_input_files("#folder", tmp_path)
    wait_done(page, 3)
    assert page.locator("#strip li").count() == 3
