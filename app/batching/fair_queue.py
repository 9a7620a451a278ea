"""A queue in which everybody takes turns. Plain data: no futures, no time, no event loop.

Windows wait under a key (only equal keys share a batch) and belong to an owner (their request).
Within a key the owners take turns, window by window; the keys take turns, batch by batch. So an
image of a thousand windows delays its neighbour's single one by one window, not by a thousand.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)
Entry = TypeVar("Entry")


class FairQueue(Generic[Owner, Entry]):
    """key -> owners, next in turn first -> their entries, in order."""

    def __init__(self) -> None:
        self._keys: OrderedDict[Hashable, OrderedDict[Owner, deque[Entry]]] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def __iter__(self) -> Iterator[Hashable]:
        """Keys with waiting entries, the one whose turn it is first."""
        return iter(self._keys)

    def size(self, key: Hashable) -> int:
        """Entries that wait under one key."""
        return self._sizes.get(key, 0)

    def heads(self, key: Hashable) -> Iterator[Entry]:
        """The first waiting entry of each owner, under one key."""
        return (line[0] for line in self._keys[key].values())

    def put(self, owner: Owner, key: Hashable, entries: Iterable[Entry]) -> None:
        """Append entries to an owner's line; a new owner is the last in turn."""
        line = self._keys.setdefault(key, OrderedDict()).setdefault(owner, deque())
        before = len(line)
        line.extend(entries)
        self._sizes[key] = self.size(key) + len(line) - before
        self._tidy(owner, key)

    def take(self, key: Hashable, most: int, wanted: Callable[[Owner], bool]) -> list[Entry]:
        """Up to `most` entries of one key: one of each owner in turn, then the next round.

        `wanted` is asked before each turn; it may discard the owner, and says False if it did.
        """
        taken: list[Entry] = []
        while len(taken) < most and (owners := self._keys.get(key)):
            owner, line = next(iter(owners.items()))
            if not wanted(owner):
                continue
            taken.append(line.popleft())
            self._sizes[key] -= 1
            owners.move_to_end(owner)
            self._tidy(owner, key)
        if key in self._keys:
            self._keys.move_to_end(key)
        return taken

    def discard(self, owner: Owner) -> list[Entry]:
        """Take everything of one owner out, under whatever key it waits."""
        taken: list[Entry] = []
        for key in [key for key, owners in self._keys.items() if owner in owners]:
            line = self._keys[key][owner]
            taken += line
            self._sizes[key] -= len(line)
            line.clear()
            self._tidy(owner, key)
        return taken

    def _tidy(self, owner: Owner, key: Hashable) -> None:
        """No empty lines and no empty keys stay behind."""
        owners = self._keys[key]
        if not owners[owner]:
            del owners[owner]
        if not owners:
            del self._keys[key], self._sizes[key]
