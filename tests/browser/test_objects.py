"""The objects of an image: counted, found, removed, measured, and in every file."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
import roifile
import tifffile
from playwright.sync_api import Page, expect
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
    unzip,
    wait_done,
    wait_drawn,
)
from tests.browser.results import CELLS, SAMPLE, segment, set_threshold, to_screen
from tests.conftest import Server, decode, encode, nuclei


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
    removed = []
    for row in (5, 3):
        page.click(f"#table tbody tr:nth-child({row}) button")
        removed.append(int(page.inner_text(f"#table tbody tr:nth-child({row}) button")))
        page.click("#object-delete")
    assert page.inner_text("#count") == f"{kept - 2} nuclei"
    assert page.evaluate("document.activeElement.id") == "stage"
    ids = {int(each) for each in page.locator("#table td:first-child").all_inner_texts()}
    assert not ids & {*removed}
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
    assert result["min_area"] == "300 px"
    assert result["deleted"] == " ".join(map(str, sorted(removed)))

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


def test_selected_object_has_the_unit_of_the_table(page: Page) -> None:
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    wait_drawn(page)
    page.click("#table tbody tr:nth-child(2) button")
    area = int(page.inner_text("#table tbody tr:nth-child(2) td:nth-child(2)").replace(",", ""))
    text = page.inner_text("#object-text")
    assert f"· {area:,} px ·" in text
    page.fill("#pixel-size", "0.5")
    assert page.inner_text("#object-text") == text.replace(f"{area:,} px", f"{area / 4:,.4g} µm²")
    page.fill("#pixel-size", "")
    assert page.inner_text("#object-text") == text
    page.fill("#min-area", str(area + 1))
    assert not page.is_visible("#object")  # the filter hides the object
    page.fill("#min-area", "")
    assert page.inner_text("#object-text") == text


def test_objects_that_are_all_removed_are_explained(page: Page) -> None:
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    wait_drawn(page)
    count = page.locator("#table tbody tr").count()
    assert count > 1
    assert not page.is_visible("#hidden-note")
    page.fill("#min-area", "1000000")
    assert page.inner_text("#count") == "0 nuclei"
    assert page.inner_text("#hidden-note") == f"All {count} objects are hidden by the filter."
    page.click("#filter-reset")
    assert not page.is_visible("#hidden-note")
    page.click("#table tbody tr:first-child button")
    page.click("#object-delete")
    assert not page.is_visible("#hidden-note")
    page.fill("#min-area", "1000000")
    expected = f"All {count} objects are deleted or hidden by the filter."
    assert page.inner_text("#hidden-note") == expected


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
