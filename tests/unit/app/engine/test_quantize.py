"""Weights as whole numbers: what they promise every CPU, and what they keep of the weights."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from app.engine.quantize import LARGEST, rounded, whole


def kernels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)


@pytest.mark.parametrize(("axis", "shape"), [(0, (16, 8, 3, 3)), (1, (8, 16, 2, 2))])
def test_each_output_channel_has_a_scale_of_its_own(axis: int, shape: tuple[int, ...]) -> None:
    weight = kernels(*shape)
    weight[:, 3] *= 40
    weight[5] *= 40
    numbers, scale = whole(weight, axis)
    others = tuple(each for each in range(4) if each != axis)
    assert scale.shape == tuple(16 if each == axis else 1 for each in range(4))
    assert (np.abs(numbers).max(axis=others) == LARGEST).all()
    assert (np.abs(numbers * scale - weight) <= scale * 1.0001).all()


def test_an_output_channel_without_weights_is_no_division_by_zero() -> None:
    weight = kernels(4, 2, 3, 3)
    weight[1] = 0
    numbers, scale = whole(weight, 0)
    assert not numbers[1].any()
    assert np.isfinite(scale).all()


def test_the_sum_of_a_kernel_is_right_to_half_a_step_and_each_tap_to_one() -> None:
    steps = np.random.default_rng(1).uniform(-LARGEST, LARGEST, (300, 20, 3, 3)).astype(np.float32)
    result = rounded(steps)
    assert np.array_equal(result, np.rint(result))
    assert np.abs(result - steps).max() < 1
    assert np.abs(result).max() <= LARGEST
    assert np.abs((result - steps).sum(axis=(2, 3))).max() <= 0.5 + 1e-4
    alone = np.abs((np.rint(steps) - steps).sum(axis=(2, 3)))
    assert alone.max() > 1  # what it is for


def test_whole_numbers_stay_what_they_are() -> None:
    steps = np.arange(-9, 9, dtype=np.float32).reshape(1, 2, 3, 3)
    assert np.array_equal(rounded(steps), steps)


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sum_there_can_be_is_exact_on_this_cpu(side: int, sign: int) -> None:
    """With 127 for 64 it comes out half as large on x86 without VNNI."""
    channels = 32
    image = ops.parameter([1, channels, side, side], np.uint8)
    byte = np.float32(0), np.float32(255)
    x = ops.fake_quantize(ops.convert(image, "f32"), *byte, *byte, 256)
    numbers = np.full((channels, channels, side, side), sign * LARGEST, np.int8)
    weight = ops.multiply(ops.convert(ops.constant(numbers), "f32"), np.float32(1))
    x = ops.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    layer = ov.Core().compile_model(
        ov.Model([x], [image], "layer"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    (result,) = layer([np.full((1, channels, side, side), 255, np.uint8)]).values()
    assert np.array_equal(
        result, np.full(result.shape, sign * 255 * LARGEST * channels * side**2, np.float32)
    )
