"""The range of an image's values without the few that are absurd: hot and dead pixels.

A value is absurd if it is one of few at that end of the range, and if the gap between it and the
others is wider than these are apart. A few bright objects are not: their edges fill the gap.
Such a pixel gets the median of its neighbours, so that it does not look like an object.
Knows arrays; no files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from model.arrays import AnyArray

Values = npt.NDArray[Any]

_FEW_SHARE, _FEW_SMALL, _FEW_LEAST = 500, 50, 16
"""At most one value in 500 is absurd, as many as the percentiles of the shipped models leave out.
In a small image up to 16 may be, if they are one in 50 or fewer."""
_REACH = 20
"""Values further from the others than this many times their range are clipped, gap or not."""
_AROUND = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]).T
"""Rows and columns of a pixel's neighbours, relative to it."""


def count_few(values: int) -> int:
    """How many of so many values may be absurd, at each end."""
    return max(values // _FEW_SHARE, min(_FEW_LEAST, values // _FEW_SMALL))


def find_gaps(lowest: Values, highest: Values) -> tuple[float, float]:
    """Find the least and the greatest value that is not absurd.

    Args:
        lowest: the few least values and the next one, ascending.
        highest: the one before the few greatest values and these, ascending.
    """
    # Halves, because the range of float64 itself may not fit into float64.
    low, high = lowest.astype(np.float64) / 2, highest.astype(np.float64) / 2
    if high[0] <= low[-1]:  # the others are one value: nothing to compare a gap with
        return 2 * low[0], 2 * high[-1]
    above = np.flatnonzero(np.diff(high) > high[:-1] - low[-1])
    below = np.flatnonzero(np.diff(low) > high[0] - low[1:])
    return (
        2 * float(low[below[-1] + 1] if below.size else low[0]),
        2 * float(high[above[0]] if above.size else high[-1]),
    )


def find_range(blocks: Iterable[AnyArray], count: int) -> tuple[float, float]:
    """Find the range of values without those that are absurd.

    Args:
        blocks: the values in parts; all of them are finite.
        count: of all values, at least 1.
    """
    few = count_few(count) + 1
    least, greatest = _Greatest(few, -1), _Greatest(few, 1)
    for block in blocks:
        least.add(block)
        greatest.add(block)
    lowest, highest = least.result(), greatest.result()
    low, high = find_gaps(lowest, highest)
    start, stop = float(lowest[-1]) / 2, float(highest[0]) / 2
    if start < stop:
        reach = _REACH * (stop - start)
        low, high = 2 * max(low / 2, start - reach), 2 * min(high / 2, stop + reach)
    return low, high


def replace_absurd(image: AnyArray, absurd: AnyArray, missing: AnyArray | None = None) -> None:
    """Replace absurd values by the median of their neighbours, in place.

    One whose neighbours are all absurd or missing stays as it is.

    Args:
        image: (H, W) or (H, W, C).
        absurd: where values are absurd; the same shape, bool.
        missing: where they are missing, in the same way.
    """
    places = np.nonzero(absurd)
    rows, columns = (
        place[:, None] + shift for place, shift in zip(places[:2], _AROUND, strict=True)
    )
    height, width = image.shape[:2]
    usable = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    around = (rows.clip(0, height - 1), columns.clip(0, width - 1))
    around += tuple(np.broadcast_to(place[:, None], rows.shape) for place in places[2:])
    usable &= ~absurd[around]
    if missing is not None:
        usable &= ~missing[around]
    known = usable.any(axis=1)
    neighbours = np.where(usable, image[around], np.nan)[known]
    if known.any():
        medians = np.nanmedian(neighbours, axis=1)
        image[tuple(place[known] for place in places)] = np.rint(medians)


class _Greatest:
    """Collects the greatest values of an array that comes in parts.

    Args:
        number: how many.
        sign: 1; or -1 for the least values instead.
    """

    def __init__(self, number: int, sign: int) -> None:
        self._number, self._sign = number, sign
        self._kept: Values | None = None
        self._limit: Any = None

    def add(self, block: AnyArray) -> None:
        """Take the values of a part into account."""
        values = block.ravel()
        if self._limit is not None:
            better = values > self._limit if self._sign > 0 else values < self._limit
            values = values[better]
        kept = values if self._kept is None else np.concatenate([self._kept, values])
        if kept.size > self._number:
            place = kept.size - self._number if self._sign > 0 else self._number - 1
            ordered = np.partition(kept, place)
            kept = ordered[place:] if self._sign > 0 else ordered[: place + 1]
            self._limit = ordered[place]
        self._kept = kept

    def result(self) -> Values:
        """The collected values, ascending."""
        assert self._kept is not None
        return np.sort(self._kept)
