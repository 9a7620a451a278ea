"""The moment by which a request needs its result. Knows time and no requests."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from app.errors import DeadlineExceeded


@dataclasses.dataclass(frozen=True, order=True)
class Deadline:
    """A point in time. The earlier of two deadlines compares as the smaller one.

    Attributes:
        at: seconds on the clock of `time.monotonic`; infinite if there is no deadline.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        """The deadline that many seconds from now."""
        return cls(time.monotonic() + seconds)

    @classmethod
    def never(cls) -> Self:
        """A deadline that does not pass."""
        return cls(math.inf)

    def earlier(self, other: Deadline) -> Deadline:
        """The earlier of this deadline and another."""
        return min(self, other)

    def remaining(self) -> float:
        """Seconds until the deadline: negative once it has passed, infinite if there is none."""
        return self.at - time.monotonic()

    def check(self) -> None:
        """Check that it has not passed.

        Raises:
            DeadlineExceeded: it has.
        """
        if self.remaining() <= 0:
            raise DeadlineExceeded("the deadline has passed")

    def enforced(
        self, message: str, on_exceeded: Callable[[], object] = lambda: None
    ) -> EnforcedDeadline:
        """Cancel the block when the deadline passes.

        Args:
            message: the text of the error.
            on_exceeded: called before the error is raised, for example to count it.

        Raises:
            DeadlineExceeded: the deadline passed before the block ended.
        """
        return EnforcedDeadline(self, message, on_exceeded)


def describe_lateness(estimated: float, remaining: float) -> str:
    """Compare the estimated seconds of a request with those that remain until its deadline."""
    return (
        f"estimated {_format_seconds(estimated)} s exceeds the {_format_seconds(remaining)} s "
        "remaining"
    )


def _format_seconds(seconds: float) -> str:
    """One decimal place from a second on, and two digits below, where 0.0 would say nothing."""
    return f"{seconds:.1f}" if seconds >= 1 else f"{round(max(0.0, seconds), 4):.2g}"


class EnforcedDeadline:
    """See `Deadline.enforced`. An asynchronous context manager."""

    def __init__(self, deadline: Deadline, message: str, on_exceeded: Callable[[], object]) -> None:
        self._deadline = deadline
        self._message = message
        self._on_exceeded = on_exceeded

    async def __aenter__(self) -> None:
        remaining = self._deadline.remaining()
        self._timeout = asyncio.timeout(None if math.isinf(remaining) else remaining)
        await self._timeout.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            self._on_exceeded()
            raise DeadlineExceeded(self._message) from None
