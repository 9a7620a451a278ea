"""Whether the page marks images that are unlike those of the training, and how it shows models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, Route, expect
from scipy import ndimage

from benchmarks.hints import DOUBT_LIMITS, measure_doubt
from model.instances import MIN_PIXELS
from tests.browser.conftest import (
    choose_files,
    outputs_of,
    read_table,
    render_output,
    save_file,
    send_mask,
    send_outputs,
    square_mask,
    unzip,
    wait_done,
    wait_finished,
)
from tests.browser.results import ASTRONAUT, CELLS, SAMPLE, segment, set_threshold
from tests.conftest import Server, decode, encode

MANIFEST = Path(__file__).parents[2] / "weights/manifest.json"
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
        hint = page.inner_text("#unlike")
        expected = "may be unlike" if name == "astronaut.jpg" else "Nothing was found."
        if name == "noise.png" and decode(segment(server, images[name]).content).any():
            expected = "No object was found. The mask has"  # which depends on the engine
        assert expected in hint
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


def draw_part(pixels: int) -> np.ndarray:
    """A mask with a diagonal line of a number of pixels."""
    mask = np.zeros((120, 200), np.uint8)
    mask[np.arange(pixels), np.arange(pixels)] = 255
    return mask


def draw_many(count: int, pixels: int) -> np.ndarray:
    """A mask with horizontal lines of a number of pixels."""
    mask = np.zeros((2 * count, 200), np.uint8)
    mask[::2, :pixels] = 255
    return mask


UNCERTAIN = (
    "No object was found. The mask covers {}% of the image, but its parts are too uncertain, or "
    f"smaller than {MIN_PIXELS} pixels."
)
SMALL = (
    "No object was found. The mask has {}, but its parts are too small: an object has at least "
    f"{MIN_PIXELS}."
)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (np.zeros((120, 200), np.uint8), "Nothing was found."),
        (np.full((120, 200), 255, np.uint8), UNCERTAIN.format(100)),
        (draw_part(MIN_PIXELS), UNCERTAIN.format(0.15)),
        (draw_part(MIN_PIXELS - 1), SMALL.format(f"{MIN_PIXELS - 1} pixels")),
        (draw_part(1), SMALL.format("1 pixel")),
        (draw_many(60, MIN_PIXELS - 1), SMALL.format("2,100 pixels")),
    ],
)
def test_mask_without_objects_is_not_called_nothing(
    page: Page, mask: np.ndarray, expected: str
) -> None:
    def serve(route: Route) -> None:
        contents = {each: render_output(each, mask) for each in outputs_of(route)}
        contents["polygons"] = render_output("polygons", np.zeros_like(mask))
        send_outputs(route, contents)

    page.route("**/segment*", serve)
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    assert page.inner_text("#unlike") == f"{expected} The model finds cell nuclei."
    assert page.inner_text("#count") == "0 objects"
    assert page.get_attribute("#strip button", "data-unlike") == "true"


def send_doubtful(route: Route, model: str) -> None:
    """A mask of which the model is sure by its headers, with doubt in a corner."""
    mask = square_mask(120, 200)
    probability = mask.astype(np.uint16) * 257
    probability[:30, :30] = 0.6 * 65535  # 900 pixels below the threshold; 6000 are found
    contents = {each: render_output(each, mask) for each in outputs_of(route)}
    headers = {"X_Model": model, "X_Mask_Coverage": "0.25", "X_Mask_Confidence": "0.999"}
    send_outputs(route, contents | {"probability": encode(probability)}, **headers)


@pytest.mark.parametrize("known", [True, False])
def test_doubt_away_from_outlines_is_marked_where_a_limit_was_measured(
    page: Page, known: bool
) -> None:
    """New weights need a new limit: `python -m benchmarks.hints`."""
    digest = json.loads(MANIFEST.read_text())["nuclei.safetensors"]["sha256"]
    model = f"nuclei@{digest[:12]}" if known else "nuclei@000000000000"
    assert model in DOUBT_LIMITS or not known
    page.route("**/segment*", lambda route: send_doubtful(route, model))
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    assert page.is_visible("#unlike") == known
    if known:
        expected = "Away from outlines the model expects 9.0% of what it found to be wrong; less"
        assert expected in page.inner_text("#unlike")
        set_threshold(page, 0.3)
        expect(page.locator("#threshold-reset")).to_be_visible()
        wait_finished(page)
        assert expected in page.inner_text("#unlike")  # it depends on the model's own threshold


@pytest.mark.parametrize("kind", ["field", "noise", "empty"])
def test_doubt_is_the_same_on_the_page_and_in_the_benchmark(page: Page, kind: str) -> None:
    rng = np.random.default_rng(0)
    values = {
        "field": ndimage.gaussian_filter(rng.random((47, 61)), 3),
        "noise": rng.random((23, 40)),
        "empty": np.full((9, 9), 0.2),
    }[kind]
    values = np.interp(values, (values.min(), values.max()), (0, 0.3 if kind == "empty" else 1))
    probability = np.round(values * 65535).astype(np.uint16)
    found = page.evaluate(
        """async ([width, height, values]) => {
            const {measureDoubt} = await import('./static/doubt.js');
            return measureDoubt({width, height, data: Uint16Array.from(values)}, 0.65);
        }""",
        [probability.shape[1], probability.shape[0], probability.ravel().tolist()],
    )
    expected = measure_doubt(probability >= 0.65 * 65535, probability)
    assert (found or 0) == pytest.approx(expected, rel=1e-9)
    assert (found is None) == (kind == "empty")
    assert (expected > 0) == (kind == "field")


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
