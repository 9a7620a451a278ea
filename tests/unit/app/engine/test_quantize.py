"""Quantized weights: exact on every CPU, and close to the weights they replace."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from app.engine.openvino_core import shared_core
from app.engine.quantize import MAX_WEIGHT, quantize_weights, round_kernels


def random_kernels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)


@pytest.mark.parametrize(("axis", "shape"), [(0, (16, 8, 3, 3)), (1, (8, 16, 2, 2))])
def test_each_output_channel_has_its_own_scale(axis: int, shape: tuple[int, ...]) -> None:
    weight = random_kernels(*shape)
    weight[:, 3] *= 40
    weight[5] *= 40
    quantized, scale = quantize_weights(weight, axis)
    others = tuple(each for each in range(4) if each != axis)
    assert scale.shape == tuple(16 if each == axis else 1 for each in range(4))
    assert (np.abs(quantized).max(axis=others) == MAX_WEIGHT).all()
    assert (np.abs(quantized * scale - weight) <= scale * 1.0001).all()


def test_an_output_channel_of_zeros_has_a_finite_scale() -> None:
    weight = random_kernels(4, 2, 3, 3)
    weight[1] = 0
    quantized, scale = quantize_weights(weight, 0)
    assert not quantized[1].any()
    assert np.isfinite(scale).all()


def test_sums_of_rounded_kernels_are_off_by_half_at_most() -> None:
    exact = np.random.default_rng(1).uniform(-MAX_WEIGHT, MAX_WEIGHT, (300, 20, 3, 3))
    exact = exact.astype(np.float32)
    result = round_kernels(exact)
    assert np.array_equal(result, np.rint(result))
    assert np.abs(result - exact).max() < 1
    assert np.abs(result).max() <= MAX_WEIGHT
    assert np.abs((result - exact).sum(axis=(2, 3))).max() <= 0.5 + 1e-4
    assert np.abs((np.rint(exact) - exact).sum(axis=(2, 3))).max() > 1  # rounding each tap alone


def test_integers_are_not_rounded() -> None:
    exact = np.arange(-9, 9, dtype=np.float32).reshape(1, 2, 3, 3)
    assert np.array_equal(round_kernels(exact), exact)


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_possible_sum_is_exact_on_this_cpu(side: int, sign: int) -> None:
    """With weights of 127 it comes out half as large on x86 without VNNI."""
    channels = 32
    image = ops.parameter([1, channels, side, side], np.uint8)
    byte = np.float32(0), np.float32(255)
    x = ops.fake_quantize(ops.convert(image, "f32"), *byte, *byte, 256)
    weights = np.full((channels, channels, side, side), sign * MAX_WEIGHT, np.int8)
    weight = ops.multiply(ops.convert(ops.constant(weights), "f32"), np.float32(1))
    x = ops.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    layer = shared_core().compile_model(
        ov.Model([x], [image], "layer"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    (result,) = layer([np.full((1, channels, side, side), 255, np.uint8)]).values()
    expected = sign * 255 * MAX_WEIGHT * channels * side**2
    assert np.array_equal(result, np.full(result.shape, expected, np.float32))
