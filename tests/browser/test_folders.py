"""Folders: their order, their names, and what of them is in the zip. Answers are stubs."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route

from tests.browser.conftest import always, answer, choose, done, over, refuse, square
from tests.conftest import encode, nuclei

CELLS = encode(nuclei(64, 64)[0])  # of the size of the masks that are answered


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two folders with the same names in them, and what systems and instruments leave beside."""
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


def download(page: Page) -> zipfile.ZipFile:
    with page.expect_download() as event:
        page.click("#download-all")
    archive = zipfile.ZipFile(io.BytesIO(Path(event.value.path()).read_bytes()))
    assert archive.testzip() is None
    page.wait_for_selector("#download-all:enabled")
    return archive


def rows(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(archive.read("results.csv").decode("utf-8-sig"))))


def titles(page: Page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('#strip button')].map((e) => e.title)")


@pytest.mark.parametrize("way", ["chosen", "dropped"])
def test_a_folder_keeps_its_paths_and_order(page: Page, tree: Path, way: str) -> None:
    page.route("**/segment*", always)
    if way == "chosen":
        page.set_input_files("#folder", tree)
    else:
        drag = page.context.new_cdp_session(page)
        data = {"items": [], "files": [str(tree)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 300, "y": 150, "data": data}
            drag.send("Input.dispatchDragEvent", event)
    done(page, 6)
    assert page.inner_text("#notice") == "6 images; 2 other files left out"
    assert titles(page) == [f"{each}.png" for each in ORDER]
    assert "ctrl" in page.inner_text("#strip li:first-child")
    archive = download(page)
    assert archive.namelist() == [*(f"{each}-mask.png" for each in ORDER), "results.csv"]
    assert [row["file"] for row in rows(archive)] == archive.namelist()[:-1]


def test_a_file_that_cannot_be_read_does_not_cost_the_drop(page: Page) -> None:
    page.route("**/segment*", always)
    page.evaluate(
        """(bytes) => {
            const entry = (name) => ({isFile: true, fullPath: `/${name}`, file: (done, failed) =>
                name === 'b.png' ? failed(new DOMException('gone', 'NotFoundError'))
                                 : done(new File([new Uint8Array(bytes)], name))});
            const event = new Event('drop', {cancelable: true});
            const items = ['a.png', 'b.png', 'c.png'].map((name) =>
                ({webkitGetAsEntry: () => entry(name)}));
            event.dataTransfer = {items, files: []};
            dispatchEvent(event);
        }""",
        list(CELLS),
    )
    done(page, 2)
    assert titles(page) == ["a.png", "c.png"]
    assert page.inner_text("#notice") == "2 images; 1 file could not be read"


def test_names_that_differ_by_case_or_ending_alone(page: Page) -> None:
    page.route("**/segment*", always)
    choose(page, *[(name, CELLS) for name in ("a.png", "A.png", "a.tiff", "b.tar.png")])
    done(page, 4)
    names = download(page).namelist()
    assert len({name.lower() for name in names}) == len(names) == 5
    assert {"a-mask.png", "b.tar-mask.png"} < {name.lower() for name in names}


def test_failures_and_figures_are_in_one_table(page: Page) -> None:
    def serve(route: Route) -> None:
        if b"damaged" in (route.request.post_data_buffer or b""):
            return refuse(route, 422, "not an image, says the service")
        return answer(route)

    page.route("**/segment*", serve)
    page.fill("#threshold", "0.3")
    choose(page, ("ärger, groß.png", CELLS), ("b.png", b"damaged"), ("c.png", CELLS))
    over(page)
    archive = download(page)
    assert archive.read("results.csv").startswith("\ufeff".encode())  # for Excel
    table = {row["image"]: row for row in rows(archive)}
    assert len(table) == 3
    good = table["ärger, groß.png"]
    assert good["file"] == "ärger, groß-mask.png"
    assert good["model"] == "nuclei@000000000000"
    assert (good["threshold"], good["foreground"], good["confidence"]) == ("0.3", "0.25", "0.9")
    assert (good["objects"], good["error"]) == ("", "")
    bad = table["b.png"]
    assert (bad["file"], bad["foreground"]) == ("", "")
    assert bad["error"] == "not an image, says the service"


def test_all_of_another_kind_are_made_for_the_zip(page: Page) -> None:
    def serve(route: Route) -> None:
        if "polygons" not in route.request.url:
            return answer(route)
        if b"unlucky" in (route.request.post_data_buffer or b""):
            return refuse(route, 422, "no outlines of this one")
        features = {"type": "FeatureCollection", "features": []}
        document = {"images": [{"objects": 7, "polygons": features}]}
        return answer(route, json.dumps(document).encode(), Content_Type="application/json")

    page.route("**/segment*", serve)
    choose(page, ("a.png", CELLS), ("b.png", CELLS + b"unlucky"))
    done(page, 2)
    page.select_option("#kind", "polygons")
    archive = download(page)
    assert archive.namelist() == ["a.geojson", "results.csv"]
    assert json.loads(archive.read("a.geojson"))["type"] == "FeatureCollection"
    assert [row["objects"] for row in rows(archive)] == ["7", ""]
    assert rows(archive)[1]["error"] == "no outlines of this one"
    assert page.inner_text("#notice").startswith("1 could not be made")
    assert "Objects\n7" in page.inner_text("#facts")


def test_a_download_is_asked_for_once_and_says_what_went_wrong(page: Page) -> None:
    held: list[Route] = []
    late: list[Route] = []

    def serve(route: Route) -> None:
        if "instances" in route.request.url:
            held.append(route)
        elif b"late" in (route.request.post_data_buffer or b""):
            late.append(route)
        else:
            answer(route)

    page.route("**/segment*", serve)
    choose(page, ("a.png", CELLS), ("b.png", CELLS + b"late"))
    done(page)
    page.select_option("#kind", "instances")
    page.click("#download")
    page.wait_for_selector("#download:disabled")
    while not held:
        page.wait_for_timeout(20)
    refuse(held.pop(), 422, "too many objects")
    page.wait_for_selector("#download:enabled")
    while not late:
        page.wait_for_timeout(20)
    answer(late.pop())  # its progress does not overwrite what went wrong
    done(page, 2)
    assert page.inner_text("#notice") == "The download failed: too many objects"
    page.click("#strip li:first-child button")
    page.click("#download")
    while not held:
        page.wait_for_timeout(20)
    with page.expect_download() as event:
        answer(held.pop(), square(), X_Mask_Objects="12")
    assert event.value.suggested_filename == "a-instances.png"
    page.wait_for_selector("#download:enabled")
    assert not page.is_visible("#notice")
    assert "Objects\n12" in page.inner_text("#facts")


def test_arrow_keys_move_in_the_strip(page: Page) -> None:
    page.route("**/segment*", always)
    choose(page, *[(f"{n}.png", CELLS) for n in range(5)])
    done(page, 5)
    page.focus("#strip button")
    for key, name in (("ArrowRight", "1"), ("End", "4"), ("ArrowLeft", "3"), ("Home", "0")):
        page.keyboard.press(key)
        assert page.inner_text("#name") == f"{name}.png"
        assert page.evaluate("document.activeElement.title") == f"{name}.png"
    page.keyboard.press("ArrowLeft")  # there is none before the first
    assert page.inner_text("#name") == "0.png"
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.closest('#strip')")
