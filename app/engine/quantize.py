"""A network's weights as whole numbers of 8 bits that are exact on every CPU.

Knows tensors and their names; nothing of the library that computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from model.arrays import AnyArray, FloatArray
from model.config import LEVELS

Ranges = Mapping[str, tuple[float, float]]

LARGEST = 64
"""Whole numbers that stand for weights reach to this on both sides of 0, and not to 127.

x86 without VNNI adds two products of a byte and a weight in 16 bits, and cuts off what does not fit
(`vpmaddubsw`): 2 × 255 × 64 does, 2 × 255 × 127 does not. So the same graph gives the same masks
everywhere, and its proof on one machine holds on all."""
SMALLEST = 1e-6
"""Least range of an activation: a layer that gave nothing while it was calibrated has none."""
_BLOCK = 1 << 18
"""Weights that are rounded at once: few enough to stay in the cache, or it takes twice as long."""


def whole(weight: AnyArray, axis: int) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Whole numbers, and the scale of each place of `axis`: weight ≈ whole × scale.

    Args:
        weight: (.., .., height, width) of a convolution or a transposed one.
        axis: the output channels: 0 of a convolution, 1 of a transposed one.
    """
    channels = np.moveaxis(weight, axis, 0)
    # The taps of a transposed convolution never meet in one pixel.
    around = rounded if axis == 0 else np.rint
    numbers, scales = [], []
    for block in np.array_split(channels, min(len(channels), weight.size // _BLOCK + 1)):
        exact = block.astype(np.float32)
        scale = np.maximum(np.abs(exact).max(axis=(1, 2, 3), keepdims=True) / LARGEST, 1e-12)
        numbers.append(around(exact / scale).astype(np.int8))
        scales.append(scale)
    whole, scale = (np.moveaxis(np.concatenate(each), 0, axis) for each in (numbers, scales))
    return np.ascontiguousarray(whole), np.ascontiguousarray(scale)


def rounded(kernels: FloatArray) -> FloatArray:
    """(.., height, width) to whole numbers whose sum over each kernel is right to half a step.

    Neighbouring pixels are much alike, so what a kernel makes of them depends on its sum first.
    Rounding each tap for itself leaves that wrong by the square root of their number; here the taps
    that were nearest to the other side go there until it fits (Guo et al. 2022, SQuant: the step
    for each kernel).
    """
    taps = kernels.reshape(-1, kernels.shape[-2] * kernels.shape[-1])
    result = np.rint(taps)
    error = result - taps
    excess = np.rint(error @ np.ones(taps.shape[1], np.float32))  # `sum` is slow over so few
    while (rows := np.flatnonzero(excess)).size:
        step = np.sign(excess[rows])
        furthest = (error[rows] * step[:, None]).argmax(axis=1)
        for array in (result, error):
            array[rows, furthest] -= step
        excess[rows] -= step
    return result.reshape(kernels.shape)


def equalised(state: Mapping[str, AnyArray], ranges: Ranges) -> dict[str, AnyArray]:
    """The same network, with every up-sampled branch as large as the skip it is joined with.

    The up-convolution is linear: its weights and bias times f, and over f the weights of the next
    convolution that read it, give the same function.

    Args:
        state: left as it is, in whatever type; what changes comes back in fp32.
        ranges: of what the layers give (`model.config.Calibration`).
    """
    result = dict(state)
    for level in range(LEVELS):
        up, joined = f"up_sample.{level}.up", f"up_conv.{level}.first.weight"
        low, high = ranges[up]
        skip = ranges[f"down_conv.{LEVELS - 1 - level}.second"][1]
        factor = np.float32(max(skip, SMALLEST) / max(-low, high, SMALLEST))
        for name in (f"{up}.weight", f"{up}.bias"):
            result[name] = state[name].astype(np.float32) * factor
        channels = state[f"{up}.bias"].size
        result[joined] = state[joined].astype(np.float32)
        result[joined][:, :channels] /= factor  # the up-sampled tensor comes first
    return result
