"""The windows that admitted requests still need, grouped so that admission need not visit each one.

A fast device has thousands of requests in its queue, and most of them need the same: one window of
one key. Plain data: no futures, no time, no event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping

_Needs = frozenset[tuple[Hashable, int]]


class Backlog:
    """Counts requests that need equal numbers of windows of equal keys."""

    def __init__(self) -> None:
        self._needs: dict[Hashable, _Needs] = {}
        self._counts: Counter[_Needs] = Counter()

    def __iter__(self) -> Iterator[tuple[Counter[Hashable], int]]:
        """Windows by key, and how many requests need exactly these."""
        return ((Counter(dict(needs)), count) for needs, count in self._counts.items())

    def update(self, request: Hashable, pending: Mapping[Hashable, int]) -> None:
        """Set the windows that a request needs, by key; none removes it."""
        before = self._needs.pop(request, None)
        if before is not None:
            self._counts[before] -= 1
            if not self._counts[before]:
                del self._counts[before]
        if pending:
            needs = self._needs[request] = frozenset(pending.items())
            self._counts[needs] += 1

    def count_slots(self, most: int) -> int:
        """Slots in use, if a request takes at most `most`."""
        return sum(count * min(pending.total(), most) for pending, count in self)
