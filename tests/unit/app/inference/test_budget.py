"""The budget that requests share."""

from __future__ import annotations

import pytest

from app.errors import QueueFull
from app.inference.budget import Budget


def test_allocations_are_counted_and_freed_at_the_end() -> None:
    budget = Budget(100, "things", pytest.fail)
    with budget.allocate() as first, budget.allocate() as second:
        first.grow(30)
        second.grow(50)
        first.grow(20)
        assert (first.amount, second.amount, budget.used) == (50, 50, 100)
    assert budget.used == 0


def test_allocation_is_freed_after_an_error() -> None:
    budget = Budget(100, "things", pytest.fail)

    def fail() -> None:
        with budget.allocate() as allocation:
            allocation.grow(80)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert budget.used == 0


def test_rejection_is_counted_and_keeps_what_was_allocated() -> None:
    rejected: list[int] = []
    budget = Budget(100e6, "MB of uploads", lambda: rejected.append(1))
    with budget.allocate() as large, budget.allocate() as small:
        large.grow(80_000_000)
        small.grow(15_000_000)
        with pytest.raises(QueueFull) as error:
            small.grow(5_500_000)
        assert str(error.value) == (
            "memory limit reached: 95 of 100 MB of uploads used, 5.5 more needed"
        )
        assert error.value.retry_after == 1
        assert (small.amount, budget.used) == (15_000_000, 95_000_000)
        small.grow(5_000_000)
    assert (rejected, budget.used) == ([1], 0)
