"""The page against a real service: objects, view, downloads, formats, keyboard and layout."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
import roifile
import tifffile
from playwright.sync_api import Page, Route, expect
from pycocotools import mask as coco_mask

from app.imaging.render import soften_edge
from tests.browser.conftest import (
    ALL_KINDS,
    canvas_pixels,
    choose_files,
    choose_outputs,
    read_table,
    save_file,
    saved_view,
    send_mask,
    show,
    square_mask,
    unzip,
    wait_done,
    wait_drawn,
    wait_finished,
)
from tests.conftest import Server, decode, encode, nuclei

CELLS = encode(nuclei(120, 200)[0])
SAMPLE = (Path(__file__).parents[2] / "app/static/samples/fluorescence.png").read_bytes()
ASTRONAUT = (Path(__file__).parents[1] / "fixtures/astronaut.jpg").read_bytes()
SHAPE = (512, 512)


def segment(server: Server, data: bytes = CELLS, **query: str) -> httpx.Response:
    headers = {"Content-Type": "application/octet-stream"}
    url = f"{server.url}/segment"
    return httpx.post(url, content=data, params=query, headers=headers, timeout=60)


def to_screen(
    page: Page, x: float, y: float, shape: tuple[int, int] = SHAPE
) -> tuple[float, float]:
    """The position on the page of a point of a fitted image."""
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    scale = min(box["width"] / shape[1], box["height"] / shape[0], 8)
    left = box["x"] + (box["width"] - scale * shape[1]) / 2
    top = box["y"] + (box["height"] - scale * shape[0]) / 2
    return left + x * scale, top + y * scale


# --- objects ---------------------------------------------------------------------------------


def test_every_object_is_counted_colored_and_listed(page: Page, server: Server) -> None:
    page.click("[data-sample*=fluorescence]")
    wait_done(page)
    wait_drawn(page)
    labels = decode(segment(server, SAMPLE, output="instances").content)
    count = int(labels.max())
    assert page.inner_text("#count") == f"{count} nuclei"
    assert page.inner_text("#strip .count") == str(count)
    assert page.locator("#table tbody tr").count() == count
    assert "Ready. Finds cell nuclei." in page.inner_text("#service")

    filled, plain = saved_view(page, "fill"), saved_view(page, "image")
    assert (plain == decode(SAMPLE)[..., None]).all()
    changed = (filled != plain).any(axis=2)
    assert (changed[labels > 0]).mean() > 0.99
    assert not changed[segment_mask(server) == 0].any()
    outlined = (saved_view(page, "outline") != plain).any(axis=2)
    assert 0 < outlined.sum() < changed.sum() / 2
    # Objects that touch have different outlines, so that they are distinguished.
    touching = (labels[:, 1:] != labels[:, :-1]) & (labels[:, 1:] > 0) & (labels[:, :-1] > 0)
    rows, columns = np.nonzero(touching)
    assert len(rows) > 20
    assert (filled[rows, columns] != filled[rows, columns + 1]).any(axis=1).mean() > 0.95
    assert (saved_view(page, "mask")[..., 0] == segment_mask(server)).all()


def segment_mask(server: Server) -> np.ndarray:
    return decode(segment(server, SAMPLE).content)


def test_hover_click_and_table_show_the_same_object(page: Page, server: Server) -> None:
    page.click("[data-sample*=fluorescence]")
    wait_done(page)
    wait_drawn(page)
    features = json.loads(segment(server, SAMPLE, output="polygons").content)["features"]
    feature = max(features, key=lambda each: each["properties"]["area"])
    properties = feature["properties"]
    x, y = (properties["measurements"][f"centroid_{axis}_px"] for axis in "xy")
    text = f"#{feature['id']} · {properties['area']} px · score {properties['score']:.2f}"
    before = canvas_pixels(page)
    page.mouse.move(*to_screen(page, x, y))
    expect(page.locator("#tip")).to_have_text(text)
    assert (canvas_pixels(page) != before).any()
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#object-text")).to_have_text(text)
    expect(page.locator("#table tr[aria-selected] button")).to_have_text(str(feature["id"]))

    page.click("#table [data-sort=area]")
    areas = [int(each) for each in page.locator("#table td:nth-child(2)").all_inner_texts()]
    assert areas == sorted(areas)
    assert page.get_attribute("#table th:nth-child(2)", "aria-sort") == "ascending"
    page.click("#table [data-sort=area]")
    assert page.inner_text("#table tbody tr:first-child button") == str(feature["id"])
    page.click("#table tbody tr:nth-child(2) button")
    assert page.inner_text("#object-text") != text


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_removed_objects_are_in_no_file(page: Page) -> None:
    choose_files(page, ("cells.png", SAMPLE))
    wait_done(page)
    wait_drawn(page)
    count = int(page.inner_text("#strip .count"))
    page.fill("#min-area", "300")
    kept = page.locator("#table tbody tr").count()
    assert 0 < kept < count
    assert page.inner_text("#strip .count") == str(kept)
    page.click("#table tbody tr:nth-child(3) button")
    removed = int(page.inner_text("#table tbody tr:nth-child(3) button"))
    page.click("#object-delete")
    assert page.inner_text("#count") == f"{kept - 1} nuclei"
    assert page.evaluate("document.activeElement.id") == "stage"
    ids = {int(each) for each in page.locator("#table td:first-child").all_inner_texts()}
    assert removed not in ids
    seen = saved_view(page, "mask")[..., 0]

    choose_outputs(page, *ALL_KINDS)
    name, content = save_file(page)
    assert name == "cells.zip"
    archive = unzip(content)
    labels = decode(archive.read("cells-instances.png"))
    assert set(np.unique(labels).tolist()) - {0} == ids
    mask = decode(archive.read("cells-mask.png"))
    assert mask.dtype == np.uint8
    assert mask.ndim == 2
    assert ((mask > 0) == (labels > 0)).all()
    assert (seen == mask).all()
    features = json.loads(archive.read("cells.geojson"))["features"]
    assert {each["id"] for each in features} == ids
    annotations = json.loads(archive.read("cells-coco.json"))["annotations"]
    assert [each["id"] for each in annotations] == sorted(ids)
    for each in annotations:
        assert (coco_mask.decode(each["segmentation"]) == (labels == each["id"])).all()
    rois = unzip(archive.read("cells-rois.zip"))
    assert [int(name.partition(".")[0]) for name in rois.namelist()] == sorted(ids)
    for feature, name in zip(features, rois.namelist(), strict=True):
        (ring,) = feature["geometry"]["coordinates"]
        roi = roifile.ImagejRoi.frombytes(rois.read(name))
        assert roi.coordinates().tolist() == ring[:-1]
    probability = decode(archive.read("cells-probability.png")) / np.float32(65535)
    margin = probability - np.float32(read_table(archive)[0]["threshold"])
    opacity = decode(archive.read("cells-cutout.png"))[..., 3].astype(int)
    assert (np.abs(opacity - soften_edge(mask, margin)) <= 1).all()
    assert (opacity == 255)[labels > 0].mean() > 0.5
    rows = read_table(archive, "cells-measurements.csv")
    assert {int(row["id"]) for row in rows} == ids
    assert [int(row["area_px"]) for row in rows] == [int((labels == i).sum()) for i in sorted(ids)]
    (result,) = read_table(archive)
    assert int(result["objects"]) == len(ids)
    assert int(result["foreground_px"]) == (labels > 0).sum()
    assert (result["min_area"], result["deleted"]) == ("300 px", str(removed))

    page.click("#undelete")
    assert page.inner_text("#count") == f"{kept} nuclei"
    page.click("#filter-reset")
    assert page.inner_text("#count") == f"{count} nuclei"


def test_deleted_objects_stay_deleted_when_the_image_is_run_again(page: Page) -> None:
    choose_files(page, ("cells.png", SAMPLE))
    wait_done(page)
    wait_drawn(page)
    count = int(page.inner_text("#strip .count"))
    for column, place in (("area", 60), ("score", 1)):
        page.click(f"#table [data-sort={column}]")
        page.click(f"#table tbody tr:nth-child({place}) button")
        page.click("#object-delete")
    kept = page.inner_text("#table tbody")
    assert page.inner_text("#count") == f"{count - 2} nuclei"
    set_threshold(page, 0.99)
    one = "1 deleted object"
    expect(page.locator("#note")).to_have_text(f"{one} stays deleted. {one} was not found again.")
    assert page.inner_text("#undelete") == "Restore 1 deleted"
    page.click("#threshold-reset")
    expect(page.locator("#note")).to_have_text("2 deleted objects stay deleted.")
    wait_drawn(page)
    assert page.inner_text("#count") == f"{count - 2} nuclei"
    assert page.inner_text("#table tbody") == kept
    page.click("#undelete")
    assert page.inner_text("#count") == f"{count} nuclei"
    set_threshold(page, 0.99)
    expect(page.locator("#note")).to_be_hidden()


def set_threshold(page: Page, value: float) -> None:
    """Move the slider and release it."""
    page.evaluate(
        """(value) => {
            const slider = document.getElementById('threshold');
            slider.value = value;
            slider.dispatchEvent(new Event('change', {bubbles: true}));
        }""",
        value,
    )


@pytest.mark.parametrize("threshold", [None, "0.9"])
def test_files_of_all_objects_are_those_of_the_service(
    page: Page, server: Server, threshold: str | None
) -> None:
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    if threshold:
        with page.expect_response("**/segment*"):
            set_threshold(page, float(threshold))
        wait_done(page)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    choose_outputs(page, *ALL_KINDS)
    archive = unzip(save_file(page)[1])
    assert not [each for each in requests if "segment" in each]  # one inference for all files

    def made(kind: str) -> bytes:
        query = {"threshold": threshold} if threshold else {}
        return segment(server, output=kind, **query).content

    assert archive.read("cells-mask.png") == made("mask")
    assert archive.read("cells.geojson") == made("polygons")
    for kind in ("instances", "probability"):
        assert (decode(archive.read(f"cells-{kind}.png")) == decode(made(kind))).all()
    rois, expected_rois = unzip(archive.read("cells-rois.zip")), unzip(made("rois"))
    assert rois.namelist() == expected_rois.namelist() != []
    assert all(rois.read(name) == expected_rois.read(name) for name in rois.namelist())
    coco, expected_coco = json.loads(archive.read("cells-coco.json")), json.loads(made("coco"))
    expected_coco["images"][0]["file_name"] = "cells.png"  # a raw body has no name
    assert coco == expected_coco
    cutout, expected_cutout = decode(archive.read("cells-cutout.png")), decode(made("cutout"))
    assert (np.abs(cutout[..., 3].astype(int) - expected_cutout[..., 3]) <= 1).all()
    seen = cutout[..., 3] > 0
    assert (cutout[seen, :3] == expected_cutout[seen, :3]).all()
    assert not cutout[~seen].any()  # the background is not hidden, but gone
    expected_csv = made("measurements").decode().splitlines()
    found = archive.read("cells-measurements.csv").decode().splitlines()
    assert found[0] == expected_csv[0]
    for ours, theirs in zip(found[1:], expected_csv[1:], strict=True):
        for a, b in zip(ours.split(","), theirs.split(","), strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-6)


def test_tables_have_what_is_needed_to_repeat_the_run(page: Page, server: Server) -> None:
    choose_files(page, ("cells.png", CELLS), ("more.png", encode(nuclei(64, 96)[0])))
    wait_done(page, 2)
    name, content = save_file(page, "#download-all")
    assert name == "masks.zip"
    archive = unzip(content)
    model = httpx.get(f"{server.url}/models/nuclei").json()
    row = read_table(archive)[0]
    expected = {"model": model["id"], "threshold": str(model["threshold"]), "engine": "cpu/int8"}
    expected |= {"width": "200", "height": "120", "file": "cells-mask.png", "error": ""}
    expected |= {"server": httpx.get(f"{server.url}/v2").json()["version"]}
    assert {name: row[name] for name in expected} == expected
    mask = decode(archive.read("cells-mask.png"))
    assert int(row["foreground_px"]) == (mask > 0).sum()
    now = datetime.now().astimezone()
    assert abs(datetime.fromisoformat(row["date"]) - now) < timedelta(minutes=5)
    stamped = datetime(*archive.getinfo("cells-mask.png").date_time).astimezone()
    assert abs(stamped - now) < timedelta(minutes=5)
    objects = read_table(archive, "objects.csv")
    assert {row["image"] for row in objects} == {"cells.png", "more.png"}
    assert sum(row["image"] == "cells.png" for row in objects) == int(row["objects"])
    assert set(objects[0]) >= {"id", "area_px", "centroid_x_px", "left_px", "score"}


def test_pixel_size_gives_square_micrometers_and_a_scale_bar(page: Page) -> None:
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    wait_drawn(page)
    assert not page.is_visible("#scale-bar")
    page.fill("#pixel-size", "0.5")
    assert "µm²" in page.inner_text("#table thead")
    expect(page.locator("#scale-bar")).to_contain_text("µm")
    width = page.locator("#scale-bar").bounding_box()["width"]  # type: ignore[index]
    micrometers = float(page.inner_text("#scale-bar").split()[0])
    scale = float(page.inner_text("#zoom").removesuffix("%")) / 100
    assert micrometers / 0.5 * scale == pytest.approx(width, rel=0.02)
    choose_outputs(page, "measurements", "polygons")
    archive = unzip(save_file(page)[1])
    row = read_table(archive, "cells-measurements.csv")[0]
    feature = json.loads(archive.read("cells.geojson"))["features"][0]["properties"]
    assert float(row["area_um2"]) == pytest.approx(feature["area"] * 0.25)
    assert feature["measurements"]["area_um2"] == pytest.approx(feature["area"] * 0.25)
    assert read_table(archive)[0]["pixel_size_um"] == "0.5"


def test_pixel_size_of_the_file_is_used(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "cells.tif"
    metadata = {"unit": "um", "axes": "YX"}
    tifffile.imwrite(
        path, nuclei(120, 200)[0], imagej=True, resolution=(4.0, 4.0), metadata=metadata
    )
    choose_files(page, ("cells.tif", path.read_bytes()))
    wait_done(page)
    wait_drawn(page)
    assert "µm²" in page.inner_text("#table thead")
    expect(page.locator("#scale-bar")).to_contain_text("µm")
    assert read_table(unzip(save_zip(page)))[0]["pixel_size_um"] == "0.25"


def save_zip(page: Page) -> bytes:
    """Save two files of the shown image, and the tables."""
    choose_outputs(page, "mask", "measurements")
    return save_file(page)[1]


# --- view ------------------------------------------------------------------------------------


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


# --- formats ---------------------------------------------------------------------------------


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


# --- layout and keyboard ---------------------------------------------------------------------

SQUARES = np.kron(np.indices((32, 32)).sum(axis=0) % 2, np.full((16, 16), 255)).astype(np.uint8)


def send_many(route: Route) -> None:
    """Respond with many objects in place of the service."""
    send_mask(route, SQUARES)


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


# --- honesty ---------------------------------------------------------------------------------


USUAL = {"median": 0.04, "p95": 0.16}  # uncertainty of a model's test images


def give_uncertainty(page: Page, usual: dict[str, float] | None) -> None:
    """Load the page again, with a model whose card has this uncertainty."""

    def change(route: Route) -> None:
        document = route.fetch().json()
        for model in document["models"]:
            metrics = {k: v for k, v in model.get("metrics", {}).items() if k != "uncertainty"}
            model["metrics"] = metrics | ({"uncertainty": usual} if usual else {})
        route.fulfill(json=document)

    page.route("**/models", change)
    page.reload()
    page.wait_for_selector("#model option", state="attached")


def test_images_of_which_the_model_is_unsure_are_marked(page: Page, server: Server) -> None:
    give_uncertainty(page, USUAL)
    rng = np.random.default_rng(0)
    images = {
        "astronaut.jpg": ASTRONAUT,
        "black.png": encode(np.zeros((300, 300), np.uint8)),
        "noise.png": encode(rng.integers(0, 256, (300, 300)).astype(np.uint8)),
    }
    choose_files(page, *images.items(), ("cells.png", SAMPLE))
    wait_done(page, 4)
    for name in images:
        page.click(f"#strip [title='{name}']")
        expect(page.locator("#unlike")).to_be_visible()
        expected = "may be unlike" if name == "astronaut.jpg" else "Nothing was found"
        assert expected in page.inner_text("#unlike")
        assert page.get_attribute(f"#strip [title='{name}']", "data-unlike") == "true"
    page.click("#strip [title='cells.png']")
    expect(page.locator("#unlike")).to_be_hidden()
    rows = {row["image"]: row for row in read_table(unzip(save_file(page, "#download-all")[1]))}
    assert {name for name, row in rows.items() if row["hint"]} == set(images)
    headers = segment(server, SAMPLE).headers
    coverage, confidence = (float(headers[f"X-Mask-{each}"]) for each in ("Coverage", "Confidence"))
    uncertainty = float(rows["cells.png"]["uncertainty"])
    assert uncertainty == pytest.approx((1 - confidence) / coverage, abs=1e-3)
    assert uncertainty < 1.25 * USUAL["p95"] < float(rows["astronaut.jpg"]["uncertainty"])


@pytest.mark.parametrize(("p95", "marked"), [(0.05, True), (0.5, False), (None, False)])
def test_hint_depends_on_the_card_of_the_model_alone(
    page: Page, p95: float | None, marked: bool
) -> None:
    give_uncertainty(page, {"median": 0.01, "p95": p95} if p95 else None)
    headers = {"X_Mask_Coverage": "0.2", "X_Mask_Confidence": "0.98"}  # an uncertainty of 0.1
    page.route("**/segment*", lambda route: send_mask(route, square_mask(120, 200), **headers))
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    assert page.is_visible("#unlike") == marked
    if marked:
        assert "expects 10% of what it found to be wrong" in page.inner_text("#unlike")
        assert "less than 5% is usual" in page.inner_text("#unlike")
        set_threshold(page, 0.3)
        expect(page.locator("#threshold-reset")).to_be_visible()
        wait_finished(page)
        assert page.is_visible("#unlike")  # a threshold does not make the model surer


def test_models_are_described_with_good_and_bad_examples(page: Page) -> None:
    page.wait_for_selector("#model option", state="attached")
    page.click("#about-open")
    for model in ("nuclei", "person"):
        for kind, count in (("good", 3), ("bad", 2)):
            pictures = page.locator(f"#about img[src*='{model}-{kind}']")
            assert pictures.count() == count
            for picture in pictures.all():
                picture.scroll_into_view_if_needed()
                expect(picture).to_have_js_property("complete", True)
                assert picture.evaluate("(image) => image.naturalWidth") > 0
    assert "images that it was not trained on" in page.inner_text("#about")
    assert "on 49 of them it found" in page.inner_text("#about")  # the others have no objects
