"""Measure the cost of an image outside the engine, stage by stage."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from app.cli.bench.timing import measure_seconds
from app.imaging import png
from app.imaging.decode import decode as decode_image
from app.imaging.decode import inspect
from model.arrays import AnyArray, ByteArray, FloatArray, Shape
from model.checkpoint import Checkpoint
from model.transforms import mask_and_confidence, prepare
from model.windows import Stitcher, Window, plan_windows

PHOTO_SHAPE = (1280, 1918)
"""(height, width) of the Carvana images, by which segmentation services are often compared."""


def draw_image(height: int, width: int) -> ByteArray:
    """Draw (H, W) bright ellipses on a dark, noisy background, like fluorescent nuclei."""
    rng = np.random.default_rng(0)
    field = np.full((height, width), 12.0)
    radius = 13
    for _ in range(height * width // 3000):
        top, left = rng.integers(0, height), rng.integers(0, width)
        y, x = np.ogrid[: min(2 * radius, height - top), : min(2 * radius, width - left)]
        a, b = rng.uniform(6, radius, 2)
        inside = ((y - radius) / a) ** 2 + ((x - radius) / b) ** 2 < 1
        patch = field[top : top + inside.shape[0], left : left + inside.shape[1]]
        patch[inside] = rng.uniform(70, 180)
    return rng.poisson(field).clip(0, 255).astype(np.uint8)


def encode_jpeg(image: ByteArray) -> bytes:
    """Encode (H, W) as an RGB JPEG, as photographs are."""
    buffer = io.BytesIO()
    Image.fromarray(image).convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def choose_window(checkpoint: Checkpoint, side: int = 512) -> tuple[Shape, Shape]:
    """Choose the window closest to side × side, and an image that becomes exactly one of it.

    Returns:
        (height, width) of the window and of the image.
    """
    preprocess = checkpoint.preprocess
    window = min(preprocess.window, key=lambda shape: abs(shape[0] * shape[1] - side**2))
    if preprocess.mode == "resize":
        return window, PHOTO_SHAPE
    margin = checkpoint.architecture.margin
    return window, (window[0] - 2 * margin, window[1] - 2 * margin)


def _fake_output(window: Window, margin: int, channels: int) -> FloatArray:
    """Probabilities (channels, h, w) that a network could return for a window."""
    height, width = (side - 2 * margin for side in window.shape)
    return (draw_image(height, width) / 255).astype(np.float32)[None].repeat(channels, axis=0)


def measure_stage_seconds(
    checkpoint: Checkpoint, seconds: float, height: int, width: int
) -> dict[str, float]:
    """Measure the CPU seconds of each stage for a JPEG of height × width.

    The stages: `decode` from bytes to pixels, `prepare` to the pixels that windows are cut from,
    `cut` into windows, `stitch` from the windows' probabilities to a mask, `encode` to a PNG.

    Args:
        seconds: to measure each stage for.
    """
    preprocess = checkpoint.preprocess
    channels = 1 if preprocess.binary else checkpoint.architecture.out_channels
    data = encode_jpeg(draw_image(height, width))
    enough = preprocess.resized if preprocess.mode == "resize" else None

    def decode() -> AnyArray:
        header = inspect(data, max_pixels=height * width)
        return decode_image(data, header, at_least=enough)

    decoded = decode()
    pixels = prepare(decoded, preprocess)
    plan = plan_windows(pixels.shape[0], pixels.shape[1], checkpoint.architecture, preprocess)
    windows = plan.windows
    buffers = [np.empty((*window.shape, pixels.shape[2]), np.uint8) for window in windows]
    outputs = [_fake_output(window, plan.margin, channels) for window in windows]

    def cut() -> None:
        for window, buffer in zip(windows, buffers, strict=True):
            plan.cut(pixels, window, out=buffer)

    def stitch() -> ByteArray:
        stitcher = Stitcher(plan, channels)
        for window, probabilities in zip(windows, outputs, strict=True):
            stitcher.add(window, probabilities)
        return mask_and_confidence(stitcher.result(), height, width, preprocess)[0]

    mask = stitch()

    def encode() -> bytes:
        if preprocess.binary:
            return png.encode_mask(mask)
        return png.encode_labels(mask, preprocess.palette)

    stages: dict[str, Callable[[], object]] = {
        "decode": decode,
        "prepare": lambda: prepare(decoded, preprocess),
        "cut": cut,
        "stitch": stitch,
        "encode": encode,
    }
    return {
        name: measure_seconds(call, seconds, time.process_time) for name, call in stages.items()
    }
