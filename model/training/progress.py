"""Progress of long work: a bar on a terminal, and a line every ten seconds without one.

Knows the standard error stream; no training.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Seconds between two lines without a terminal."""

Item = TypeVar("Item")


def has_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()


class LineClock:
    """Prints lines on standard error, at most one in `LINE_SECONDS`; none on a terminal."""

    def __init__(self) -> None:
        self._next = time.monotonic() + LINE_SECONDS

    def print(self, make_line: Callable[[], str]) -> None:
        """Print a line if it is due."""
        if time.monotonic() < self._next or has_terminal():
            return
        self._next = time.monotonic() + LINE_SECONDS
        print(make_line(), file=sys.stderr, flush=True)


def track(items: Iterable[Item], total: int, action: str) -> Iterator[Item]:
    """Yield items, and show how many of them are done.

    Args:
        action: what is done with them, such as "reading".
    """
    if has_terminal():
        yield from tqdm(items, action, total, unit="image", leave=False)
        return
    clock = LineClock()
    for done, item in enumerate(items):
        yield item
        clock.print(lambda done=done: f"{action}: {done + 1} of {total} images")  # type: ignore[misc]
