"""Images that browsers show wrongly, and masks that they cannot show."""

from __future__ import annotations

import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from app.imaging.png import encode_labels
from model.objects import Objects
from model.polygons import encode_polygons
from tests.browser.conftest import (
    choose_files,
    choose_outputs,
    outputs_of,
    render_output,
    save_file,
    saved_view,
    send_mask,
    send_outputs,
    send_problem,
    square_mask,
    unzip,
    wait_done,
    wait_drawn,
)
from tests.conftest import Server, decode, encode, nuclei


def preview_of(server: Server, data: bytes) -> np.ndarray:
    headers = {"Content-Type": "application/octet-stream"}
    url = f"{server.url}/segment?output=preview"
    response = httpx.post(url, content=data, headers=headers, timeout=60)
    preview = decode(response.content)
    return preview if preview.ndim == 3 else preview[..., None]


def test_sixteen_bit_png_is_shown_over_its_full_range(page: Page, server: Server) -> None:
    data = encode(nuclei(60, 80)[0].astype(np.uint16) * 16)  # as of a 12-bit camera
    choose_files(page, ("camera.png", data))
    wait_done(page)
    assert "8 of 16 bits" in page.inner_text("#note")
    shown = saved_view(page, "image")
    assert (shown == preview_of(server, data)).all()
    assert shown.max() == 255


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6])  # by 180 and by 90 degrees
def test_orientation_that_browsers_may_ignore_is_applied(
    page: Page, server: Server, format: str, orientation: int
) -> None:
    requests: list[list[str]] = []
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    image = Image.fromarray(nuclei(40, 90)[0]).convert("RGB")
    image.save(buffer, format, lossless=True, exif=exif)

    def serve(route: Route) -> None:
        requests.append(outputs_of(route))
        route.continue_()

    page.route("**/segment*", serve)
    choose_files(page, ("phone", buffer.getvalue()))
    wait_done(page)
    assert "how they turn this image" in page.inner_text("#note")
    shown = saved_view(page, "image")
    assert shown.shape[:2] == ((90, 40) if orientation == 6 else (40, 90))
    assert (shown == preview_of(server, buffer.getvalue())).all()
    assert requests == [["mask", "polygons", "probability", "preview"]]


def test_upright_image_with_exif_is_shown_as_it_is(page: Page) -> None:
    exif = Image.Exif()
    exif[274] = 1
    exif[305] = "a screenshot"  # software
    buffer = io.BytesIO()
    image = nuclei(40, 90)[0] // 4
    Image.fromarray(image).save(buffer, "PNG", exif=exif)
    choose_files(page, ("screenshot.png", buffer.getvalue()))
    wait_done(page)
    assert not page.is_visible("#note")
    assert (saved_view(page, "image") == image[..., None]).all()


def test_mask_is_shown_if_the_image_is_damaged(page: Page) -> None:
    mask = square_mask(50, 70)

    def serve(route: Route) -> None:
        send_mask(route, mask) if "mask" in outputs_of(route) else send_problem(route, 422, "no")

    page.route("**/segment*", serve)
    choose_files(page, ("a.tif", encode(nuclei(50, 70)[0], "TIFF")))
    wait_done(page)
    assert (saved_view(page, "mask")[..., 0] == mask).all()
    choose_outputs(page, "mask")
    assert save_file(page)[1] == render_output("mask", mask)


def test_mask_wider_than_a_canvas_is_shown_and_can_be_downloaded(page: Page) -> None:
    mask = square_mask(20, 70_000)
    page.route("**/segment*", lambda route: send_mask(route, mask))
    choose_files(page, ("long.png", encode(mask)))
    wait_done(page)
    wait_drawn(page)
    assert page.is_visible("#canvas")
    assert page.inner_text("#count") == "1 nucleus"
    assert save_file(page)[1] == render_output("mask", mask)
    choose_outputs(page, "overlay")
    page.click("#download")
    page.wait_for_selector("#notice:visible")
    assert "too large for a picture" in page.inner_text("#notice")


def test_large_counts_have_separators(page: Page) -> None:
    squares = np.kron(np.indices((50, 50)).sum(axis=0) % 2, np.full((6, 6), 255)).astype(np.uint8)
    page.route("**/segment*", lambda route: send_mask(route, squares))
    choose_files(page, ("many.png", encode(squares)))
    wait_done(page)
    assert page.inner_text("#count") == "1,250 nuclei"
    assert page.inner_text("#strip .count") == "1,250"


def test_unknown_facts_have_no_row(page: Page) -> None:
    def serve(route: Route) -> None:
        fulfill = route.fulfill
        route.fulfill = lambda **given: fulfill(  # type: ignore[method-assign]
            **given | {"headers": {"Content-Type": "application/zip"}}
        )
        send_mask(route)

    page.route("**/segment*", serve)
    choose_files(page, ("a.png", encode(nuclei(64, 64)[0])))
    wait_done(page)
    page.click("#details summary")
    terms = page.locator("#facts dt").all_inner_texts()
    assert set(terms) <= {"Size", "Time", "Model", "Threshold"}
    assert not {"NaN", "null"} & set(page.inner_text("#facts").split())


def test_objects_of_several_classes_have_the_colors_of_their_classes(page: Page) -> None:
    colors = ((0, 0, 0), (255, 0, 0), (0, 0, 255))
    classes = np.zeros((60, 90), np.uint8)
    classes[10:30, 10:30] = 1
    classes[30:50, 30:70] = 2  # it touches the other at a corner
    labels = classes.astype(np.int32)
    objects = Objects(labels, np.array([1, 2], np.uint8), np.array([400, 800]), np.full(2, 0.9))
    columns = {"area_px": np.array([400.0, 800.0])}
    polygons = encode_polygons(objects, ("background", "cat", "dog"), colors, columns)
    entry = {"name": "pets", "ready": True, "default": True, "error": None, "id": "pets@1"}
    entry |= {"classes": ["background", "cat", "dog"], "device": "cpu"}
    page.route("**/models", lambda route: route.fulfill(json={"models": [entry]}))
    page.route(
        "**/segment*",
        lambda route: send_outputs(
            route,
            {
                "mask": encode_labels(classes, colors),
                "polygons": polygons,
                "probability": encode(np.where(classes, 60000, 3000).astype(np.uint16)),
            },
        ),
    )
    page.reload()
    expect(page.locator("#service")).to_have_text("Ready. Finds cat, dog.")
    choose_files(page, ("pets.png", encode(np.zeros((60, 90, 3), np.uint8))))
    wait_done(page)
    assert page.inner_text("#count") == "2 objects"
    assert not page.is_visible("#threshold-row")
    assert page.locator("#table td:nth-child(2)").all_inner_texts() == ["cat", "dog"]
    shown = saved_view(page, "mask")
    assert (shown == np.array(colors)[classes]).all()
    choose_outputs(page, "cutout", "coco")
    archive = unzip(save_file(page)[1])
    opacity = decode(archive.read("pets-cutout.png"))[..., 3]
    assert (opacity[classes == 0] < 128).all()
    assert (opacity[classes > 0] > 128).all()
    coco = json.loads(archive.read("pets-coco.json"))
    assert [each["name"] for each in coco["categories"]] == ["cat", "dog"]
    assert [each["category_id"] for each in coco["annotations"]] == [1, 2]
    page.click("#table tbody tr:first-child button")
    page.click("#object-delete")
    assert page.inner_text("#count") == "1 object"
    choose_outputs(page, "mask")
    with Image.open(io.BytesIO(save_file(page)[1])) as saved:
        assert saved.mode == "P"
        assert (np.asarray(saved) == np.where(classes == 2, 2, 0)).all()
        assert saved.getpalette() == [value for color in colors for value in color]
