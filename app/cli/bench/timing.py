"""Seconds of a call that returns when its work is done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

_BURN_IN = 0.25
"""Part of the measured time that is spent before it, on caches, clocks and thread pools."""
_LEAST = 3
"""Runs of a call that takes longer than the time given."""


def timed(
    call: Callable[[], object],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median seconds of a call, after a burn-in.

    Args:
        seconds: to measure for; a slow call is run three times all the same.
        clock: `time.process_time` gives the seconds of one core instead of those of the wall.
    """
    end = time.perf_counter() + seconds * _BURN_IN
    while True:
        call()
        if time.perf_counter() >= end:
            break
    runs: list[float] = []
    end = time.perf_counter() + seconds
    while len(runs) < _LEAST or time.perf_counter() < end:
        start = clock()
        call()
        runs.append(clock() - start)
    return statistics.median(runs)
