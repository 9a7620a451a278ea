"""A limit on what all requests together may hold in memory. Knows no unit: bytes or pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from app.errors import QueueFull


class Budget:
    """An amount that requests share. Each allocates what it needs and frees it when it ends.

    Args:
        limit: of all allocations together; at least what one request may need.
        label: what is counted, after a number of millions: "MB of uploads".
        on_rejected: called each time an allocation does not fit.

    Attributes:
        used: the sum of all allocations.
    """

    def __init__(self, limit: float, label: str, on_rejected: Callable[[], object]) -> None:
        self.limit = limit
        self.used = 0
        self._label = label
        self._on_rejected = on_rejected

    def allocate(self) -> Allocation:
        """An allocation that starts empty, can grow, and is freed at the end of its block."""
        return Allocation(self)

    def acquire(self, amount: int) -> None:
        """Count `amount` as used; `Allocation.grow` calls this and remembers the amount.

        Raises:
            QueueFull: it does not fit beside what is used.
        """
        if self.used + amount > self.limit:
            self._on_rejected()
            raise QueueFull(
                f"memory limit reached: {self.used / 1e6:.0f} of {self.limit / 1e6:.0f} "
                f"{self._label} used, {amount / 1e6:.1f} more needed",
                retry_after=1,
            )
        self.used += amount


class Allocation:
    """The part of a budget that one request holds; a context manager that frees it.

    Attributes:
        amount: how much that is.
    """

    def __init__(self, budget: Budget) -> None:
        self.amount = 0
        self._budget = budget

    def grow(self, amount: int) -> None:
        """Hold `amount` more.

        Raises:
            QueueFull: other requests use too much of the budget at the moment.
        """
        self._budget.acquire(amount)
        self.amount += amount

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.used -= self.amount
