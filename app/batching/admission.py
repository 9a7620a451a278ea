"""Which requests the batcher admits: those for which it has slots, and that will be done in time.

By default there are as many slots as windows that can be computed within the longest deadline, as
measured. A request takes at most a quarter of them, however many windows it has: since requests
take turns, more windows do not delay the others more.

Knows counts of windows, estimates and deadlines; no queue and no payloads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable
from typing import NoReturn

from app.batching.backlog import Backlog
from app.batching.deadline import Deadline, describe_lateness
from app.batching.device_worker import Observer
from app.batching.estimates import Estimates
from app.batching.reservation import Share
from app.errors import DeadlineExceeded, QueueFull

UNMEASURED_CAPACITY = 64
"""Slots while no batch has run, if their number follows the measured rate."""
MAX_CAPACITY = 1 << 16
"""Most slots in that case. A request takes 2.3 KB and each of its windows 0.7 KB, beside its pixels
(measured): in all 200 MB at most."""
_MIN_CAPACITY = 4
"""Fewest slots in that case, so that a quarter of them is one."""


class Admission:
    """Counts the windows of the requests that were admitted, and rejects what does not fit.

    Args:
        estimates: how long windows take.
        capacity: slots for windows that are admitted and have no result. None is the number of
            windows that can be computed in `longest` seconds, as measured.
        longest: seconds, the longest deadline of a request.
        keys_in_flight: returns the keys that are being measured at the moment.
        observer: receives rejections.
    """

    def __init__(
        self,
        estimates: Estimates,
        capacity: int | None,
        longest: float,
        keys_in_flight: Callable[[], Collection[Hashable]],
        observer: Observer,
    ) -> None:
        self._estimates = estimates
        self._capacity = capacity
        self._longest = longest
        self._keys_in_flight = keys_in_flight
        self._observer = observer
        self._backlog = Backlog()

    @property
    def capacity(self) -> int:
        """Slots for windows that are admitted and have no result."""
        if self._capacity is not None:
            return self._capacity
        seconds = self._estimates.seconds()
        if not seconds:
            return UNMEASURED_CAPACITY
        return int(min(max(self._longest / seconds, _MIN_CAPACITY), MAX_CAPACITY))

    @property
    def has_room(self) -> bool:
        """Whether the slots of a request are free, however many windows it has."""
        capacity = self.capacity
        most = _max_per_request(capacity)
        return self._backlog.count_slots(most) + most <= capacity

    def check(
        self,
        windows: Counter[Hashable],
        deadline: Deadline,
        share: Share,
        *,
        ignore_capacity: bool = False,
    ) -> None:
        """Check that windows fit beside those that were admitted.

        Args:
            windows: by key.
            share: of the request.
            ignore_capacity: check only the deadline.

        Raises:
            QueueFull: the slots are not free.
            DeadlineExceeded: the deadline has passed or, as measured, cannot be met.
        """
        if not ignore_capacity:
            self._check_capacity(windows.total(), share)
        self._check_deadline(windows, deadline, share)

    def count(self, share: Share) -> None:
        """Count the windows that a request has pending now."""
        self._backlog.update(share, share.pending)

    def reject(self, reason: str, error: Exception) -> NoReturn:
        """Reject a request, and report it to the observer."""
        self._observer.request_rejected(reason)
        raise error

    def _check_capacity(self, windows: int, share: Share) -> None:
        capacity = self.capacity
        most = _max_per_request(capacity)
        used, own = self._backlog.count_slots(most), share.pending.total()
        needed = min(own + windows, most) - min(own, most)
        excess = used + needed - capacity
        if excess > 0:
            message = f"queue full: {used} of {capacity} slots used, {needed} needed"
            retry_after = excess * self._estimates.seconds()
            self.reject("queue_full", QueueFull(message, retry_after=retry_after))

    def _check_deadline(self, windows: Counter[Hashable], deadline: Deadline, share: Share) -> None:
        remaining = deadline.remaining()
        if remaining <= 0:
            self.reject("deadline", DeadlineExceeded("the deadline has passed"))
        # Those of the same request come first.
        needs = share.pending + windows if share.pending else windows
        own = total = self._estimates.estimate(needs)
        count_needed = needs.total()
        for pending, count in self._backlog:
            total += count * self._estimates.interleaved_cost(pending, count_needed)
        if share.pending:  # it is in the backlog, and in what is needed
            total -= self._estimates.interleaved_cost(share.pending, count_needed)
        if total <= remaining:
            return
        self._estimates.discount(windows, remaining, exclude=self._keys_in_flight())
        # A request that is too large for its deadline will not fit later either.
        retry_after = total - remaining if own < remaining else None
        error = DeadlineExceeded(describe_lateness(total, remaining), retry_after=retry_after)
        self.reject("deadline", error)


def _max_per_request(capacity: int) -> int:
    """Slots that one request takes at most."""
    return max(1, capacity // 4)
