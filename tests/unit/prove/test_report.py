"""The table of `make prove`: which rows pass, and how they read."""

from __future__ import annotations

import pytest

from tools.prove.report import Row, at_least, at_most, equal, format_table, none_of, noted


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (at_most("x", 49.9, 50, "ms"), True),
        (at_most("x", 50.1, 50, "ms"), False),
        (at_most("x", float("inf"), 50, "ms"), False),
        (at_least("x", 50_000, 50_000), True),
        (at_least("x", 49_999, 50_000), False),
        (equal("x", 70, 70), True),
        (equal("x", -15, 70), False),
        (none_of("x", []), True),
        (none_of("x", ["held_bytes=1"]), False),
        (noted("x", 3), True),
    ],
)
def test_row_passes_within_its_bound(row: Row, passed: bool) -> None:
    assert row.passed is passed
    table = format_table([row])
    assert ("**missed**" in table) is not passed


def test_table_shows_the_bound_beside_the_figure() -> None:
    rows = [at_most("slowest a|b", 12_345.6, 20_000, "ms"), none_of("left", ["x=1", "y=2"])]
    assert format_table(rows).splitlines()[2:] == [
        r"| slowest a\|b | 12,346 ms | at most 20,000 ms | passed |",
        "| left | 2: x=1; y=2 | 0 | **missed** |",
    ]
