"""Measure the seconds of a call that returns when its work is done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

_BURN_IN_SHARE = 0.25
"""Burn-in as a share of the measured time: it warms caches, clocks and thread pools."""
_MIN_RUNS = 3
"""Runs of a call that takes longer than the given time."""


def measure_seconds(
    call: Callable[[], object],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the median seconds of a call, after a burn-in.

    Args:
        seconds: to measure for; a slow call still runs three times.
        clock: `time.process_time` measures CPU time of all cores together, not elapsed time.
    """
    end = time.perf_counter() + seconds * _BURN_IN_SHARE
    while True:
        call()
        if time.perf_counter() >= end:
            break
    runs: list[float] = []
    end = time.perf_counter() + seconds
    while len(runs) < _MIN_RUNS or time.perf_counter() < end:
        start = clock()
        call()
        runs.append(clock() - start)
    return statistics.median(runs)
