"""Windows of a few fixed shapes over an image of any size, and seam-free stitching.

An engine should only ever see tensor shapes it was warmed up for, so an image is cut into windows
of one of a few declared shapes. Three things keep the cuts invisible:

- every window starts on a multiple of 16, so all of them share the network's pooling grid and two
  windows compute the same function of the pixels they share;
- beyond the image's edge a window sees the image reflected (paper, section 2: "overlap-tile
  strategy"), not black;
- neighbours overlap, and weights that sum to one at every pixel fade from one into the other,
  starting from nothing where a window's zero-padded border could be felt most.

Arrays are NumPy, rows first. Knows no torch and no network: only shapes and arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from model.config import DIVISOR, PreprocessConfig, Shape, UNetConfig

FloatArray = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Axis:
    """How one side of an image is covered: equal windows, evenly spread.

    All in pixels of the output; a window of an unpadded network sees `margin` more on each side.
    """

    length: int
    size: int
    starts: tuple[int, ...]

    @classmethod
    def cover(cls, length: int, size: int, overlap: int) -> Axis:
        """The fewest windows of `size` over `length` that share at least `overlap` pixels.

        Starts are multiples of 16. Where they do not fit evenly, the last window hangs over the
        edge by less than 16 pixels, and sees the image reflected there.
        """
        if length <= size:
            return cls(length, size, (0,))
        stride = max((size - overlap) // DIVISOR, 1)  # in cells of the pooling grid
        last = -(-(length - size) // DIVISOR)
        gaps = -(-last // stride)
        return cls(length, size, tuple(last * i // gaps * DIVISOR for i in range(gaps + 1)))

    @cached_property
    def weights(self) -> tuple[FloatArray, ...]:
        """What each window contributes at its pixels; at every pixel of the image they sum to 1."""
        raised = [np.zeros(self.starts[-1] + self.size) for _ in self.starts]
        for index, start in enumerate(self.starts):
            ramp = np.ones(self.size)
            if index > 0:
                fade = _fade(self.starts[index - 1] + self.size - start)
                ramp[: len(fade)] *= fade
            if index + 1 < len(self.starts):
                fade = _fade(start + self.size - self.starts[index + 1])
                ramp[self.size - len(fade) :] *= fade[::-1]
            raised[index][start : start + self.size] = ramp
        total = np.sum(raised, axis=0)
        return tuple(
            (weight / total)[start : start + self.size].astype(np.float32)
            for start, weight in zip(self.starts, raised, strict=True)
        )


def _fade(length: int) -> npt.NDArray[np.float64]:
    """From 0 to 1 over `length` pixels: a raised cosine over the middle half of them.

    The outer quarter is 0, since a window's zero-padded border is felt most there. Measured on the
    shipped model, a fade over the whole length left differences ten times as large at the seams.
    """
    position = (np.arange(length) + 0.5) / max(length, 1)
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(2 * position - 0.5, 0, 1))


@dataclasses.dataclass(frozen=True)
class Window:
    """One window of a plan: where its output lies, (rows.starts[row], columns.starts[column])."""

    row: int
    column: int


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """The cover of one image by windows of one shape.

    Attributes:
        shape: (height, width) of a window as the network sees it.
        margin: pixels the network loses on each side (`UNetConfig.margin`).
        rows, columns: the cover of the height and of the width.
    """

    shape: Shape
    margin: int
    rows: Axis
    columns: Axis

    @property
    def count(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def waste(self) -> float:
        """Pixels through the network over pixels of the image: 1 is none."""
        return self.count * self.shape[0] * self.shape[1] / (self.rows.length * self.columns.length)

    @property
    def windows(self) -> Sequence[Window]:
        """Row by row, so that the rows of an image can be finished from the top."""
        return [
            Window(row, column)
            for row in range(len(self.rows.starts))
            for column in range(len(self.columns.starts))
        ]

    def cut(self, image: npt.NDArray[np.uint8], window: Window, out: npt.NDArray[np.uint8]) -> None:
        """Copy one window of `image` into `out`, reflected where it hangs over the edge.

        Args:
            image: (H, W, C), prepared by `model.transforms.prepare`.
            window: one of `windows`.
            out: (shape[0], shape[1], C), overwritten.
        """
        top = self.rows.starts[window.row] - self.margin
        left = self.columns.starts[window.column] - self.margin
        bottom, right = top + self.shape[0], left + self.shape[1]
        if top >= 0 and left >= 0 and bottom <= image.shape[0] and right <= image.shape[1]:
            out[...] = image[top:bottom, left:right]
            return
        columns = _reflect(left, right, image.shape[1])
        # the used rows first: fancy indexing copies, and the image may be far larger than a window
        out[...] = image[_reflect(top, bottom, image.shape[0])[:, None], columns[None, :]]


def _reflect(start: int, stop: int, length: int) -> npt.NDArray[np.intp]:
    """Indices start..stop into an axis of `length`, mirrored at both ends as often as needed.

    The edge pixel is the mirror and is not repeated: -1 -> 1, length -> length - 2.
    """
    if length == 1:
        return np.zeros(stop - start, np.intp)
    period = 2 * (length - 1)
    folded = np.arange(start, stop) % period
    return np.minimum(folded, period - folded)


class Stitcher:
    """Adds windows up to the probabilities of the whole image.

    Args:
        plan: the cover.
        channels: C of the windows' probabilities.
    """

    def __init__(self, plan: WindowPlan, channels: int) -> None:
        self.plan = plan
        self._sum = np.zeros((channels, plan.rows.length, plan.columns.length), np.float32)

    def add(self, window: Window, probabilities: FloatArray) -> None:
        """Blend one window in.

        Args:
            window: one of `plan.windows`, each exactly once.
            probabilities: (C, height, width) of that window's output.
        """
        rows, columns = self.plan.rows, self.plan.columns
        top, left = rows.starts[window.row], columns.starts[window.column]
        height = min(rows.size, rows.length - top)  # less where it hangs over the edge
        width = min(columns.size, columns.length - left)
        part = probabilities[:, :height, :width]
        target = self._sum[:, top : top + height, left : left + width]
        if self.plan.count == 1:
            target[...] = part
            return
        weight = rows.weights[window.row][:height, None] * columns.weights[window.column][:width]
        target += part * weight

    def result(self) -> FloatArray:
        """(C, H, W) probabilities of the image, once every window was added."""
        return self._sum


def plan_windows(
    height: int, width: int, architecture: UNetConfig, preprocess: PreprocessConfig
) -> WindowPlan:
    """The cover of a height × width image that puts the fewest pixels through the network.

    Known from an image's header alone. In mode "resize" `height` and `width` are those of the one
    declared window, since that is what the image becomes.

    Raises:
        ValueError: the image has no pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image needs at least one pixel, not {height} x {width}")
    margin = architecture.margin
    # An unpadded network's windows are right wherever they are defined: no need to blend.
    overlap = preprocess.overlap if margin == 0 else 0
    plans = [
        WindowPlan(
            shape,
            margin,
            Axis.cover(height, shape[0] - 2 * margin, overlap),
            Axis.cover(width, shape[1] - 2 * margin, overlap),
        )
        for shape in preprocess.window
    ]
    return min(plans, key=lambda plan: (plan.waste, plan.count))
