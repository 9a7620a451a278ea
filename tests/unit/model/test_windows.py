"""Windows cover the image, their weights sum to one, and few pixels are computed twice."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import numpy as np
import pytest
import torch

from model import windows as windows_module
from model.arrays import Shape
from model.config import PreprocessConfig, UNetConfig
from model.predict import Predictor
from model.unet import UNet
from model.windows import AxisTiling, Stitcher, plan_windows

PADDED, UNPADDED = UNetConfig(), UNetConfig(padding=0)


def draw_lengths(count: int) -> list[int]:
    rng = random.Random(0)
    return [1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 10_000] + [
        rng.randrange(1, 3000) for _ in range(count)
    ]


@pytest.mark.parametrize("length", draw_lengths(40))
def test_tiling_covers_the_axis_with_weights_that_sum_to_1(length: int) -> None:
    for sides, overlap in (
        ((256,), 64),
        ((256, 368, 544), 128),
        ((256, 368, 544), 32),
        ((64, 80), 0),
        ((64,), 63),
        ((388, 276), 0),
    ):
        axis = AxisTiling.plan(length, sides, overlap)
        assert set(axis.sizes) <= set(sides)
        assert axis.starts[0] == 0
        stops = [start + size for start, size in zip(axis.starts, axis.sizes, strict=True)]
        assert stops[-1] >= length
        assert max(stops) < length + 16 or len(stops) == 1
        assert all(start % 16 == 0 for start in axis.starts)
        total = np.zeros(max(stops))
        for start, stop, weight in zip(axis.starts, stops, axis.weights, strict=True):
            assert weight.min() >= 0
            total[start:stop] += weight
        assert np.abs(total - 1).max() < 1e-6
        for size, stop, start in zip(axis.sizes, stops, axis.starts[1:], strict=False):
            assert stop - start >= min(overlap, size - 16)


@pytest.mark.parametrize("grid", [32, 48])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 300, 545, 700, 1111])
def test_windows_start_on_the_grid_of_the_network(length: int, grid: int) -> None:
    axis = AxisTiling.plan(length, (256, 384, 544), 128, grid)
    assert all(start % grid == 0 for start in axis.starts)
    stops = [start + size for start, size in zip(axis.starts, axis.sizes, strict=True)]
    assert stops[-1] >= length
    assert stops[-1] < length + grid or len(stops) == 1
    for size, stop, start in zip(axis.sizes, stops, axis.starts[1:], strict=False):
        assert stop - start >= min(128, size - grid)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 900), (300, 310), (512, 512), (700, 1111)]
)
def test_stitching_undoes_cutting(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    plan = plan_windows(height, width, PADDED, PreprocessConfig())
    stitcher = Stitcher(plan, 3)
    for window in plan.windows:
        out = np.empty((*window.shape, 3), np.uint8)
        plan.cut(image, window, out)
        stitcher.add(window, out.transpose(2, 0, 1).astype(np.float32))
    assert np.abs(stitcher.result() - image.transpose(2, 0, 1)).max() < 1e-3


def test_image_is_reflected_at_its_edge() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 1), dtype=np.uint8)
    plan = plan_windows(40, 70, PADDED, PreprocessConfig(window=((64, 128),), overlap=0))
    out = np.empty((64, 128, 1), np.uint8)
    plan.cut(image, plan.windows[0], out)
    expected = np.pad(image, ((0, 24), (0, 58), (0, 0)), mode="reflect")
    assert (out == expected).all()


@pytest.mark.parametrize(("height", "width"), [(40, 70), (300, 310), (700, 1111)])
def test_broadcast_grey_is_cut_like_color(height: int, width: int) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (height, width, 1), dtype=np.uint8)
    shown = np.broadcast_to(grey, (height, width, 3))  # like the result of `prepare`
    plan = plan_windows(height, width, PADDED, PreprocessConfig())
    for window in plan.windows:
        out, expected = np.zeros((2, *window.shape, 3), np.uint8)
        plan.cut(shown, window, out)
        plan.cut(shown.copy(), window, expected)
        assert np.array_equal(out, expected)
        plan.cut(grey, window, out)  # a single channel
        assert np.array_equal(out, expected)


def test_tiny_image_is_reflected_many_times() -> None:
    image = np.array([[[1], [2], [3]]], np.uint8)
    plan = plan_windows(1, 3, PADDED, PreprocessConfig(window=((16, 16),), overlap=0))
    out = np.empty((16, 16, 1), np.uint8)
    plan.cut(image, plan.windows[0], out)
    assert (out[:, :, 0] == [1, 2, 3, 2] * 4).all()


def test_plan_computes_the_fewest_pixels() -> None:
    preprocess = PreprocessConfig(window=((256, 256), (512, 512), (256, 512)))
    for size, shape in (((200, 500), (256, 512)), ((500, 500), (512, 512)), ((9, 9), (256, 256))):
        (window,) = plan_windows(*size, PADDED, preprocess).windows
        assert window.shape == shape
    for height, width in ((300, 900), (1000, 1000), (2000, 300)):
        best = plan_windows(height, width, PADDED, preprocess)
        assert {window.shape for window in best.windows} <= set(preprocess.window)
        for shape in preprocess.window:
            alone = plan_windows(height, width, PADDED, PreprocessConfig(window=(shape,)))
            assert best.overhead <= alone.overhead


NUCLEI = (
    (256, 256, 278),
    (256, 320, 92),
    (520, 696, 76),
    (360, 360, 74),
    (1024, 1024, 14),
    (512, 640, 11),
    (603, 1272, 5),
    (260, 347, 3),
    (1040, 1388, 1),
)
"""(height, width, images) of the nuclei data set, validation images included."""


def test_overhead_is_small_for_the_nuclei_data_set() -> None:
    overhead = [plan_windows(h, w, PADDED, PreprocessConfig()).overhead for h, w, _ in NUCLEI]
    assert np.average(overhead, weights=[images for *_, images in NUCLEI]) <= 1.16


def test_overhead_is_small_for_large_images() -> None:
    """4 to 100 megapixels, up to four times as wide as high and the reverse."""
    rng = random.Random(0)
    overhead = []
    for _ in range(400):
        pixels = math.exp(rng.uniform(math.log(4.01e6), math.log(100e6)))
        ratio = math.exp(rng.uniform(-math.log(4), math.log(4)))
        height, width = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        overhead.append(plan_windows(height, width, PADDED, PreprocessConfig()).overhead)
    assert np.mean(overhead) <= 1.18
    assert max(overhead) <= 1.2
    for height, width in ((2000, 2000), (2048, 2048), (3000, 4000), (4000, 6000), (10000, 10000)):
        assert plan_windows(height, width, PADDED, PreprocessConfig()).overhead <= 1.2


def test_there_are_at_most_12_window_shapes() -> None:
    assert len(PreprocessConfig().window) <= 12


def test_planning_an_extremely_long_image_is_fast() -> None:
    start = time.process_time()
    plan = plan_windows(1, 100_000_000, PADDED, PreprocessConfig())
    assert plan.count > 100_000
    assert plan.overhead > 1
    assert time.process_time() - start < 0.1
    assert not {"sizes", "windows"} & (vars(plan) | vars(plan.columns)).keys()  # only counted
    assert len(plan.windows) == plan.count


def test_image_without_pixels_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        plan_windows(0, 5, PADDED, PreprocessConfig())


def test_unpadded_windows_equal_the_whole_image() -> None:
    """With padding=0 inputs overlap by the lost border, and outputs abut exactly."""
    torch.manual_seed(0)
    network = UNet(1, 1, base_features=2, padding=0)
    preprocess = PreprocessConfig(window=((252, 252),), overlap=0, mean=(0.5,), std=(0.25,))
    image = np.random.default_rng(0).integers(0, 256, (150, 130), dtype=np.uint8)
    stitched = Predictor(network, preprocess)(image)
    plan = plan_windows(150, 130, network.config, preprocess)
    assert plan.count > 4
    bottom, right = plan.rows.starts[-1] + 68, plan.columns.starts[-1] + 68
    padded = np.pad(image, ((92, 92 + bottom - 150), (92, 92 + right - 130)), mode="reflect")
    x = (torch.from_numpy(padded)[None, None].float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        whole = network(x).sigmoid().numpy()[0, :, :150, :130]
    assert np.abs(stitched - whole).max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (5, 300), (64, 96), (70, 75), (200, 310)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("grey", [False, True])
def test_cut_reflects_only_what_hangs_over_an_edge(
    size: Shape, padding: int, grey: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window equals the one that is gathered whole, and gathers only its strips."""
    preprocess = PreprocessConfig(overlap=16, window=((188, 204),) if not padding else ((64, 96),))
    plan = plan_windows(*size, UNetConfig(3, 1, 8, padding), preprocess)
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 1 if grey else 3), np.uint8)
    image = np.broadcast_to(pixels, (*size, 3))
    gathered: list[int] = []
    reflect = windows_module._reflect

    def count(start: int, stop: int, length: int) -> Any:
        gathered.append(stop - start)
        return reflect(start, stop, length)

    monkeypatch.setattr(windows_module, "_reflect", count)
    for window in plan.windows:
        gathered.clear()
        out = np.empty((*window.shape, 3), np.uint8)
        plan.cut(image, window, out)
        top = plan.rows.starts[window.row] - plan.margin
        left = plan.columns.starts[window.column] - plan.margin
        rows = reflect(top, top + window.shape[0], size[0])
        columns = reflect(left, left + window.shape[1], size[1])
        assert np.array_equal(out, image[rows[:, None], columns])
        inside = [
            min(start + side, length) - max(start, 0)
            for start, side, length in zip((top, left), window.shape, size, strict=True)
        ]
        assert sum(gathered) == sum(window.shape) - sum(inside)


@pytest.mark.parametrize("size", [(60, 90), (200, 310)])
def test_probabilities_as_integers_are_blended_like_floats(size: Shape) -> None:
    preprocess = PreprocessConfig(overlap=16, window=((64, 96),))
    plan = plan_windows(*size, PADDED, preprocess)
    integers, floats = Stitcher(plan, 1), Stitcher(plan, 1)
    rng = np.random.default_rng(3)
    for window in plan.windows:
        values = rng.integers(0, 65536, (2, *window.shape), np.uint16)
        integers.add(window, values)
        floats.add(window, (values / 65535).astype(np.float32))
    assert np.abs(integers.result() - floats.result()).max() < 1e-6
    one = Stitcher(plan_windows(64, 96, PADDED, preprocess), 1)
    one.add(one.plan.windows[0], np.full((1, 64, 96), 65535, np.uint16))
    assert (one.result() == 1).all()
