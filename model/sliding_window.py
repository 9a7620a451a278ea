"""Segment an image window by window: for evaluation and calibration, not for serving.

Knows no torch and no engine; the caller computes the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from model.arrays import AnyArray, ByteArray, FloatArray, Probabilities
from model.config import Architecture, PreprocessConfig
from model.transforms import prepare, resize_to_image
from model.windows import Stitcher, Window, WindowPlan, plan_windows


def sliding_window_inference(
    image: AnyArray,
    architecture: Architecture,
    preprocess: PreprocessConfig,
    compute: Callable[[ByteArray], Probabilities],
) -> FloatArray:
    """Compute the probabilities of an image, (C, H, W) float32.

    Args:
        image: decoded, (H, W) or (H, W, 3), uint8 or uint16.
        compute: one window, (1, h, w, C) uint8 -> its probabilities, (1, C, h', w').

    Raises:
        ValueError: `image` has another type or shape.
    """
    pixels = prepare(image, preprocess)
    plan = plan_windows(pixels.shape[0], pixels.shape[1], architecture, preprocess)
    stitcher = Stitcher(plan, architecture.out_channels)
    for window, cut in _cut_windows(pixels, plan):
        stitcher.add(window, compute(cut)[0])
    return resize_to_image(stitcher.result(), image.shape[0], image.shape[1])


def cut_image(
    image: AnyArray, architecture: Architecture, preprocess: PreprocessConfig
) -> Iterator[ByteArray]:
    """Yield the windows of an image, (1, h, w, C) uint8 each.

    Args:
        image: as for `sliding_window_inference`.

    Raises:
        ValueError: `image` has another type or shape.
    """
    pixels = prepare(image, preprocess)
    plan = plan_windows(pixels.shape[0], pixels.shape[1], architecture, preprocess)
    return (cut for _, cut in _cut_windows(pixels, plan))


def _cut_windows(pixels: ByteArray, plan: WindowPlan) -> Iterator[tuple[Window, ByteArray]]:
    for window in plan.windows:
        cut = np.empty((1, *window.shape, pixels.shape[2]), np.uint8)
        plan.cut(pixels, window, out=cut[0])
        yield window, cut
