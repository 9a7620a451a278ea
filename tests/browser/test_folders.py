"""Folders: order, names, and the contents of the zip. The tests respond in place of the service."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from app.api.body.names import strip_image_suffix
from model.pixels import IMAGE_SUFFIXES
from tests.browser.conftest import (
    always_send_mask,
    choose_files,
    choose_outputs,
    outputs_of,
    read_table,
    render_output,
    save_file,
    send_mask,
    send_outputs,
    send_problem,
    settings_of,
    square_mask,
    unzip,
    wait_done,
    wait_finished,
)
from tests.conftest import encode, nuclei

CELLS = encode(nuclei(64, 64)[0])  # the size of square_mask()


@pytest.fixture
def plate(tmp_path: Path) -> Path:
    """Two folders with equal file names, and files that are not images."""
    root = tmp_path / "plate"
    for folder in ("ctrl", "drug"):
        (root / folder).mkdir(parents=True)
        for number in (10, 2, 1):
            (root / folder / f"img{number}.png").write_bytes(CELLS)
    (root / "ctrl/._img1.png").write_bytes(b"\0\5\x16\7")
    (root / ".DS_Store").write_text("x")
    (root / "notes.txt").write_text("x")
    (root / "plate.czi").write_bytes(b"ZISRAWFILE\0")
    return root


ORDER = [f"plate/{folder}/img{number}" for folder in ("ctrl", "drug") for number in (1, 2, 10)]


def download_zip(page: Page) -> zipfile.ZipFile:
    archive = unzip(save_file(page, "#download-all")[1])
    page.wait_for_selector("#download-all:enabled")
    return archive


def thumbnail_titles(page: Page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('#strip button')].map((e) => e.title)")


@pytest.mark.parametrize("source", ["input", "drop"])
def test_folder_keeps_its_paths_in_natural_order(page: Page, plate: Path, source: str) -> None:
    page.route("**/segment*", always_send_mask)
    if source == "input":
        page.set_input_files("#folder", plate)
    else:
        drag = page.context.new_cdp_session(page)
        data = {"items": [], "files": [str(plate)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 300, "y": 150, "data": data}
            drag.send("Input.dispatchDragEvent", event)
    wait_done(page, 6)
    assert page.inner_text("#notice") == "6 images; 2 other files skipped"
    assert thumbnail_titles(page) == [f"{each}.png" for each in ORDER]
    assert "ctrl" in page.inner_text("#strip li:first-child")
    archive = download_zip(page)
    assert archive.namelist() == [
        *(f"{each}-mask.png" for each in ORDER),
        "results.csv",
        "objects.csv",
    ]
    assert [row["file"] for row in read_table(archive)] == archive.namelist()[:-2]


def test_unreadable_file_does_not_fail_the_drop(page: Page) -> None:
    page.route("**/segment*", always_send_mask)
    page.evaluate(
        """(bytes) => {
            const entry = (name) => ({isFile: true, fullPath: `/${name}`, file: (resolve, reject) =>
                name === 'b.png' ? reject(new DOMException('gone', 'NotFoundError'))
                                 : resolve(new File([new Uint8Array(bytes)], name))});
            const event = new Event('drop', {cancelable: true});
            const items = ['a.png', 'b.png', 'c.png'].map((name) =>
                ({webkitGetAsEntry: () => entry(name)}));
            event.dataTransfer = {items, files: []};
            dispatchEvent(event);
        }""",
        list(CELLS),
    )
    wait_done(page, 2)
    assert thumbnail_titles(page) == ["a.png", "c.png"]
    assert page.inner_text("#notice") == "2 images; 1 file could not be read"


def test_names_in_the_zip_differ_by_more_than_case(page: Page) -> None:
    page.route("**/segment*", always_send_mask)
    choose_files(page, *[(name, CELLS) for name in ("a.png", "A.png", "a.tiff", "b.tar.png")])
    wait_done(page, 4)
    names = download_zip(page).namelist()
    assert len({name.lower() for name in names}) == len(names) == 6
    assert {"a-mask.png", "b.tar-mask.png"} < {name.lower() for name in names}


def test_page_of_a_stack_and_an_image_of_its_name_have_files_of_their_own(page: Page) -> None:
    def serve(route: Route) -> None:
        if b"stack" in (route.request.post_data_buffer or b"") and "page" not in settings_of(route):
            return send_problem(
                route, 422, "the image has 3 pages; choose page=0 to page=2 for one of them"
            )
        return send_mask(route)

    page.route("**/segment*", serve)
    names = ("stack-page1.png", "stack-page1-2.png", "STACK-PAGE2.png")
    choose_files(page, ("stack.tif", CELLS + b"stack"), *((name, CELLS) for name in names))
    wait_done(page, 4)
    page.click("#strip [title^='stack.tif']")
    page.click("#all-pages")
    wait_done(page, 6)
    archive = download_zip(page)
    files = [row["file"] for row in read_table(archive)]
    assert sorted([*files, "objects.csv", "results.csv"]) == sorted(archive.namelist())
    assert len({name.lower() for name in files}) == 6
    by_page = {row["page"]: row["file"] for row in read_table(archive) if row["page"]}
    assert by_page["0"] == "stack-page0-mask.png"
    assert {row["image"] for row in read_table(archive, "objects.csv")} == {"stack.tif", *names}


def test_image_that_was_added_twice_is_told_apart_in_the_tables(page: Page) -> None:
    page.route("**/segment*", always_send_mask)
    choose_files(page, ("a.png", CELLS), ("a.png", CELLS), ("b.png", CELLS))
    wait_done(page, 3)
    archive = download_zip(page)
    named = [(row["image"], row["file"]) for row in read_table(archive)]
    assert named == [
        ("a.png", "a-mask.png"),
        ("a.png (2)", "a-2-mask.png"),
        ("b.png", "b-mask.png"),
    ]
    objects = read_table(archive, "objects.csv")
    assert [row["image"] for row in objects] == ["a.png", "a.png (2)", "b.png"]
    assert list(objects[0])[:2] == ["image", "id"]  # no file has several pages or channels


def test_pages_that_failed_are_told_apart_in_the_tables(page: Page) -> None:
    def serve(route: Route) -> None:
        if "page" not in settings_of(route):
            return send_problem(
                route, 422, "the image has 3 pages; choose page=0 to page=2 for one of them"
            )
        if settings_of(route)["page"] == "1":
            return send_problem(route, 422, "the page is missing in the TIFF")
        return send_mask(route)

    page.route("**/segment*", serve)
    choose_files(page, ("stack.tif", CELLS))
    wait_done(page)
    page.click("#all-pages")
    wait_done(page, 2)
    wait_finished(page)
    errors = {row["page"]: row["error"] for row in read_table(download_zip(page))}
    assert errors == {"0": "", "1": "The page is missing in the TIFF", "2": ""}


def test_files_have_the_stem_that_the_service_gives(page: Page) -> None:
    names = [
        *("a.png", "a.OME.TIF", "a.ome.tiff", "a.ome", "a.tar.png", "scan.001", "img_1.5um"),
        *("a.png.tif", "a.txt", "a.", "a", "a.lsm", "a.jfif", "a.stk", "a.svs", "a.apng", "a.tf8"),
        *("a.ndpi", "a.dib", "a.btf", "a.scn", "a.qptiff", *(f"a{end}" for end in IMAGE_SUFFIXES)),
    ]
    found = page.evaluate(
        """async (paths) => {
            const {stemOf} = await import('./static/names.js');
            return paths.map((path) => stemOf({path, settings: {}}));
        }""",
        [f"plate/{name}" for name in names],
    )
    assert found == [f"plate/{strip_image_suffix(name)}" for name in names]


def test_names_in_the_zip_are_allowed_on_windows(page: Page, tmp_path: Path) -> None:
    page.route("**/segment*", always_send_mask)
    for name in ("plate/aux/nul.b.png", "plate/COM1.old/a.png", "plate/console/b.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(CELLS)
    page.set_input_files("#folder", tmp_path / "plate")
    wait_done(page, 3)
    *names, _, _ = download_zip(page).namelist()
    assert sorted(name.removeprefix("plate/") for name in names) == [
        "COM1_.old/a-mask.png",
        "aux_/nul_.b-mask.png",
        "console/b-mask.png",
    ]


def test_table_has_a_row_for_every_image_and_failure(page: Page) -> None:
    def serve(route: Route) -> None:
        if b"damaged" in (route.request.post_data_buffer or b""):
            return send_problem(route, 422, "not a recognised image")
        return send_mask(route, Server_Timing="infer;dur=313.9")

    page.route("**/segment*", serve)
    page.evaluate(
        """() => {
            const slider = document.getElementById('threshold');
            slider.value = 0.3;
            slider.dispatchEvent(new Event('change', {bubbles: true}));
        }"""
    )
    page.wait_for_timeout(500)
    choose_files(page, ("ärger, groß.png", CELLS), ("b.png", b"damaged"), ("c.png", CELLS))
    wait_finished(page)
    archive = download_zip(page)
    assert archive.read("results.csv").startswith("\ufeff".encode())  # byte order mark, for Excel
    table = {row["image"]: row for row in read_table(archive)}
    assert len(table) == 3
    good = table["ärger, groß.png"]
    assert good["file"] == "ärger, groß-mask.png"
    assert good["model"] == "nuclei@000000000000"
    assert (good["threshold"], good["foreground"], good["objects"]) == ("0.3", "0.25", "1")
    assert (good["engine"], good["pages"], good["error"]) == ("cpu/int8", "1", "")
    assert good["model_seconds"] == "0.3139"  # not 0.31389999999999996
    bad = table["b.png"]
    assert (bad["file"], bad["foreground"]) == ("", "")
    assert bad["error"] == "Not a recognised image"


def send_damaged_probability(route: Route) -> None:
    """Respond with outputs of which the cutout cannot be made, but everything else."""
    contents = {each: render_output(each, square_mask()) for each in outputs_of(route)}
    send_outputs(route, contents | {"probability": b"damaged"})


def test_files_of_every_image_are_made_without_another_request(page: Page) -> None:
    requests: list[list[str]] = []

    def serve(route: Route) -> None:
        requests.append(outputs_of(route))
        is_damaged = b"damaged" in (route.request.post_data_buffer or b"")
        send_damaged_probability(route) if is_damaged else send_mask(route)

    page.route("**/segment*", serve)
    choose_files(page, ("a.png", CELLS), ("b.png", CELLS + b"damaged"))
    wait_done(page, 2)
    choose_outputs(page, "mask", "rois", "coco", "polygons", "cutout")
    archive = download_zip(page)
    assert requests == [["mask", "polygons", "probability"]] * 2
    files = ["a-mask.png", "a.geojson", "a-rois.zip", "a-cutout.png", "a-coco.json"]
    assert archive.namelist() == [*files, "results.csv", "objects.csv"]
    assert json.loads(archive.read("a.geojson"))["type"] == "FeatureCollection"
    assert [row["objects"] for row in read_table(archive)] == ["1", "1"]
    assert read_table(archive)[0]["file"] == "; ".join(files)
    assert read_table(archive)[1]["error"] == "An unexpected kind of PNG"
    assert page.inner_text("#notice").startswith("1 failed")


def test_failed_download_is_reported_until_the_next(page: Page) -> None:
    page.route("**/segment*", send_damaged_probability)
    choose_files(page, ("a.png", CELLS))
    wait_done(page)
    choose_outputs(page, "cutout")
    page.click("#download")
    expect(page.locator("#notice")).to_have_text("Download failed: An unexpected kind of PNG")
    expect(page.locator("#download")).to_be_enabled()
    choose_outputs(page, "rois")
    assert save_file(page)[0] == "a-rois.zip"
    assert not page.is_visible("#notice")


def test_download_can_be_stopped(page: Page) -> None:
    mask = square_mask(2000, 2000)
    contents = {each: render_output(each, mask) for each in ("mask", "polygons", "probability")}
    page.route("**/segment*", lambda route: send_outputs(route, contents))
    choose_files(page, *[(f"{n}.png", contents["mask"]) for n in range(8)])
    wait_done(page, 8)
    choose_outputs(page, "cutout")
    page.click("#download-all")
    expect(page.locator("#status")).to_contain_text("Preparing")
    page.click("#stop")
    expect(page.locator("#notice")).to_have_text("Download stopped.")
    expect(page.locator("#download-all")).to_be_enabled()
    assert page.inner_text("#status") == "8 done"


def test_arrow_keys_move_the_selection_in_the_strip(page: Page) -> None:
    page.route("**/segment*", always_send_mask)
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(5)])
    wait_done(page, 5)
    page.focus("#strip button")
    for key, name in (("ArrowRight", "1"), ("End", "4"), ("ArrowLeft", "3"), ("Home", "0")):
        page.keyboard.press(key)
        assert page.inner_text("#name") == f"{name}.png"
        assert page.evaluate("document.activeElement.title") == f"{name}.png"
    page.keyboard.press("ArrowLeft")  # the first image stays selected
    assert page.inner_text("#name") == "0.png"
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.closest('#strip')")
