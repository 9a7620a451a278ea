"""Counts what becomes of the images. Knows neither engines nor HTTP."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Awaitable, Callable

from tqdm import tqdm

from app.cli.errors import CommandError
from app.cli.segment.sources import Target
from app.cli.segment.storage import AnyPath
from app.cli.segment.wording import describe_error
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
        failed: number that failed.
        failures: images that failed, with the reasons, in the order of failing; on a cluster only
            the first ones.
        untried: number that was left when the run was stopped.
    """

    written: int = 0
    skipped: int = 0
    failed: int = 0
    failures: list[tuple[AnyPath, str]] = dataclasses.field(default_factory=list)
    untried: int = 0

    def summarize(self, place: str) -> str:
        """Return one line.

        Args:
            place: where results were written to.
        """
        parts = [f"{self.written} written to {place}"]
        counts = {"skipped": self.skipped, "failed": self.failed, "not tried": self.untried}
        return ", ".join(parts + [f"{count} {word}" for word, count in counts.items() if count])


class Run:
    """Adds each image to a report, and shows the progress.

    Args:
        segment: called with each image.
        images: number of all images, for the progress bar.
    """

    def __init__(self, segment: SegmentImage, images: int, report: Report) -> None:
        self._segment = segment
        self._report = report
        self._stopped = False
        self._bar = tqdm(total=images, unit="image", disable=not sys.stderr.isatty())

    async def process(self, target: Target) -> None:
        """Segment an image, unless the run was stopped."""
        if self._stopped:
            self._report.untried += 1
            return
        try:
            if await self._segment(target):
                self._report.written += 1
            else:
                self._report.skipped += 1
        except ServiceError as error:
            self._fail(target, describe_error(error))
        except CommandError as error:
            self._fail(target, str(error))
            self._stopped = self._stopped or isinstance(error, RunStopped)
        finally:
            self._bar.update()

    def _fail(self, target: Target, reason: str) -> None:
        self._report.failed += 1
        self._report.failures.append((target.image, reason))

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()
