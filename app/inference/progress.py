"""Lines in the log about requests that take long. Knows counts and time."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 10.0
"""Between two lines, and before the first one."""


class ProgressLog:
    """Logs how much of a long request is done; nothing if it takes less than the interval.

    Args:
        total: parts of the request.
        unit: what the parts are, in the plural.
    """

    def __init__(self, total: int, unit: str) -> None:
        self._total = total
        self._unit = unit
        self._done = 0
        self._start = self._logged = time.monotonic()

    def advance(self) -> None:
        """Count one more part as done."""
        self._done += 1
        now = time.monotonic()
        if now < self._logged + INTERVAL_SECONDS or self._done == self._total:
            return
        self._logged = now
        elapsed = now - self._start
        left = elapsed / self._done * (self._total - self._done)
        log.info(
            "%d of %d %s done after %.0f s, about %.0f s left",
            self._done,
            self._total,
            self._unit,
            elapsed,
            left,
        )
