"""How long windows will take, judged by how long they took. Knows lanes and time; no requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from app.lanes import Lane

MARGIN = 1.1
"""Of every estimate: a queue that is filled to the last second is late half of the time."""


class Estimates:
    """Of all devices together.

    Args:
        lanes: the devices; those that are lost do not count.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes

    def seconds(self, key: Hashable | None = None) -> float:
        """That a window of this key (or any) takes, measured; 0 before the first batch."""
        measured = [lane.seconds(key) for lane in self._lanes if lane.lost is None]
        rate = sum(1 / seconds for seconds in measured if seconds)
        return 1 / rate if rate else 0.0

    def allow(self, kinds: Counter[Hashable], windows: int) -> float:
        """Seconds to allow for some windows of a request, each as long as the mean of them all.

        Args:
            kinds: the keys of all its windows, with their number.
            windows: how many of them.
        """
        whole = sum(count * self.seconds(key) for key, count in kinds.items())
        return MARGIN * windows * whole / max(1, kinds.total())

    def doubt(self, keys: Iterable[Hashable]) -> None:
        """Somebody was turned away by what was measured of these keys, and by nothing else."""
        for lane in self._lanes:
            lane.doubt(keys)
