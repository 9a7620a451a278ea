"""Measurements equal those of scikit-image, and are written with their units."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from skimage.measure import regionprops_table

from model.arrays import AnyArray
from model.measurements import encode_csv, measure_objects
from tests.conftest import nuclei
from tests.objects import CLASSES, draw_discs, make_objects

NAMES = {
    "area_px": "area",
    "perimeter_px": "perimeter",
    "equivalent_diameter_px": "equivalent_diameter_area",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "left_px": "bbox-1",
    "top_px": "bbox-0",
}


def draw_noise(seed: int) -> AnyArray:
    """Labels 1..n of single pixels, scattered parts, holes and touching objects."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, rng.integers(1, 20, 2))
    if seed % 3 == 0:
        labels = np.kron(labels, np.ones((3, 2), int))
    return np.unique(np.append(0, labels), return_inverse=True)[1][1:].reshape(labels.shape)


def assert_equals_library(labels: AnyArray, image: AnyArray) -> None:
    columns = measure_objects(make_objects(labels), image)
    wanted = ("centroid", "bbox", "intensity_mean", *NAMES.values())
    expected = regionprops_table(
        labels, image, properties=[name for name in wanted if "-" not in name]
    )
    for name, theirs in NAMES.items():
        np.testing.assert_allclose(columns[name], expected[theirs], atol=1e-9, err_msg=name)
    # Theirs are pixel indices, ours distances from the outer corner of the first pixel.
    np.testing.assert_allclose(columns["centroid_x_px"], expected["centroid-1"] + 0.5)
    np.testing.assert_allclose(columns["centroid_y_px"], expected["centroid-0"] + 0.5)
    np.testing.assert_array_equal(columns["width_px"], expected["bbox-3"] - expected["bbox-1"])
    np.testing.assert_array_equal(columns["height_px"], expected["bbox-2"] - expected["bbox-0"])
    for channel in range(1 if image.ndim == 2 else 3):
        theirs = "intensity_mean" if image.ndim == 2 else f"intensity_mean-{channel}"
        np.testing.assert_allclose(columns[f"mean_intensity_{channel + 1}"], expected[theirs])


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # theirs, for single pixels
def test_any_label_map_is_measured_as_by_scikit_image(seed: int) -> None:
    labels = draw_noise(seed)
    if not labels.any():
        return
    shape = labels.shape if seed % 2 else (*labels.shape, 3)
    image = np.random.default_rng(seed).integers(0, 65536, shape).astype(np.uint16)
    assert_equals_library(labels, image)


def test_nuclei_are_measured_as_by_scikit_image() -> None:
    image, labels = nuclei(200, 300, seed=1)
    assert_equals_library(np.unique(labels, return_inverse=True)[1].reshape(labels.shape), image)


def test_intensities_are_of_the_original_values() -> None:
    image = np.full((4, 4, 3), 60000, np.uint16)
    image[..., 1] = 7
    columns = measure_objects(make_objects(np.ones((4, 4), int)), image)
    assert columns["integrated_intensity_1"].tolist() == [16 * 60000]
    assert columns["mean_intensity_2"].tolist() == [7]


def test_a_pixel_size_gives_micrometres() -> None:
    image, labels = nuclei(100, 100)
    objects = make_objects(np.unique(labels, return_inverse=True)[1].reshape(labels.shape))
    pixels, micrometres = measure_objects(objects, image), measure_objects(objects, image, 0.5)
    np.testing.assert_allclose(micrometres["area_um2"], pixels["area_px"] / 4)
    for name in ("centroid_x", "left", "width", "perimeter", "equivalent_diameter"):
        np.testing.assert_allclose(micrometres[f"{name}_um"], pixels[f"{name}_px"] / 2)
    assert not any(name.endswith("_px") for name in micrometres)
    np.testing.assert_array_equal(micrometres["solidity"], pixels["solidity"])


def test_hulls_do_not_depend_on_how_many_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects, image = make_objects(draw_discs(60, 12)), np.zeros((60, 60), np.uint8)
    together = measure_objects(objects, image)["solidity"]
    for points in (1, 30):
        monkeypatch.setattr("model.measurements._HULL_POINTS", points)
        np.testing.assert_array_equal(measure_objects(objects, image)["solidity"], together)


def test_csv_has_one_line_per_object() -> None:
    labels = draw_discs(60, 12)
    objects = make_objects(labels, score=0.9876)
    columns = measure_objects(objects, np.full(labels.shape, 9, np.uint8))
    text = encode_csv(objects, CLASSES, columns).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["id", "class", *columns, "score"]
    assert [row["id"] for row in rows] == [str(label) for label in range(1, 26)]
    assert {row["class"] for row in rows} == {"nucleus"}
    assert {row["score"] for row in rows} == {"0.9876"}
    assert [int(row["area_px"]) for row in rows] == objects.areas.tolist()
    assert float(rows[0]["perimeter_px"]) == pytest.approx(columns["perimeter_px"][0], rel=1e-7)


def test_csv_of_no_objects_is_a_header() -> None:
    empty = make_objects(np.zeros((3, 3), int))
    text = encode_csv(empty, CLASSES, measure_objects(empty, np.zeros((3, 3), np.uint8))).decode()
    assert text.startswith("id,class,area_px,")
    assert text.count("\n") == 1
