"""How long windows will take, judged by how long they took. Knows devices and time; no
requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

from app.batching.device_worker import DeviceWorker

MARGIN = 1.1
"""Of every estimate: a queue that is filled to the last second is late half of the time."""


class Estimates:
    """Of all devices together.

    Args:
        device_workers: the devices; those that are lost do not count.
    """

    def __init__(self, device_workers: Sequence[DeviceWorker]) -> None:
        self._lanes = device_workers

    def seconds(self, key: Hashable | None = None) -> float:
        """That a window of this key (or any) takes, measured; 0 before the first batch."""
        measured = [lane.seconds(key) for lane in self._lanes if lane.lost is None]
        rate = sum(1 / seconds for seconds in measured if seconds)
        return 1 / rate if rate else 0.0

    def allow(self, kinds: Mapping[Hashable, int]) -> float:
        """Seconds to allow for so many windows of each key."""
        return MARGIN * sum(count * self.seconds(key) for key, count in kinds.items())

    def turns(self, kinds: Counter[Hashable], windows: int) -> float:
        """Seconds to allow for what of these goes before the last of somebody else's `windows`:
        taking turns they have had as many by then, of each key, or all there are."""
        return self.allow(kinds) * min(1.0, windows * len(kinds) / max(1, kinds.total()))

    def doubt(self, kinds: Mapping[Hashable, int], left: float, but: Iterable[Hashable]) -> None:
        """Somebody is turned away; if for these windows alone, what was measured is doubted.

        Args:
            left: seconds until the deadline.
            but: keys that are being measured again at the moment.
        """
        if self.allow(kinds) > left > 0:
            for lane in self._lanes:
                lane.doubt(kinds.keys() - set(but))
