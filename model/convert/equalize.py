"""Scale channels so that they use the range of their layer, which makes int8 more exact.

In int8 all channels of an activation share one scale, and so do all weights of an output channel. A
channel with small values and large weights in the next layer makes both coarse. The network is
linear from a channel to the layers that read it, apart from a ReLU and maximums, which commute with
a positive factor. So a channel is multiplied by a factor where it is computed, and the weights that
read it are divided by it (Nagel et al. 2019, "Data-Free Quantization", section 4.1, with measured
ranges). Factors are powers of two, which change no bit of a product. Only weights that become
smaller than 6e-5 lose bits in fp16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from model.arrays import AnyArray, FloatArray
from model.config import LEVELS
from model.convert.calibration import TAIL, Hook, observe_layers
from model.predict import Predictor

MAX_FACTOR = 16
"""More could clip a channel that is quiet in these images and not in others."""
_MIN_RANGE = 1e-6
"""Range of a layer whose values are all zero, so that nothing is divided by zero."""


def measure_channels(predictor: Predictor, images: Iterable[AnyArray]) -> dict[str, FloatArray]:
    """Measure how large the values of each channel become, after the ReLU if there is one.

    Args:
        predictor: of the checkpoint, in fp32.
        images: decoded, (H, W) or (H, W, 3), uint8 or uint16; ten are enough.

    Returns:
        Layer -> (channels,): the absolute value that a fraction `TAIL` of the channel's pixels
        exceed, in the window where it is largest.
    """
    highs: dict[str, Tensor] = {}
    observe_layers(predictor, images, lambda name: _make_channel_hook(name, highs))
    return {name: high.numpy() for name, high in highs.items()}


def _make_channel_hook(name: str, highs: dict[str, Tensor]) -> Hook:
    """Create a forward hook that raises `highs[name]` to a layer's output."""

    def raise_highs(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        values = (output if name.endswith(".up") else output.relu()).abs()
        channels = values.transpose(0, 1).flatten(1)
        count = max(1, int(TAIL * channels.shape[1]))
        high = channels.topk(count, dim=1).values[:, -1]
        highs[name] = torch.maximum(highs[name], high) if name in highs else high

    return raise_highs


def equalize_channels(
    state: Mapping[str, AnyArray], highs: Mapping[str, FloatArray]
) -> dict[str, AnyArray]:
    """Multiply each channel by the largest power of two that leaves its layer's range as it is.

    Args:
        state: tensors by state-dict name; not modified.
        highs: of `measure_channels`.

    Returns:
        The state dict of a network that computes the same; types are unchanged.
    """
    result = {name: value.copy() for name, value in state.items()}
    for layer, readers in _list_readers():
        high = highs[layer]
        least = max(high.max(), _MIN_RANGE) / MAX_FACTOR
        factors = 2 ** np.floor(np.log2(MAX_FACTOR * least / np.maximum(high, least)))
        _scale(result, f"{layer}.weight", 1 if layer.endswith(".up") else 0, factors)
        _scale(result, f"{layer}.bias", 0, factors)
        for reader, is_skip in readers:
            start = len(factors) if is_skip else 0  # the up-sampled tensor comes first
            inputs = 0 if reader.endswith(".up") else 1
            _scale(result, f"{reader}.weight", inputs, 1 / factors, start)
    return result


def _list_readers() -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Yield each layer and the layers that read its output, and whether as a skip connection."""
    for level in range(LEVELS):
        block = f"down_conv.{level}"
        deeper = f"down_conv.{level + 1}" if level < LEVELS - 1 else "middle_conv"
        yield f"{block}.first", [(f"{block}.second", False)]
        skip = f"up_conv.{LEVELS - 1 - level}.first"
        yield f"{block}.second", [(f"{deeper}.first", False), (skip, True)]
    yield "middle_conv.first", [("middle_conv.second", False)]
    yield "middle_conv.second", [("up_sample.0.up", False)]
    for level in range(LEVELS):
        block = f"up_conv.{level}"
        after = f"up_sample.{level + 1}.up" if level < LEVELS - 1 else "final_conv"
        yield f"up_sample.{level}.up", [(f"{block}.first", False)]
        yield f"{block}.first", [(f"{block}.second", False)]
        yield f"{block}.second", [(after, False)]


def _scale(
    state: dict[str, AnyArray], name: str, axis: int, factors: FloatArray, start: int = 0
) -> None:
    """Multiply a tensor in place, along an axis from `start`."""
    tensor = np.moveaxis(state[name], axis, -1)[..., start : start + len(factors)]
    tensor *= factors.astype(tensor.dtype)
