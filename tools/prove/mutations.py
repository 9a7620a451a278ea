"""Damaged images through the real decoder path: every call ends with a result or an `ImageError`.

The images go through the pool of image workers, by the two calls that a request makes: reading the
header, then decoding and preparing. The process of this experiment is in the place of the service.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator

from app.batching.deadline import Deadline
from app.errors import ImageError, RequestTooLarge
from app.imaging.workers.pool import WorkerPool
from app.imaging.workers.shared import BlockCache
from app.imaging.workers.worker import KillReason
from app.inference import steps
from app.inference.limits import decoding_limit
from app.inference.steps import EncodedImage, decode_and_prepare, inspect_image
from model.checkpoint import load_checkpoint
from model.config import PreprocessConfig
from tools.prove.images import Mutator, build_corpus
from tools.prove.report import Row, at_least, at_most, equal, format_counts, none_of, noted
from tools.prove.subject import WEIGHTS

SEED = 20260101
MINIMUM = 50_000
"""Images in any run."""
_ACCEPTED = ("JPEG", "PNG", "TIFF", "WebP", "BMP", "GIF", "AVIF", "JPEG 2000")
_MAX_PIXELS = 100_000_000
_OVERHEAD_S = 1.0
"""Time for a call besides its limit: to kill the process, and to be scheduled on a busy machine."""


class Trial:
    """Sends images to a pool, and counts the outcomes.

    Attributes:
        outcomes: number of images by outcome: decoded, or the class of the error.
        unexpected: errors of other classes.
        late: calls that exceeded their limit and were not stopped in time.
        slowest: seconds of the slowest call.
        kills: number of processes by the reason of their end.
        restarts: number of processes that replaced one.
    """

    def __init__(self, workers: int, preprocess: PreprocessConfig) -> None:
        self.outcomes: Counter[object] = Counter()
        self.unexpected: list[str] = []
        self.late: list[str] = []
        self.slowest = 0.0
        self.kills: Counter[object] = Counter()
        self.restarts = 0
        self._preprocess = preprocess
        self._blocks = BlockCache()
        self.pool = WorkerPool(
            workers,
            (steps.__name__,),
            on_kill=lambda reason: self.kills.update([str(reason)]),
            on_restart=self._count_restart,
        )

    def _count_restart(self) -> None:
        self.restarts += 1

    async def submit(self, name: str, image: bytes) -> bool:
        """Inspect, decode and prepare one image; returns whether it was decoded."""
        start = time.monotonic()
        page = 1 if name.endswith("pages") else None
        limit = decoding_limit(0, Deadline.never())
        seconds, decoded = limit.seconds, False
        try:
            with self._blocks.borrow() as source, self._blocks.borrow() as pixels:
                source.write(image)
                data = EncodedImage(source, len(image))
                header = await self.pool.call(limit, inspect_image, data, _MAX_PIXELS, page)
                limit = decoding_limit(header["width"] * header["height"], Deadline.never())
                seconds += limit.seconds
                await self.pool.call(
                    limit, decode_and_prepare, data, header, self._preprocess, pixels, None
                )
                outcome, decoded = "decoded", True
        except (ImageError, RequestTooLarge) as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = type(error).__name__
            self.unexpected.append(f"{name}: {str(error).strip().splitlines()[-1][:200]}")
        self.outcomes[outcome] += 1
        elapsed = time.monotonic() - start
        self.slowest = max(self.slowest, elapsed)
        if elapsed > seconds + _OVERHEAD_S:
            self.late.append(f"{name}: {elapsed:.1f} s")
        return decoded


def run(seconds: float) -> list[Row]:
    """Send at least `MINIMUM` images, and more until the time is over."""
    return asyncio.run(_run(seconds))


async def _run(seconds: float) -> list[Row]:
    start = time.monotonic()
    workers = os.cpu_count() or 1
    checkpoint = await asyncio.to_thread(load_checkpoint, WEIGHTS / "nuclei.safetensors")
    trial = Trial(workers, checkpoint.preprocess)
    trial.pool.start()
    try:
        corpus = build_corpus(SEED)
        accepted = {name: data for name, data in corpus.items() if await trial.submit(name, data)}
        if trial.kills or trial.unexpected:
            raise RuntimeError(f"valid images: {trial.kills}, {trial.unexpected}")
        trial.outcomes.clear()
        trial.slowest = 0.0
        mutated = _mutate(accepted)
        formats: Counter[object] = Counter()

        async def send_images() -> None:
            for name, image in mutated:
                formats[name.partition(",")[0]] += 1
                await trial.submit(name, image)
                if formats.total() >= MINIMUM and time.monotonic() > start + seconds:
                    return

        await asyncio.gather(*(send_images() for _ in range(2 * workers)))
        await _wait_for_replacements(trial)
        running = trial.pool.running
    finally:
        await trial.pool.stop()
    return _report(trial, formats, len(accepted), running, time.monotonic() - start)


def _mutate(corpus: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """An endless sequence of damaged images, with each format in turn."""
    mutator = Mutator(corpus, SEED)
    by_format: dict[str, list[str]] = {}
    for name in corpus:
        by_format.setdefault(name.partition(",")[0], []).append(name)
    names = [itertools.cycle(group) for group in by_format.values()]
    for group in itertools.cycle(names):
        name = next(group)
        yield name, mutator.mutate(corpus[name])


async def _wait_for_replacements(trial: Trial) -> None:
    for _ in range(600):
        if trial.restarts == trial.kills.total():
            return
        await asyncio.sleep(0.05)


def _report(
    trial: Trial, formats: Counter[object], variants: int, running: int, seconds: float
) -> list[Row]:
    missing = [name for name in _ACCEPTED if name not in formats]
    return [
        at_least("damaged images", formats.total(), MINIMUM),
        noted("of each format", format_counts(formats)),
        noted("valid images they were made from", variants),
        none_of("formats without images", missing),
        noted("outcomes", format_counts(trial.outcomes)),
        none_of("outcomes that are not an answer to the client", trial.unexpected),
        none_of("calls beyond their limit of time", trial.late),
        noted("slowest image", f"{trial.slowest:.2f} s"),
        noted("workers killed, by reason", format_counts(trial.kills)),
        at_most("crashes of a decoder", trial.kills[str(KillReason.CRASH)], 0),
        equal("workers replaced", trial.restarts, trial.kills.total()),
        equal("workers at the end", running, trial.pool.size),
        noted("images per second", f"{formats.total() / seconds:.0f}"),
    ]
