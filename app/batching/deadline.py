"""The moment by which a request needs its result. Knows time and no requests."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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

    @asynccontextmanager
    async def enforced(
        self, message: str, on_exceeded: Callable[[], object] = lambda: None
    ) -> AsyncIterator[None]:
        """Cancel the block when the deadline passes.

        Args:
            message: the text of the error.
            on_exceeded: called before the error is raised, for example to count it.

        Raises:
            DeadlineExceeded: the deadline passed before the block ended.
        """
        seconds = None if math.isinf(self.at) else self.remaining()
        try:
            async with asyncio.timeout(seconds) as timeout:
                yield
        except TimeoutError:
            if not timeout.expired():  # the block raised it for a reason of its own
                raise
            on_exceeded()
            raise DeadlineExceeded(message) from None
