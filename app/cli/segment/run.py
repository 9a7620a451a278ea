"""Segments images concurrently, and keeps count. Knows neither engines nor HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from app.cli.errors import CommandError
from app.cli.segment.sources import Target
from app.errors import ServiceError

SegmentImage = Callable[[Target], Awaitable[bool]]
"""Segments an image and writes its results. Returns whether that was necessary.

Raises a `ServiceError` or `CommandError` if the image fails, `RunStopped` if all others would."""


class RunStopped(CommandError):
    """An image failed for a reason that all others share."""


@dataclasses.dataclass
class Report:
    """Counts of images, and the failures.

    Attributes:
        written: number with new results.
        skipped: number that had results already.
        failures: images that failed, with the reasons, in the order of failing.
        untried: number that was left when the run was stopped.
    """

    written: int = 0
    skipped: int = 0
    failures: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    untried: int = 0

    def summarize(self, place: str) -> str:
        """Return one line.

        Args:
            place: where results were written to.
        """
        parts = [f"{self.written} written to {place}"]
        counts = {"skipped": self.skipped, "failed": len(self.failures), "not tried": self.untried}
        return ", ".join(parts + [f"{count} {word}" for word, count in counts.items() if count])


async def segment_all(
    segment: SegmentImage, targets: Sequence[Target], report: Report, concurrency: int
) -> None:
    """Segment images with a progress bar, and add each to the report."""
    remaining = deque(targets)

    async def segment_remaining() -> None:
        while remaining:
            target = remaining.popleft()
            try:
                if await segment(target):
                    report.written += 1
                else:
                    report.skipped += 1
            except (ServiceError, CommandError) as error:
                report.failures.append((target.image, str(error)))
                if isinstance(error, RunStopped):
                    report.untried += len(remaining)
                    remaining.clear()
            bar.update()

    with tqdm(total=len(targets), unit="image", disable=not sys.stderr.isatty()) as bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(segment_remaining())
