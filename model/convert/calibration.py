"""Measure the ranges of activations, from which an int8 engine is built.

The fp32 reference runs on images, and the output of every convolution is observed. Knows no engine:
`app.engine.openvino` uses the ranges, and `app.engine.calibrate` measures what int8 costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor, nn

from model.arrays import AnyArray
from model.predict import Predictor

TAIL = 1e-4
"""Fraction of a layer's values at each end that lie outside its range and are clipped. A range up
to the largest value would spend most of the 256 levels on values that hardly ever occur."""

QUANTIZED = (".first", ".second", ".up")
"""Ends of the names of the layers that compute in int8."""


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]
"""A forward hook of torch: module, inputs, output."""


def observe_layers(
    predictor: Predictor, images: Iterable[AnyArray], make_hook: Callable[[str], Hook]
) -> None:
    """Run the reference on images, with a hook on each layer that computes in int8.

    Args:
        make_hook: makes the hook of the layer with a name.
    """
    hooks = [
        layer.register_forward_hook(make_hook(name))
        for name, layer in predictor.network.named_modules()
        if name.endswith(QUANTIZED)
    ]
    try:
        for image in images:
            predictor(image)
    finally:
        for hook in hooks:
            hook.remove()


def measure_ranges(
    predictor: Predictor, images: Iterable[AnyArray]
) -> dict[str, tuple[float, float]]:
    """Measure the range of each convolution's output, after its ReLU if it has one.

    The range of each window leaves out the outermost `TAIL` of the values. The result is the widest
    range over the windows of all images.

    Args:
        predictor: of the checkpoint, in fp32.
        images: decoded, (H, W) or (H, W, 3), uint8 or uint16; forty are enough.

    Returns:
        Layer -> (low, high), rounded to four significant digits.

    Raises:
        ValueError: there are no images.
    """
    ranges: dict[str, tuple[float, float]] = {}
    observe_layers(predictor, images, lambda name: _make_range_hook(name, ranges))
    if not ranges:
        raise ValueError("calibration needs at least one image")
    # Fewer digits keep the checkpoint's header small; the precision of a range hardly matters.
    return {name: (_round_digits(low), _round_digits(high)) for name, (low, high) in ranges.items()}


def _make_range_hook(name: str, ranges: dict[str, tuple[float, float]]) -> Hook:
    """Create a forward hook that widens `ranges[name]` to a layer's output."""

    def widen_range(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        values = output.flatten() if name.endswith(".up") else output.flatten().relu()
        count = max(1, int(TAIL * values.numel()))
        high = values.topk(count).values[-1].item()
        low = -(-values).topk(count).values[-1].item()
        before = ranges.get(name, (low, high))
        ranges[name] = (min(low, before[0]), max(high, before[1]))

    return widen_range


def _round_digits(value: float) -> float:
    """Round to four significant digits."""
    return float(np.format_float_positional(value, precision=4, unique=False, fractional=False))
