"""Tile an image of any size with windows of a few fixed shapes, and blend the results.

An engine only runs tensor shapes that it was warmed up for, so an image is cut into windows of the
shapes that its checkpoint declares. Three rules keep the seams invisible:

- Every window starts on a multiple of 16 (`grid`). All share the network's pooling grid, so two
  windows compute the same function of the pixels they share.
- Outside the image a window sees the image reflected (paper, section 2: "overlap-tile strategy").
- Neighbours overlap. Blending weights sum to one at every pixel, and are zero at a window's edge,
  where its zero padding distorts the result most.

Arrays are NumPy, rows first. Knows shapes and arithmetic; no torch and no network.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from functools import cached_property, lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt

from model.arrays import ByteArray, FloatArray, Probabilities, Shape
from model.config import DIVISOR, Architecture, PreprocessConfig

MAX_OVERHEAD = 1.2
"""Most pixels computed per pixel of a large image."""
SHRINK_OVERLAP_ABOVE = 2_000_000
"""Pixels. The windows of a larger image overlap less than its checkpoint asks for, where that is
needed to stay within `MAX_OVERHEAD`."""
MIN_OVERLAP = 32
"""Pixels. The overlap is not shrunk below this: a window's outermost pixels are unreliable."""
ENFORCE_OVERHEAD_ABOVE = 4_000_000
"""Pixels. For a larger image `MAX_OVERHEAD` has priority over `MIN_OVERLAP`."""

_LARGEST = np.float32(65535)
"""Probability 1 as an integer."""


@dataclasses.dataclass(frozen=True)
class AxisTiling:
    """The windows along one axis of an image, evenly spread.

    Lengths are pixels of the output. The input window of an unpadded network is larger by `margin`
    on each side.

    A long axis has many windows, so they are counted before their list is built.

    Attributes:
        length: of the axis.
        side: of most windows.
        run: how many of them come first.
        ending: sides of the last windows.
        overlap: least number of pixels that neighbours share.
        grid: windows start on its multiples.
    """

    length: int
    side: int
    run: int
    ending: tuple[int, ...]
    overlap: int
    grid: int = DIVISOR

    @classmethod
    def plan(
        cls, length: int, sides: Collection[int], overlap: int, grid: int = DIVISOR
    ) -> AxisTiling:
        """Choose the windows that cover `length` with the fewest pixels.

        Candidates are a run of equal sides, at most one other side, and a last one. With three
        sides to choose from, one of them comes within a few pixels of any length.
        """
        options = []
        for side, last in itertools.product(sides, sides):
            for extra in ((), *((other,) for other in sides)):
                cells = -(-(length - last) // grid) - sum(
                    _stride(other, overlap, grid) for other in extra
                )
                run = max(0, -(-cells // _stride(side, overlap, grid)))
                ending = (*extra, last)
                options.append((run * side + sum(ending), run + len(ending), side, ending))
        _, count, side, ending = min(options)
        return cls(length, side, count - len(ending), ending, overlap, grid)

    @property
    def count(self) -> int:
        """Number of windows."""
        return self.run + len(self.ending)

    @property
    def covered(self) -> int:
        """Sum of the sizes of the windows."""
        return self.run * self.side + sum(self.ending)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the windows, from the first to the last."""
        return (self.side,) * self.run + self.ending

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First pixel of each window, a multiple of `grid`.

        The last window may extend past the image by less than `grid`, where it sees a reflection.
        """
        strides = (_stride(size, self.overlap, self.grid) for size in self.sizes[:-1])
        farthest = list(itertools.accumulate(strides, initial=0))
        last = max(0, -(-(self.length - self.sizes[-1]) // self.grid))
        return tuple(cells * last // max(farthest[-1], 1) * self.grid for cells in farthest)

    @cached_property
    def weights(self) -> tuple[FloatArray, ...]:
        """Blending weights of each window, (size,); they sum to 1 at every pixel of the image."""
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


def _stride(size: int, overlap: int, grid: int) -> int:
    """Distance between the starts of a window of `size` and the next one, in units of `grid`."""
    return max((size - overlap) // grid, 1)


def _fade(length: int) -> npt.NDArray[np.float64]:
    """Weights that rise from 0 to 1 over `length` pixels: a raised cosine over the middle half.

    The outer quarter is 0, since zero padding distorts a window most at its edge. Measured on the
    nuclei model: a cosine over the whole length leaves ten times larger differences at the seams.
    """
    position = (np.arange(length) + 0.5) / max(length, 1)
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(2 * position - 0.5, 0, 1))


@dataclasses.dataclass(frozen=True)
class Window:
    """One window of a plan.

    Attributes:
        row, column: its output starts at (rows.starts[row], columns.starts[column]).
        shape: (height, width) of the network's input, one of the declared shapes.
    """

    row: int
    column: int
    shape: Shape


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """The windows of one image: a grid of the tiling of its rows and that of its columns.

    Attributes:
        margin: pixels that the network cuts off each side (`Architecture.margin`).
        rows, columns: tilings of the height and the width.
    """

    margin: int
    rows: AxisTiling
    columns: AxisTiling

    @property
    def count(self) -> int:
        """Number of windows."""
        return self.rows.count * self.columns.count

    @property
    def overhead(self) -> float:
        """Pixels computed by the network per pixel of the image, at least 1."""
        axes = (self.rows, self.columns)
        height, width = (axis.covered + 2 * self.margin * axis.count for axis in axes)
        return height * width / (self.rows.length * self.columns.length)

    @cached_property
    def windows(self) -> Sequence[Window]:
        """All windows, row by row, so that an image is completed from the top."""
        lost = 2 * self.margin
        return tuple(
            Window(row, column, (height + lost, width + lost))
            for row, height in enumerate(self.rows.sizes)
            for column, width in enumerate(self.columns.sizes)
        )

    def cut(self, image: ByteArray, window: Window, out: ByteArray) -> None:
        """Copy one window of `image` into `out`, reflected outside the image.

        Args:
            image: (H, W, C), prepared by `model.transforms.prepare`. A single channel is repeated.
            window: one of `windows`.
            out: (*window.shape, C), overwritten.
        """
        top = self.rows.starts[window.row] - self.margin
        left = self.columns.starts[window.column] - self.margin
        rows = _spans(top, top + window.shape[0], image.shape[0])
        columns = _spans(left, left + window.shape[1], image.shape[1])
        grey = image.shape[2] == 1 or image.strides[2] == 0  # one channel, or one for all
        source = image[:, :, :1] if grey else image
        for (target_rows, source_rows), (target_columns, source_columns) in itertools.product(
            rows, columns
        ):
            if not isinstance(source_rows, slice) and not isinstance(source_columns, slice):
                source_rows = source_rows[:, None]
            part = source[source_rows, source_columns]
            target = out[target_rows, target_columns]
            if grey:  # copying channel by channel is four times as fast
                for channel in range(out.shape[2]):
                    target[:, :, channel] = part[:, :, 0]
            else:
                target[...] = part


def _spans(start: int, stop: int, length: int) -> list[tuple[slice, slice | npt.NDArray[np.intp]]]:
    """Split start..stop of an axis of `length` into parts: before it, inside it, and after it.

    Returns:
        For each part that is not empty, where it is in the window, and where its pixels are: a
        slice inside the axis, which is copied ten times as fast as the reflected indices outside.
    """
    first, last = min(max(start, 0), stop), max(min(stop, length), start)
    spans: list[tuple[slice, slice | npt.NDArray[np.intp]]] = [
        (slice(first - start, last - start), slice(first, last))
    ]
    if start < first:
        spans.append((slice(0, first - start), _reflect(start, first, length)))
    if last < stop:
        spans.append((slice(last - start, stop - start), _reflect(last, stop, length)))
    return spans


def _reflect(start: int, stop: int, length: int) -> npt.NDArray[np.intp]:
    """Map start..stop to indices of an axis of `length`, reflected at both ends.

    The edge pixel is not repeated: -1 -> 1, length -> length - 2.
    """
    if length == 1:
        return np.zeros(stop - start, np.intp)
    period = 2 * (length - 1)
    folded = np.arange(start, stop) % period
    return np.minimum(folded, period - folded)


def to_floats(probabilities: Probabilities) -> FloatArray:
    """Convert what an engine returned to float32 in 0..1; see `Probabilities`."""
    if probabilities.dtype == np.uint16:
        return np.divide(probabilities, _LARGEST, dtype=np.float32)
    return cast("FloatArray", probabilities)


class Stitcher:
    """Blends the probabilities of windows into those of the whole image.

    Args:
        plan: the windows.
        channels: number of channels to keep, the first ones.
        out: memory for the result, (channels, H, W), all zeros; None allocates it.
    """

    def __init__(self, plan: WindowPlan, channels: int, out: FloatArray | None = None) -> None:
        self.plan = plan
        if out is None:
            out = np.zeros((channels, plan.rows.length, plan.columns.length), np.float32)
        self._sum = out

    def add(self, window: Window, probabilities: Probabilities) -> None:
        """Add the result of one window.

        Args:
            window: one of `plan.windows`; each is added exactly once.
            probabilities: (C, height, width), the engine's output for it.
        """
        rows, columns = self.plan.rows, self.plan.columns
        top, left = rows.starts[window.row], columns.starts[window.column]
        height = min(rows.sizes[window.row], rows.length - top)  # cut off outside the image
        width = min(columns.sizes[window.column], columns.length - left)
        part = probabilities[: len(self._sum), :height, :width]
        target = self._sum[:, top : top + height, left : left + width]
        is_integer = part.dtype == np.uint16  # see `Probabilities`
        if self.plan.count == 1:
            if is_integer:
                np.divide(part, _LARGEST, out=target)
            else:
                target[...] = part
            return
        weight = rows.weights[window.row][:height, None] * columns.weights[window.column][:width]
        if is_integer:
            weight /= _LARGEST
        target += part * weight

    def result(self) -> FloatArray:
        """Probabilities of the image, (C, H, W), after every window was added."""
        return self._sum


@lru_cache(maxsize=256)  # planning takes a millisecond, and clients send few sizes
def plan_windows(
    height: int, width: int, architecture: Architecture, preprocess: PreprocessConfig
) -> WindowPlan:
    """Plan the windows of a height × width image so that the network computes the fewest pixels.

    Neighbours share at least `preprocess.overlap` pixels. In a large image they share fewer where
    that is needed to stay within `MAX_OVERHEAD`.

    Args:
        height, width: of the image; in mode "resize", of `preprocess.resized`.

    Raises:
        ValueError: the image has no pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image needs at least one pixel, not {height} x {width}")
    # Every output pixel of an unpadded network is exact, so its windows need no blending.
    overlap = preprocess.overlap if architecture.margin == 0 else 0
    plan = _cheapest_plan(height, width, architecture, preprocess.window, overlap)
    pixels = height * width
    if pixels <= SHRINK_OVERLAP_ABOVE:
        return plan
    least = MIN_OVERLAP if pixels <= ENFORCE_OVERHEAD_ABOVE else DIVISOR
    while plan.overhead > MAX_OVERHEAD and overlap >= least + DIVISOR:
        overlap -= DIVISOR
        plan = _cheapest_plan(height, width, architecture, preprocess.window, overlap)
    return plan


def _cheapest_plan(
    height: int, width: int, network: Architecture, shapes: Sequence[Shape], overlap: int
) -> WindowPlan:
    """The plan with the least overhead, over all sets of heights and widths that combine."""
    margin, grid = network.margin, network.grid
    plans = []
    for first in {shape[0] for shape in shapes}:
        widths = {shape[1] for shape in shapes if shape[0] == first}
        heights = {shape[0] for shape in shapes if all((shape[0], w) in shapes for w in widths)}
        plans.append(
            WindowPlan(
                margin,
                AxisTiling.plan(height, {side - 2 * margin for side in heights}, overlap, grid),
                AxisTiling.plan(width, {side - 2 * margin for side in widths}, overlap, grid),
            )
        )
    return min(plans, key=lambda plan: (plan.overhead, plan.count))
