"""The turns, slots and windows that a request holds in the batcher.

Knows keys, payloads and time; no queue and no devices.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, Protocol, Self, TypeVar

from app.batching.deadline import Deadline

PayloadT = TypeVar("PayloadT")
ResultT = TypeVar("ResultT")


class Share:
    """The turns and the slots of one request, which its reservations have in common.

    Attributes:
        pending: windows of all its reservations without a result, by key.
    """

    def __init__(self) -> None:
        self.pending: Counter[Hashable] = Counter()


class QueuedWindow(Generic[PayloadT, ResultT]):
    """One window of a reservation, from `Reservation.submit` until its future is done."""

    __slots__ = ("future", "key", "payload", "queued_at", "reservation")

    def __init__(
        self, reservation: Reservation[PayloadT, ResultT], key: Hashable, payload: PayloadT
    ) -> None:
        self.reservation = reservation
        self.key = key
        self.payload = payload
        self.queued_at = time.monotonic()
        self.future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()

    @property
    def wanted(self) -> bool:
        """Whether the request still waits for the result."""
        return not self.reservation.released


class Holder(Protocol[PayloadT, ResultT]):
    """The batcher as a reservation sees it."""

    def queue(self, windows: Sequence[QueuedWindow[PayloadT, ResultT]], /) -> None:
        """Queue windows that are new, all of one reservation."""

    def release(self, reservation: Reservation[PayloadT, ResultT], /) -> None:
        """Free the slots of a reservation, and drop its windows that wait."""


class Reservation(Generic[PayloadT, ResultT]):
    """The slots of one image, one per window; a context manager.

    Leaving it discards the windows that still wait and frees the slots.

    Args:
        keys: one per window, and
        windows: how many there are of each.

    Attributes:
        share: of the request.
        deadline: of the request.
        pending: windows without a result, by key. Each occupies a slot.
        unsubmitted: keys of the windows that are reserved and not submitted.
        released: the request has left.
        submitted_at, last_settled_at: on the clock of `time.monotonic`.
        infer_seconds: time during which at least one of the windows was on a device.
    """

    def __init__(
        self,
        holder: Holder[PayloadT, ResultT],
        keys: Sequence[Hashable],
        windows: Counter[Hashable],
        deadline: Deadline,
        share: Share,
    ) -> None:
        self.share = share
        self.deadline = deadline
        self.pending = windows
        for key, count in windows.items():
            share.pending[key] += count
        self.unsubmitted = deque(keys)
        self.released = False
        self.submitted_at = self.last_settled_at = 0.0
        self.infer_seconds = 0.0
        self._ran_until = 0.0
        self._holder = holder

    @property
    def queue_seconds(self) -> float:
        """Seconds from `submit` to the last result, without `infer_seconds`."""
        return max(0.0, self.last_settled_at - self.submitted_at - self.infer_seconds)

    def submit(self, payloads: Sequence[PayloadT]) -> list[asyncio.Future[ResultT]]:
        """Queue windows in the order of the keys they were reserved by.

        Returns:
            One future per window.

        Raises:
            ValueError: more windows than are reserved, or the reservation was released.
        """
        if self.released:
            raise ValueError("the reservation was released")
        if len(payloads) > len(self.unsubmitted):
            raise ValueError(f"{len(payloads)} windows for {len(self.unsubmitted)} reserved slots")
        if not self.submitted_at:
            self.submitted_at = time.monotonic()
        windows = [QueuedWindow(self, self.unsubmitted.popleft(), each) for each in payloads]
        self._holder.queue(windows)
        return [window.future for window in windows]

    def settle(self, key: Hashable) -> None:
        """Free the slot of a window that has its outcome."""
        _subtract(self.pending, {key: 1})
        if not self.released:
            _subtract(self.share.pending, {key: 1})
        self.last_settled_at = time.monotonic()

    def record_run(self, start: float, end: float) -> None:
        """Count the time of a batch. Time during which two devices ran counts once."""
        self.infer_seconds += max(0.0, end - max(start, self._ran_until))
        self._ran_until = max(end, self._ran_until)

    def leave(self) -> None:
        """Free the slots. Windows that are settled later do not count for the share."""
        self.released = True
        _subtract(self.share.pending, self.pending)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.release(self)


def _subtract(counts: Counter[Hashable], fewer: Mapping[Hashable, int]) -> None:
    """Subtract in place, and drop what becomes zero."""
    for key, count in fewer.items():
        counts[key] -= count
        if not counts[key]:
            del counts[key]
