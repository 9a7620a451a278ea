"""The windows that admitted requests still need, grouped so that admission need not visit each one.

A fast device has thousands of requests in its queue, and most of them need the same: one window of
one key. Plain data: no futures, no time, no event loop.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping


@dataclasses.dataclass
class _Group:
    """Requests that need the same.

    Attributes:
        pending: windows by key.
        total: of these windows.
        requests: how many there are.
    """

    pending: Counter[Hashable]
    total: int
    requests: int = 0


class Backlog:
    """Counts requests that need equal numbers of windows of equal keys."""

    def __init__(self) -> None:
        self._groups: dict[frozenset[tuple[Hashable, int]], _Group] = {}
        self._group_of: dict[Hashable, frozenset[tuple[Hashable, int]]] = {}

    def __iter__(self) -> Iterator[tuple[Counter[Hashable], int]]:
        """Windows by key, and how many requests need exactly these."""
        return ((group.pending, group.requests) for group in self._groups.values())

    def update(self, request: Hashable, pending: Mapping[Hashable, int]) -> None:
        """Set the windows that a request needs, by key; none removes it."""
        before = self._group_of.pop(request, None)
        if before is not None:
            group = self._groups[before]
            group.requests -= 1
            if not group.requests:
                del self._groups[before]
        if not pending:
            return
        needs = self._group_of[request] = frozenset(pending.items())
        if needs not in self._groups:
            self._groups[needs] = _Group(Counter(pending), sum(pending.values()))
        self._groups[needs].requests += 1

    def count_slots(self, most: int) -> int:
        """Slots in use, if a request takes at most `most`."""
        slots = 0
        for group in self._groups.values():
            slots += group.requests * min(group.total, most)
        return slots
