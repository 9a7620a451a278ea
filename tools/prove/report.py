"""The table of a run: each figure beside its bound. Knows no experiments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: was measured.
        figure: its value.
        bound: what the figure has to be.
        passed: whether it is.
    """

    what: str
    figure: str
    bound: str
    passed: bool


def at_most(what: str, value: float, bound: float, unit: str = "") -> Row:
    """A figure that must not exceed a bound."""
    return Row(what, _format(value, unit), f"at most {_format(bound, unit)}", value <= bound)


def at_least(what: str, value: float, bound: float, unit: str = "") -> Row:
    """A figure that must reach a bound."""
    return Row(what, _format(value, unit), f"at least {_format(bound, unit)}", value >= bound)


def equal(what: str, value: object, expected: object) -> Row:
    """A figure that must have one value."""
    return Row(what, str(value), str(expected), value == expected)


def none_of(what: str, found: Iterable[object]) -> Row:
    """A list of failures, which must be empty. The figure names the first ones."""
    failures = [str(each) for each in found]
    figure = "0" if not failures else f"{len(failures)}: {'; '.join(failures[:5])}"
    return Row(what, figure, "0", not failures)


def noted(what: str, figure: object) -> Row:
    """A figure without a bound, to read the others by."""
    return Row(what, str(figure), "", True)


def format_counts(counts: Mapping[Any, int]) -> str:
    """Counts by name: "200: 12, 422: 3"."""
    return ", ".join(f"{key}: {counts[key]:,}" for key in sorted(counts, key=str)) or "none"


def format_table(rows: Iterable[Row]) -> str:
    """A table in Markdown."""
    lines = ["| measured | figure | bound | |", "|---|---|---|---|"]
    for row in rows:
        mark = "" if not row.bound else "passed" if row.passed else "**missed**"
        cells = (row.what, row.figure, row.bound, mark)
        lines.append(f"| {' | '.join(_escape(cell) for cell in cells)} |")
    return "\n".join(lines)


def _format(value: float, unit: str) -> str:
    whole = abs(value) >= 100 or value == round(value)
    number = f"{value:,.0f}" if whole else f"{value:.3g}"
    return f"{number} {unit}".rstrip()


def _escape(cell: str) -> str:
    return " ".join(cell.replace("|", r"\|").split())
