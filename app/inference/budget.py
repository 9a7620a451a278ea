"""How much of something all requests together may hold: bytes, pixels. Knows neither of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.errors import QueueFull


class Budget:
    """An amount of which requests take shares, and give them back when they end.

    Args:
        limit: of all shares together; at least what one request may need.
        what: millions of it are called, in the refusal.
        refused: called at each refusal.
    """

    def __init__(self, limit: float, what: str, refused: Callable[[], None]) -> None:
        self.limit = limit
        self.held = 0
        self._what = what
        self._refused = refused

    @contextmanager
    def share(self) -> Iterator[Allocation]:
        """A share that is empty, and can be enlarged until the end of the block."""
        share = Allocation(self)
        try:
            yield share
        finally:
            self.held -= share.amount

    def _take(self, amount: int) -> None:
        if self.held + amount > self.limit:
            self._refused()
            raise QueueFull(
                f"{self.held / 1e6:.0f} of {self.limit / 1e6:.0f} {self._what} are taken, and this "
                f"request needs {amount / 1e6:.1f} more",
                retry_after=1,
            )
        self.held += amount


class Allocation:
    """What one request holds of a budget."""

    def __init__(self, budget: Budget) -> None:
        self.amount = 0
        self._budget = budget

    def take(self, amount: int) -> None:
        """Hold so much more.

        Raises:
            QueueFull: the others hold too much at the moment.
        """
        self._budget._take(amount)
        self.amount += amount
