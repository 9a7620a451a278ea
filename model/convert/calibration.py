"""What int8 needs to know of a network: the ranges of its activations on images like its own.

The reference runs in fp32 and every convolution's output is looked at. Knows no engine: what is
done with the ranges is the engine's affair (`app.engine.openvino`), and `unet export --calibrate`
(`app.cli.export`) measures what it costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from model.arrays import AnyArray
from model.predict import Predictor

TAIL = 1e-4
"""Share of a layer's values beyond its range, which are clipped: the 99.99th percentile. A range
as wide as the single largest value would spend the 256 levels on what hardly ever occurs."""

_QUANTISED = (".first", ".second", ".up")


def activation_ranges(
    predictor: Predictor, images: Iterable[AnyArray]
) -> dict[str, tuple[float, float]]:
    """Convolution -> (low, high) of its output, behind the ReLU where there is one.

    The widest over the images, each without its own outermost `TAIL`.

    Args:
        predictor: of the checkpoint.
        images: decoded, (H, W) or (H, W, 3); forty of them are enough.

    Raises:
        ValueError: no images.
    """
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def look(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            values = output.flatten() if name.endswith(".up") else output.flatten().relu()
            count = max(1, int(TAIL * values.numel()))
            high = values.topk(count).values[-1].item()
            low = -(-values).topk(count).values[-1].item()
            before = ranges.get(name, (low, high))
            ranges[name] = (min(low, before[0]), max(high, before[1]))

        return layer.register_forward_hook(look)

    hooks = [
        watch(name, layer)
        for name, layer in predictor.network.named_modules()
        if name.endswith(_QUANTISED)
    ]
    try:
        for image in images:
            predictor(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not ranges:
        raise ValueError("no images to calibrate on")
    # Rounded, so that the table stays a few hundred bytes; a range may be a little off.
    return {name: (_round(low), _round(high)) for name, (low, high) in ranges.items()}


def _round(value: float) -> float:
    return float(np.format_float_positional(value, precision=4, unique=False, fractional=False))
