"""Small runs of experiments of `make prove`: they keep working, and find what is frequent."""

from __future__ import annotations

import pytest

from tools.prove import api, mutations, signals
from tools.prove.report import Row, format_table


def assert_passed(rows: list[Row]) -> None:
    assert rows
    assert all(row.passed for row in rows), format_table(rows)


def test_damaged_images_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "MINIMUM", 600)
    assert_passed(mutations.run(0))


def test_sigterm_under_load_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "TERMINATIONS", 5)
    assert_passed(signals.run(0))


def test_requests_made_from_the_schema_are_answered_as_documented(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "MINIMUM", 20)
    assert_passed(api.run(6))
