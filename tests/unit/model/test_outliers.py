"""Absurd values are found, however many blocks an image comes in."""

from __future__ import annotations

import numpy as np
import pytest

from model.outliers import count_few, find_gaps, find_range, replace_absurd

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(100, 10, (128, 128)).clip(60, 140).astype(np.float32)


def measure(values: np.ndarray, blocks: int = 1) -> tuple[float, float]:
    return find_range(np.array_split(values.ravel(), blocks), values.size)


def ends(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


@pytest.mark.parametrize("blocks", [1, 7, 128])
def test_an_ordinary_image_has_its_whole_range(blocks: int) -> None:
    assert measure(IMAGE, blocks) == ends(IMAGE)
    ramp = np.arange(10_000.0)
    assert measure(ramp, blocks) == ends(ramp)


@pytest.mark.parametrize("blocks", [1, 7, 128])
@pytest.mark.parametrize("count", [1, 10, 32])
@pytest.mark.parametrize("amount", [300.0, 1e3, 1e6, 1e30])
def test_a_few_hot_and_dead_pixels_are_left_out(amount: float, count: int, blocks: int) -> None:
    places = RNG.permutation(IMAGE.size)[: 2 * count]
    damaged = IMAGE.copy()
    damaged.flat[places[:count]] = amount * RNG.uniform(1, 2, count)
    others = np.delete(damaged.ravel(), places[:count])
    assert measure(damaged, blocks) == ends(others)
    damaged.flat[places[count:]] = -amount * RNG.uniform(1, 2, count)
    others = np.delete(damaged.ravel(), places)
    assert measure(damaged, blocks) == ends(others)


def test_amounts_without_a_gap_are_bounded() -> None:
    damaged = IMAGE.copy()
    damaged.flat[:32] = 150 * 1.3 ** np.arange(32)
    low, high = measure(damaged)
    assert low == IMAGE.min()
    assert high < 22 * np.ptp(IMAGE)


def test_bright_objects_are_not_absurd() -> None:
    """Small objects have edges, and synthetic images without noise have no scale to compare."""
    y, x = np.mgrid[:128, :128]
    spot = IMAGE + 900 * np.exp(-((y - 60) ** 2 + (x - 70) ** 2) / 8)
    assert measure(spot) == ends(spot)
    flat = np.zeros((128, 128))
    flat[5, 5:9] = 200
    assert measure(flat) == (0, 200)


def test_few_values_are_few_in_small_images_too() -> None:
    assert [count_few(n) for n in (1, 49, 100, 4096, 16384, 10**6)] == [0, 0, 2, 16, 32, 2000]
    tiny = np.array([[0.0, 1e9]])
    assert measure(tiny) == (0, 1e9)


def test_gaps_of_the_largest_numbers_do_not_overflow() -> None:
    most = np.finfo(np.float64).max
    assert find_gaps(np.array([-most, 0.0]), np.array([1.0, most])) == (0.0, 1.0)


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 3)])
def test_absurd_values_become_the_median_of_their_neighbours(shape: tuple[int, ...]) -> None:
    image = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    absurd = np.zeros(shape, bool)
    absurd[4, 4], absurd[0, 0], absurd[4, 5] = True, True, True
    missing = np.zeros(shape, bool)
    missing[0, 1] = missing[1, 0] = True
    repaired = image.copy()
    repaired[absurd] = 65535
    replace_absurd(repaired, absurd, missing)
    assert (repaired[~absurd] == image[~absurd]).all()
    assert (repaired[0, 0] == image[1, 1]).all()
    around = [image[y, x] for y in (3, 4, 5) for x in (3, 4, 5) if (y, x) not in ((4, 4), (4, 5))]
    assert (repaired[4, 4] == np.rint(np.median(around, axis=0))).all()


def test_absurd_values_without_neighbours_stay() -> None:
    image = np.full((3, 3), 9, np.uint16)
    replace_absurd(image, np.ones((3, 3), bool))
    assert (image == 9).all()
