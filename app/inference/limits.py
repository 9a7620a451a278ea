"""How much time and memory the calls of image workers may take."""

from __future__ import annotations

from app.batching.deadline import Deadline
from app.imaging.workers.worker import CallLimit

DECODING_SECONDS, RENDERING_SECONDS = 5.0, 10.0
"""Limits for a small image, on a machine whose processors are all busy."""


def decoding_limit(pixels: int, deadline: Deadline) -> CallLimit:
    """The limits of decoding and preparing an image of so many pixels.

    Measured: up to 0.04 s per megapixel, and 22 bytes per pixel.
    """
    seconds = DECODING_SECONDS + 0.25e-6 * pixels
    return CallLimit("decoding", seconds, 300_000_000 + 48 * pixels, deadline.at)


def rendering_limit(pixels: int, deadline: Deadline) -> CallLimit:
    """The limits of deciding on the mask and rendering the outputs.

    Measured with 2,500 objects per megapixel: see docs/decisions/0030-outputs-of-objects.md.
    """
    seconds = RENDERING_SECONDS + 4e-6 * pixels
    return CallLimit("rendering", seconds, 300_000_000 + 72 * pixels, deadline.at)
