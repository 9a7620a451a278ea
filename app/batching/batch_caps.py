"""How large batches may be where a device ran out of memory, and when to try larger ones again.

Another process may take a device's memory for a while, so a limit is not for good: it is doubled
after some seconds without an error, and after twice as many each time that this fails. Plain data:
no event loop and no device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable
from typing import Any

_FIRST_WAIT_S, _LONGEST_WAIT_S = 10.0, 600.0
"""Seconds before a limit is raised: after the first lack of memory, and at most."""


@dataclasses.dataclass
class _Cap:
    """The limit of one key.

    Attributes:
        windows: the limit.
        failed: the largest batch that ran out of memory.
        wait: seconds before the limit is raised.
        raise_at: when that is, on the clock.
        raised: it was raised since the last lack of memory.
    """

    windows: int
    failed: int
    wait: float
    raise_at: float
    raised: bool = False


class BatchCaps:
    """Batch limits by key, for the keys that ran out of memory.

    Args:
        clock: seconds, as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._caps: dict[Hashable, _Cap] = {}

    def limit(self, key: Hashable) -> int | None:
        """The most windows in a batch of this key; None if memory does not limit it."""
        cap = self._caps.get(key)
        return None if cap is None or cap.windows >= cap.failed else cap.windows

    def lower(self, key: Hashable, failed: int) -> None:
        """Halve the limit after a batch of `failed` windows ran out of memory."""
        old = self._caps.get(key)
        wait = _FIRST_WAIT_S if old is None else old.wait
        if old is not None and old.raised:
            wait = min(2 * wait, _LONGEST_WAIT_S)
        largest = failed if old is None else max(failed, old.failed)
        windows = failed // 2 if old is None else min(failed // 2, old.windows)
        self._caps[key] = _Cap(windows, largest, wait, self._clock() + wait)

    def record_success(self, key: Hashable, windows: int) -> None:
        """Raise the limit if it is time, after a batch of so many windows has run."""
        cap = self._caps.get(key)
        if cap is None:
            return
        now = self._clock()
        if windows >= cap.failed:
            del self._caps[key]
        elif now >= cap.raise_at and cap.windows < cap.failed:
            cap.windows, cap.raise_at, cap.raised = 2 * cap.windows, now + cap.wait, True

    def forget(self, matches: Callable[[Any], bool]) -> None:
        """Drop the keys that match."""
        for key in [key for key in self._caps if matches(key)]:
            del self._caps[key]
