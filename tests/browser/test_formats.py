"""Files that fail, that browsers cannot show, that have pages, or that are not images."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import (
    choose_files,
    choose_outputs,
    read_table,
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
    shown = page.inner_text("#error").lower()
    assert shown.startswith(f"{detail.lower()}. use the image itself, as jpeg")
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


def write_stack(path: Path, axes: str = "ZYX", count: int = 3) -> bytes:
    """Write fields of nuclei as the pages or channels of an ImageJ TIFF."""
    planes = np.stack([nuclei(96, 128, seed)[0] for seed in range(count)])
    tifffile.imwrite(path, planes, imagej=True, metadata={"axes": axes})
    return path.read_bytes()


@pytest.mark.parametrize("axes", ["page", "channel"])
def test_pages_and_channels_that_were_not_read_are_said_and_can_be_chosen(
    page: Page, server: Server, tmp_path: Path, axes: str
) -> None:
    stack = write_stack(tmp_path / "stack.tif", "ZYX" if axes == "page" else "CYX")
    choose_files(page, ("stack.tif", stack))
    wait_done(page)
    noun = f"{axes}s"
    expected = f"This file has 3 {noun} (0 to 2). Only {axes} 0 was used. Choose:"
    assert page.inner_text("#choices-text") == expected
    assert page.locator(f"#{axes} option").all_inner_texts() == ["0", "1", "2"]
    page.select_option(f"#{axes}", "2")
    expect(page.locator("#choices-text")).to_contain_text(f"Only {axes} 2 was used")
    wait_done(page)
    page.wait_for_timeout(100)
    wait_drawn(page)
    choose_outputs(page, "mask")
    mask = decode(save_file(page)[1])
    assert (mask == decode(segment(server, stack, **{axes: "2"}).content)).all()


def test_pages_have_the_names_and_numbers_of_the_service(
    page: Page, server: Server, tmp_path: Path
) -> None:
    stack = write_stack(tmp_path / "stack.ome.tif")
    choose_files(page, ("stack.ome.tif", stack))
    wait_done(page)
    page.click("#all-pages")
    wait_done(page, 3)
    titles = [f"stack.ome.tif, page {number}" for number in range(3)]
    for number, title in enumerate(titles):
        page.click(f"#strip [title='{title}']")
        assert page.inner_text("#name") == title
        assert page.inner_text(f"#strip [title='{title}'] .selection") == f"page {number}"
    kinds = ["mask", "instances", "polygons"]
    choose_outputs(page, *kinds)
    archive = unzip(save_file(page, "#download-all")[1])
    response = httpx.post(
        f"{server.url}/segment",
        params={"page": "all", "output": kinds},
        files={"file": ("stack.ome.tif", stack)},
        timeout=60,
    )
    expected = unzip(response.content)
    assert set(archive.namelist()) == {*expected.namelist(), "results.csv", "objects.csv"}
    for name in expected.namelist():
        if name.endswith("-mask.png"):
            assert archive.read(name) == expected.read(name)

    rows = {row["page"]: row for row in read_table(archive)}
    assert sorted(rows) == ["0", "1", "2"]
    objects = read_table(archive, "objects.csv")
    assert list(objects[0])[:3] == ["image", "page", "id"]  # those of the command line
    for number, row in rows.items():
        assert row["file"].startswith(f"stack-page{number}-mask.png; ")
        ids = [each["id"] for each in objects if each["page"] == number]
        features = json.loads(expected.read(f"stack-page{number}.geojson"))["features"]
        assert ids == [str(each["id"]) for each in features]
        assert len(ids) == int(row["objects"]) > 0


def test_text_is_about_the_shown_page_until_the_next_arrives(page: Page, tmp_path: Path) -> None:
    choose_files(page, ("stack.tif", write_stack(tmp_path / "stack.tif")))
    wait_done(page)
    held: list[Route] = []
    page.route("**/segment*", lambda route: held.append(route))
    page.select_option("#page", "2")
    expect(page.locator("#strip [data-state=working]")).to_have_count(1)
    assert page.inner_text("#name") == "stack.tif, page 0"
    assert "Only page 0 was used" in page.inner_text("#choices-text")
    assert page.input_value("#page") == "2"
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    expect(page.locator("#name")).to_have_text("stack.tif, page 2")
    wait_done(page)


def test_channels_of_a_file_are_told_apart_in_the_tables(page: Page, tmp_path: Path) -> None:
    choose_files(page, ("cells.tif", write_stack(tmp_path / "cells.tif", "CYX")))
    choose_files(page, ("cells.tif", (tmp_path / "cells.tif").read_bytes()))
    wait_done(page, 2)
    page.select_option("#channel", "2")
    expect(page.locator("#choices-text")).to_contain_text("Only channel 2 was used")
    wait_done(page, 2)
    archive = unzip(save_file(page, "#download-all")[1])
    assert sorted(row["channel"] for row in read_table(archive)) == ["0", "2"]
    objects = read_table(archive, "objects.csv")
    assert list(objects[0])[:3] == ["image", "channel", "id"]
    assert {(row["image"], row["channel"]) for row in objects} == {
        ("cells.tif", "0"),
        ("cells.tif", "2"),
    }


def test_file_that_is_cut_off_is_read_as_far_as_it_goes(page: Page, tmp_path: Path) -> None:
    planes = np.stack([nuclei(96, 128, seed)[0] for seed in range(3)])
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, planes, imagej=True, truncate=True, metadata={"axes": "ZYX"})
    choose_files(page, ("stack.tif", path.read_bytes()[: -planes[0].nbytes]))
    wait_done(page)
    expected = "This file is cut off. Only its first page could be read."
    assert page.inner_text("#choices-text") == expected
    assert not page.is_visible("#all-pages")
    assert save_file(page)[0] == "stack-mask.png"


def test_empty_file_is_explained_and_not_sent(page: Page) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    choose_files(page, ("cells.tif", b""))
    page.wait_for_selector("#strip [data-state=failed]")
    expected = (
        "This file is empty: it has 0 bytes. It may not have been copied or saved completely."
    )
    assert page.inner_text("#error") == expected
    assert not [each for each in requests if "segment" in each]


def test_frames_that_were_not_read_are_said(page: Page) -> None:
    frames = [Image.fromarray(nuclei(96, 128, seed)[0]) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    choose_files(page, ("cells.gif", buffer.getvalue()))
    wait_done(page)
    assert page.is_visible("#choices-text")
    assert (
        page.inner_text("#choices-text") == "This file has 3 frames. Only the first frame was used."
    )
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
