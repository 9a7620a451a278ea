"""Requests are counted by what they need."""

from __future__ import annotations

from collections import Counter

from app.batching.backlog import Backlog


def test_requests_with_equal_needs_are_one_group() -> None:
    backlog = Backlog()
    for request in range(1000):
        backlog.update(request, {"small": 1})
    backlog.update("large", {"small": 3, "wide": 40})
    groups = {tuple(sorted(needs.items())): count for needs, count in backlog}
    assert groups == {(("small", 1),): 1000, (("small", 3), ("wide", 40)): 1}
    assert backlog.count_slots(most=50) == 1043
    assert backlog.count_slots(most=10) == 1010


def test_update_replaces_what_a_request_needs_and_nothing_removes_it() -> None:
    backlog = Backlog()
    backlog.update("a", {"k": 2})
    backlog.update("a", {"k": 1})
    backlog.update("b", {"k": 1})
    assert list(backlog) == [(Counter(k=1), 2)]
    backlog.update("a", {})
    backlog.update("b", {})
    backlog.update("b", {})
    assert list(backlog) == []
