"""How long windows will take, estimated from how long windows took. Knows no requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

_SMOOTHING = 0.2
"""Weight of the newest batch in the average."""
_DISCOUNT = 0.95
"""Factor on the confidence in a measurement, each time a request is rejected because of it alone.
"""
MARGIN = 1.1
"""Factor on every estimate. Without it, a queue filled to the last second would miss half of its
deadlines."""


class Measurements:
    """Seconds that one device takes per window, by key: an exponential moving average."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = {}
        self._confidence: dict[Hashable, float] = {}

    def record(self, key: Hashable, seconds: float) -> None:
        """Add the seconds per window of a batch that has just run."""
        average = self._seconds.setdefault(key, seconds)
        self._seconds[key] = average + _SMOOTHING * (seconds - average)
        self._confidence.pop(key, None)

    def seconds(self, key: Hashable | None = None) -> float | None:
        """Seconds per window of a key; for None and for a key that was never measured, the mean
        over the keys. None if nothing was measured."""
        known = self._seconds
        if not known:
            return None
        seconds = known[key] if key in known else sum(known.values()) / len(known)
        return seconds * self._confidence.get(key, 1.0)

    def discount(self, keys: Iterable[Hashable]) -> None:
        """Lower the confidence in the measurements of these keys until they are measured again.

        A rejected request does not run, so it cannot correct the measurement that rejected it.
        Without this, one slow batch would cause every request with a short deadline to be rejected
        forever.
        """
        for key in keys:
            self._confidence[key] = self._confidence.get(key, 1.0) * _DISCOUNT

    def forget(self, matches: Callable[[Any], bool]) -> None:
        """Drop the keys that match."""
        for known in (self._seconds, self._confidence):
            for key in [key for key in known if matches(key)]:
                del known[key]


class MeasuredDevice(Protocol):
    """A device as far as estimates are concerned."""

    @property
    def failure(self) -> Exception | None:
        """Why it cannot compute any more; None if it can."""

    @property
    def measurements(self) -> Measurements:
        """How long its batches took."""


class Estimates:
    """Estimates for all devices together.

    Args:
        devices: those that have failed do not count.
    """

    def __init__(self, devices: Sequence[MeasuredDevice]) -> None:
        self._devices = devices

    def seconds(self, key: Hashable | None = None) -> float:
        """Seconds per window of a key, or over all keys; 0 before the first batch."""
        windows_per_second = 0.0
        for device in self._devices:
            seconds = device.measurements.seconds(key)
            if device.failure is None and seconds:
                windows_per_second += 1 / seconds
        return 1 / windows_per_second if windows_per_second else 0.0

    def estimate(self, windows: Mapping[Hashable, int]) -> float:
        """Seconds for that many windows of each key, with a margin."""
        seconds = 0.0
        for key, count in windows.items():
            seconds += count * self.seconds(key)
        return MARGIN * seconds

    def interleaved_cost(self, pending: Counter[Hashable], windows: int) -> float:
        """Seconds that the pending windows of another request add to a request of `windows`.

        Since requests take turns, by its last window at most as many of the other request's
        windows have run, of each key.
        """
        share = windows * len(pending) / max(1, pending.total())
        return self.estimate(pending) * min(1.0, share)

    def discount(
        self, windows: Mapping[Hashable, int], remaining: float, exclude: Collection[Hashable]
    ) -> None:
        """Lower the confidence in measurements because of which a request is rejected.

        Does nothing if other requests in the queue, or a deadline that has passed, are the reason.

        Args:
            windows: of the rejected request, by key.
            remaining: seconds until its deadline.
            exclude: keys that are being measured at the moment.
        """
        if self.estimate(windows) > remaining > 0:
            for each in self._devices:
                each.measurements.discount(windows.keys() - set(exclude))
