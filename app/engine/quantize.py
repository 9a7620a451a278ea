"""Quantize the weights of a network to 8-bit integers that every CPU multiplies exactly.

Knows tensors and their names; not the library that computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from model.arrays import AnyArray, FloatArray
from model.config import LEVELS

Ranges = Mapping[str, tuple[float, float]]
"""Layer -> the least and the greatest activation (`model.config.Calibration`)."""

MAX_WEIGHT = 64
"""Quantized weights lie in -64..64, not in -127..127.

x86 without VNNI adds two products of a byte and a weight in 16 bits and saturates the sum
(`vpmaddubsw`): 2 × 255 × 64 fits, 2 × 255 × 127 does not. So the same graph gives the same masks on
every CPU, and a validation on one machine holds for all
(docs/decisions/0017-int8-weights-up-to-64.md)."""
MIN_RANGE = 1e-6
"""Least range of an activation; a layer whose output was always 0 during calibration has none."""
_BLOCK_VALUES = 1 << 18
"""Weights that are rounded at once: they fit the cache. Larger blocks take twice as long."""


def quantize_weights(weight: AnyArray, axis: int) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Quantize symmetrically, with one scale per output channel: weight ≈ quantized × scale.

    Args:
        weight: (.., .., height, width), of a convolution or a transposed convolution.
        axis: the output channels: 0 of a convolution, 1 of a transposed convolution.

    Returns:
        The quantized weights, of the same shape, and their scales, of length 1 along every other
        axis.
    """
    channels = np.moveaxis(weight, axis, 0)
    # The taps of a transposed convolution never add up in one pixel.
    round_block = round_kernels if axis == 0 else np.rint
    blocks, scales = [], []
    for block in np.array_split(channels, min(len(channels), weight.size // _BLOCK_VALUES + 1)):
        exact = block.astype(np.float32)
        scale = np.maximum(np.abs(exact).max(axis=(1, 2, 3), keepdims=True) / MAX_WEIGHT, 1e-12)
        blocks.append(round_block(exact / scale).astype(np.int8))
        scales.append(scale)
    quantized, scale = (np.moveaxis(np.concatenate(each), 0, axis) for each in (blocks, scales))
    return np.ascontiguousarray(quantized), np.ascontiguousarray(scale)


def round_kernels(kernels: FloatArray) -> FloatArray:
    """Round kernels (.., height, width) to integers so that each sum is off by at most 1/2.

    Neighbouring pixels are similar, so the output of a kernel depends mostly on its sum. Rounding
    each tap alone leaves an error in the sum that grows with the square root of their number. Here
    the taps that were closest to the next integer are moved there until the sum fits (Guo et al.
    2022, SQuant: the step per kernel).
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


def equalize_branches(state: Mapping[str, AnyArray], ranges: Ranges) -> dict[str, AnyArray]:
    """Scale every up-sampled branch to the range of the skip that it is concatenated with.

    The up-convolution is linear. Multiplying its weights and bias by f, and dividing the weights of
    the next convolution that read it by f, leaves the function unchanged.

    Args:
        state: tensors by state-dict name, in any float type; not modified.
        ranges: activations of every layer.

    Returns:
        The state dict of the same network; changed tensors are float32.
    """
    result = dict(state)
    for level in range(LEVELS):
        up, joined = f"up_sample.{level}.up", f"up_conv.{level}.first.weight"
        low, high = ranges[up]
        skip = ranges[f"down_conv.{LEVELS - 1 - level}.second"][1]
        factor = np.float32(max(skip, MIN_RANGE) / max(-low, high, MIN_RANGE))
        for name in (f"{up}.weight", f"{up}.bias"):
            result[name] = state[name].astype(np.float32) * factor
        channels = state[f"{up}.bias"].size
        result[joined] = state[joined].astype(np.float32)
        result[joined][:, :channels] /= factor  # the up-sampled tensor comes first
    return result
