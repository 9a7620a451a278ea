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
import itertools
from collections.abc import Collection, Sequence
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from model.arrays import ByteArray, FloatArray, Shape
from model.config import DIVISOR, PreprocessConfig, UNetConfig

LARGE = 2_000_000
"""Pixels above which an image's windows share less than its checkpoint asks for, ..."""
BUDGET = 1.2
"""... if more pixels than that, over those of the image, would go through the network, ..."""
LEAST_OVERLAP = 32
"""... but not less than that, since what a window says of its outermost pixels is not worth much;
..."""
PROMISED = 4_000_000
"""... unless the image is larger than that: then the budget is kept whatever it takes."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """How one side of an image is covered: by windows of a few sizes, evenly spread.

    All in pixels of the output; a window of an unpadded network sees `margin` more on each side.

    Attributes:
        length: of the side.
        sizes: of the windows, from the first to the last.
        overlap: what neighbours share at least.
    """

    length: int
    sizes: tuple[int, ...]
    overlap: int

    @classmethod
    def cover(cls, length: int, sides: Collection[int], overlap: int) -> Axis:
        """The windows with the fewest pixels over `length` that share at least `overlap` of them.

        A run of one of `sides`, then perhaps one of another, then the last: with three sides that
        comes within a few pixels of any length.
        """
        options = []
        for run, last in itertools.product(sides, sides):
            for extra in ((), *((side,) for side in sides)):
                cells = -(-(length - last) // DIVISOR) - sum(
                    _stride(side, overlap) for side in extra
                )
                number = max(0, -(-cells // _stride(run, overlap)))
                ending = (*extra, last)
                options.append((number * run + sum(ending), number + len(ending), run, ending))
        _, count, run, ending = min(options)
        return cls(length, (run,) * (count - len(ending)) + ending, overlap)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each window begins: multiples of 16.

        Where they do not fit evenly, the last window hangs over the edge by less than 16 pixels,
        and sees the image reflected there.
        """
        strides = (_stride(size, self.overlap) for size in self.sizes[:-1])
        farthest = list(itertools.accumulate(strides, initial=0))
        last = max(0, -(-(self.length - self.sizes[-1]) // DIVISOR))
        return tuple(cells * last // max(farthest[-1], 1) * DIVISOR for cells in farthest)

    @cached_property
    def weights(self) -> tuple[FloatArray, ...]:
        """What each window contributes at its pixels; at every pixel of the image they sum to 1."""
        stops = [start + size for start, size in zip(self.starts, self.sizes, strict=True)]
        ramps = [np.ones(size) for size in self.sizes]
        for index, (stop, start) in enumerate(zip(stops, self.starts[1:], strict=False)):
            fade = _fade(stop - start)
            ramps[index + 1][: len(fade)] *= fade[: self.sizes[index + 1]]
            ramps[index][self.sizes[index] - len(fade) :] *= fade[::-1]
        total = np.zeros(max(stops))
        for start, stop, ramp in zip(self.starts, stops, ramps, strict=True):
            total[start:stop] += ramp
        return tuple(
            (ramp / total[start:stop]).astype(np.float32)
            for start, stop, ramp in zip(self.starts, stops, ramps, strict=True)
        )


def _stride(size: int, overlap: int) -> int:
    """How far behind a window of `size` the next may begin, in cells of the pooling grid."""
    return max((size - overlap) // DIVISOR, 1)


def _fade(length: int) -> npt.NDArray[np.float64]:
    """From 0 to 1 over `length` pixels: a raised cosine over the middle half of them.

    The outer quarter is 0, since a window's zero-padded border is felt most there. Measured on the
    shipped model, a fade over the whole length left differences ten times as large at the seams.
    """
    position = (np.arange(length) + 0.5) / max(length, 1)
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(2 * position - 0.5, 0, 1))


@dataclasses.dataclass(frozen=True)
class Window:
    """One window of a plan.

    Attributes:
        row, column: its output begins at (rows.starts[row], columns.starts[column]).
        shape: (height, width) as the network sees it, one of the declared ones.
    """

    row: int
    column: int
    shape: Shape


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """The cover of one image: every window of its rows by every window of its columns.

    Attributes:
        margin: pixels the network loses on each side (`UNetConfig.margin`).
        rows, columns: the cover of the height and of the width.
    """

    margin: int
    rows: Axis
    columns: Axis

    @property
    def count(self) -> int:
        return len(self.rows.sizes) * len(self.columns.sizes)

    @property
    def waste(self) -> float:
        """Pixels through the network over pixels of the image: 1 is none."""
        axes = (self.rows, self.columns)
        height, width = (sum(size + 2 * self.margin for size in axis.sizes) for axis in axes)
        return height * width / (self.rows.length * self.columns.length)

    @cached_property
    def windows(self) -> Sequence[Window]:
        """Row by row, so that the rows of an image can be finished from the top."""
        lost = 2 * self.margin
        return tuple(
            Window(row, column, (height + lost, width + lost))
            for row, height in enumerate(self.rows.sizes)
            for column, width in enumerate(self.columns.sizes)
        )

    def cut(self, image: ByteArray, window: Window, out: ByteArray) -> None:
        """Copy one window of `image` into `out`, reflected where it hangs over the edge.

        Args:
            image: (H, W, C), prepared by `model.transforms.prepare`.
            window: one of `windows`.
            out: (*window.shape, C), overwritten.
        """
        top = self.rows.starts[window.row] - self.margin
        left = self.columns.starts[window.column] - self.margin
        bottom, right = top + window.shape[0], left + window.shape[1]
        grey = image.strides[2] == 0  # one channel that is shown as several
        source = image[:, :, :1] if grey else image
        if top >= 0 and left >= 0 and bottom <= image.shape[0] and right <= image.shape[1]:
            part = source[top:bottom, left:right]
        else:
            rows = _reflect(top, bottom, image.shape[0])
            columns = _reflect(left, right, image.shape[1])
            part = source[rows[:, None], columns]
        if grey:  # channel by channel is four times as fast as pixel by pixel
            for channel in range(out.shape[2]):
                out[:, :, channel] = part[:, :, 0]
        else:
            out[...] = part


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
        channels: C, how many of the windows' probabilities are wanted; the first ones.
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
        height = min(rows.sizes[window.row], rows.length - top)  # less where it hangs over the edge
        width = min(columns.sizes[window.column], columns.length - left)
        part = probabilities[: len(self._sum), :height, :width]
        target = self._sum[:, top : top + height, left : left + width]
        if self.plan.count == 1:
            target[...] = part
            return
        weight = rows.weights[window.row][:height, None] * columns.weights[window.column][:width]
        target += part * weight

    def result(self) -> FloatArray:
        """(C, H, W) probabilities of the image, once every window was added."""
        return self._sum


@lru_cache(maxsize=256)  # a search takes a millisecond, and clients send images of few sizes
def plan_windows(
    height: int, width: int, architecture: UNetConfig, preprocess: PreprocessConfig
) -> WindowPlan:
    """The cover of a height × width image that puts the fewest pixels through the network.

    Neighbours share `preprocess.overlap` pixels at least; those of a large image fewer, if it
    takes that to stay within `BUDGET`.

    Known from an image's header alone. In mode "resize" `height` and `width` are those of
    `preprocess.resized`, since that is what the image becomes.

    Raises:
        ValueError: the image has no pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image needs at least one pixel, not {height} x {width}")
    margin = architecture.margin
    # An unpadded network's windows are right wherever they are defined: no need to blend.
    overlap = preprocess.overlap if margin == 0 else 0
    plan = _fewest(height, width, margin, preprocess.window, overlap)
    least = LEAST_OVERLAP if height * width <= PROMISED else DIVISOR
    while height * width > LARGE and plan.waste > BUDGET and overlap >= least + DIVISOR:
        overlap -= DIVISOR
        plan = _fewest(height, width, margin, preprocess.window, overlap)
    return plan


def _fewest(
    height: int, width: int, margin: int, shapes: Sequence[Shape], overlap: int
) -> WindowPlan:
    """The plan that wastes least, among all sets of heights and widths that go together."""
    plans = []
    for first in {shape[0] for shape in shapes}:
        widths = {shape[1] for shape in shapes if shape[0] == first}
        heights = {shape[0] for shape in shapes if all((shape[0], w) in shapes for w in widths)}
        plans.append(
            WindowPlan(
                margin,
                Axis.cover(height, {side - 2 * margin for side in heights}, overlap),
                Axis.cover(width, {side - 2 * margin for side in widths}, overlap),
            )
        )
    return min(plans, key=lambda plan: (plan.waste, plan.count))
