"""A queue in which requests take turns. Plain data: no futures, no time, no event loop.

Entries wait under a key (only equal keys share a batch) and belong to an owner (a request). Those
of one owner keep their order. Within
a key the owners take turns, entry by entry; the keys take turns, batch by batch. A request with a
thousand windows delays another request's only window by one window, not by a thousand.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

OwnerT = TypeVar("OwnerT", bound=Hashable)
EntryT = TypeVar("EntryT")


class FairQueue(Generic[OwnerT, EntryT]):
    """Entries by key and owner."""

    def __init__(self) -> None:
        # Keys and owners are in the order of their turns.
        self._keys: OrderedDict[Hashable, OrderedDict[OwnerT, deque[EntryT]]] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def __iter__(self) -> Iterator[Hashable]:
        """The keys that have entries, next in turn first."""
        return iter(self._keys)

    def size(self, key: Hashable) -> int:
        """The number of entries under one key."""
        return self._sizes.get(key, 0)

    def heads(self, key: Hashable) -> Iterator[EntryT]:
        """The first entry of each owner under one key."""
        return (entries[0] for entries in self._keys[key].values())

    def put(self, owner: OwnerT, key: Hashable, entries: Iterable[EntryT]) -> None:
        """Append entries to those of an owner. A new owner is the last in turn."""
        queued = self._keys.setdefault(key, OrderedDict()).setdefault(owner, deque())
        before = len(queued)
        queued.extend(entries)
        self._sizes[key] = self.size(key) + len(queued) - before
        self._remove_if_empty(owner, key)

    def take(self, key: Hashable, limit: int, accept: Callable[[EntryT], bool]) -> list[EntryT]:
        """Take up to `limit` entries of one key: one from each owner in turn, round by round.

        Args:
            accept: called with each entry that is next. Returns False if it has discarded the
                entry, which is then skipped.
        """
        taken: list[EntryT] = []
        while len(taken) < limit and key in self._keys:
            owners = self._keys[key]
            owner, entries = next(iter(owners.items()))
            if not accept(entries[0]):
                continue
            taken.append(entries.popleft())
            self._sizes[key] -= 1
            owners.move_to_end(owner)
            self._remove_if_empty(owner, key)
        if key in self._keys:
            self._keys.move_to_end(key)
        return taken

    def discard(self, owner: OwnerT, matches: Callable[[EntryT], bool]) -> list[EntryT]:
        """Remove and return the entries of one owner that match, under every key."""
        removed: list[EntryT] = []
        for key in [key for key, owners in self._keys.items() if owner in owners]:
            entries = self._keys[key][owner]
            matching = [entry for entry in entries if matches(entry)]
            kept = [entry for entry in entries if not matches(entry)]
            removed += matching
            self._sizes[key] -= len(matching)
            entries.clear()
            entries.extend(kept)
            self._remove_if_empty(owner, key)
        return removed

    def _remove_if_empty(self, owner: OwnerT, key: Hashable) -> None:
        owners = self._keys[key]
        if not owners[owner]:
            del owners[owner]
        if not owners:
            del self._keys[key], self._sizes[key]
