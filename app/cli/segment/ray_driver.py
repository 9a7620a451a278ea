"""Segments a folder on a Ray cluster: plans it, gives its images to actors, and counts the results.

Ray Data distributes names; the actors read images and write results themselves. It keeps the actors
busy, replaces those that die, and gives their images to others.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import ray
from ray.exceptions import RayError
from tqdm import tqdm

from app.cli.errors import CommandError
from app.cli.segment import storage
from app.cli.segment.folder import Folder, plan_folder
from app.cli.segment.ray_actor import FAILED, ONLY_PAGE, SKIPPED, SegmentActor
from app.cli.segment.results import TABLE_NAME, Measurements, Work, write_table
from app.cli.segment.run import Report
from app.cli.segment.storage import AnyPath
from app.cli.segment.wording import describe_error
from app.errors import ServiceError
from app.inference.outputs import Output
from app.inference.service import check_model
from app.settings import Settings
from model.checkpoint import SUFFIX, load_checkpoint

log = logging.getLogger(__name__)

FAILURES_NAME = "failures.jsonl"
"""The images that failed, in the folder of the results: a JSON object per line."""

_LARGEST_BLOCK = 256
"""Images that an actor gets at once, at most: the work that is repeated if it dies."""
_BLOCKS_PER_ACTOR = 8
"""Number into which a small folder is cut, so that all actors finish at about the same time."""
_CALLS = 2
"""Blocks that an actor works on at once."""
_MAX_THREADS = 4
"""Threads of an actor, at most, where the settings do not say how many."""
_SHOWN_FAILURES = 20
_PUBLISH_SECONDS = 10.0
"""Between two versions of the list of failures, and two lines of progress."""


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Which cluster is used, and how much of it.

    Attributes:
        address: of a Ray cluster; "local" starts one on this machine.
        actors: number of engines; None takes as many as the cluster has room for.
        gpus: of an actor, also a fraction; None is one if the settings ask for CUDA.
    """

    address: str
    actors: int | None = None
    gpus: float | None = None


def segment_on_ray(
    options: ClusterOptions, settings: Settings, folder: Folder, work: Work, report: Report
) -> None:
    """Segment the images of a folder, and add them to the report.

    Raises:
        UserError: the folder cannot be planned, or an engine cannot be used.
    """
    _check(settings, work)
    names, measured = _plan(folder, work, report)
    if len(names):
        _connect(options.address)
        try:
            with _FailureList(folder.out / FAILURES_NAME) as failures:
                _segment(options, settings, folder, work, names, report, measured, failures)
        except RayError as error:
            raise CommandError(f"the cluster failed: {_find_reason(error)}") from error
        finally:
            ray.shutdown()
    if measured:
        table = folder.out / TABLE_NAME
        write_table(table, lambda: _list_measurements(folder, work, measured), work.all_pages)


def _check(settings: Settings, work: Work) -> None:
    """Check that the model exists and can do the work, before the folder is read.

    Raises:
        UserError: it does not, or cannot.
    """
    check_model(settings)
    checkpoint = load_checkpoint(settings.weights_dir / f"{settings.model}{SUFFIX}")
    try:
        work.options.check(checkpoint.preprocess)
    except ServiceError as error:
        raise CommandError(describe_error(error)) from error


def _plan(folder: Folder, work: Work, report: Report) -> tuple[pa.Array, dict[bytes, list[int]]]:
    """The names of the images to segment, as bytes, and the pages with measurements of others."""
    has_table = Output.MEASUREMENTS in work.options.outputs
    names: list[bytes] = []
    measured: dict[bytes, list[int]] = {}
    for image in plan_folder(folder, work, TABLE_NAME if has_table else None):
        name = os.fsencode(image.name)  # names need not be valid UTF-8
        if not image.done:
            names.append(name)
            continue
        report.skipped += 1
        if has_table:
            measured[name] = [ONLY_PAGE]
    if not names and not report.skipped:
        raise CommandError(f"no images in {folder.source}")
    return pa.array(names, pa.binary()), measured


def _connect(address: str) -> None:
    """Connect to a cluster.

    Raises:
        CommandError: it cannot be reached.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        quiet["include_dashboard"] = False
    try:
        ray.init(address, **quiet)
    except Exception as error:  # Ray raises this very class, too
        raise CommandError(f"--ray {address}: {error}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _segment(
    options: ClusterOptions,
    settings: Settings,
    folder: Folder,
    work: Work,
    names: pa.Array,
    report: Report,
    measured: dict[bytes, list[int]],
    failures: _FailureList,
) -> None:
    settings, resources, actors = _fit(options, settings)
    blocks = _cut(names, actors)
    dataset = ray.data.from_arrow(blocks).map_batches(
        SegmentActor,
        fn_constructor_args=(
            settings, work, _absolute(folder.source), _absolute(folder.out), folder.keep_suffix,
        ),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=min(actors, len(blocks)),
            max_tasks_in_flight_per_actor=_CALLS + 1,
            max_concurrent_calls_per_actor=_CALLS,
            enable_true_multi_threading=True,
        ),
        **resources,
    )  # fmt: skip
    progress = _Progress(len(names))
    try:
        for table in dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            for row in table.to_pylist():
                _count(row, folder, report, measured, failures)
            failures.publish()
            progress.advance(len(table))
    finally:
        progress.close()


def _fit(options: ClusterOptions, settings: Settings) -> tuple[Settings, dict[str, float], int]:
    """The settings of each actor, the resources it takes, and the number of actors."""
    gpus = options.gpus
    if gpus is None:
        gpus = 1.0 if settings.device.startswith("cuda") else 0.0
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    threads = settings.threads or max(
        1, min(_MAX_THREADS, int(max(node.get("CPU", 0) for node in nodes)))
    )
    room = sum(
        int(min(
            node.get("CPU", 0) // threads, node.get("GPU", 0) // gpus if gpus else math.inf
        ))
        for node in nodes
    )  # fmt: skip
    if not room:
        log.warning(
            "no node has %d CPUs and %g GPUs; waiting until the cluster grows", threads, gpus
        )
    fitted = settings.model_copy(
        update={
            "threads": threads,
            "image_workers": settings.image_workers or threads,
            "device": "cuda" if gpus else "cpu",
            "weights_dir": settings.weights_dir.absolute(),
            "api_keys": (),
        }
    )
    return fitted, {"num_cpus": threads, "num_gpus": gpus}, options.actors or max(1, room)


def _cut(names: pa.Array, actors: int) -> list[pa.Table]:
    """Cut the names into blocks, each of which is a call of an actor."""
    size = math.ceil(len(names) / (actors * _BLOCKS_PER_ACTOR))
    size = max(1, min(_LARGEST_BLOCK, size))
    return [
        # A copy: a slice would be sent with all names.
        pa.table({"name": names.take(pa.array(range(start, min(start + size, len(names)))))})
        for start in range(0, len(names), size)
    ]


def _absolute(location: AnyPath) -> str:
    return str(location.absolute())


def _count(
    row: Mapping[str, Any],
    folder: Folder,
    report: Report,
    measured: dict[bytes, list[int]],
    failures: _FailureList,
) -> None:
    if row["measured"]:
        measured[row["name"]] = row["measured"]
    if row["outcome"] == FAILED:
        name = os.fsdecode(row["name"])
        report.failed += 1
        if len(report.failures) < _SHOWN_FAILURES:
            report.failures.append((folder.source / name, row["reason"]))
        failures.add(name, row["reason"])
    elif row["outcome"] == SKIPPED:
        report.skipped += 1
    else:
        report.written += 1


def _list_measurements(
    folder: Folder, work: Work, measured: Mapping[bytes, list[int]]
) -> Measurements:
    """The table of each image, in the order of `sources.py`."""
    ending = work.endings[Output.MEASUREMENTS]
    for name in sorted(measured, key=lambda name: PurePosixPath(os.fsdecode(name)).parts):
        target = folder.target(os.fsdecode(name))
        for page in sorted(measured[name]):
            number = {"page": max(page, 0)} if work.all_pages else {}
            path = target.locate(ending, None if page == ONLY_PAGE else page)
            yield path, {"image": target.name, **number}


def _find_reason(error: BaseException) -> str:
    """The last line of an error, whose text holds the traceback of the actor."""
    return str(error).strip().splitlines()[-1]


class _Progress:
    """Shows images, images/s and the time left: as a bar on a terminal, otherwise as lines.

    The time until the first images are done, in which actors load the model, does not count.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = self._first = 0
        self._start = self._shown = 0.0
        self._bar: tqdm[Any] | None = None

    def advance(self, images: int) -> None:
        now = time.monotonic()
        self._done += images
        if self._bar is None:
            self._first, self._start, self._shown = images, now, now
            disable = not sys.stderr.isatty()
            self._bar = tqdm(initial=images, total=self._total, unit="image", disable=disable)
            return
        self._bar.update(images)
        if self._bar.disable and now >= self._shown + _PUBLISH_SECONDS:
            self._shown = now
            rate = (self._done - self._first) / (now - self._start)
            left = (self._total - self._done) / rate
            print(
                f"unet: {self._done} of {self._total} images, {rate:.1f} images/s, "
                f"about {left:.0f} s left",
                file=sys.stderr,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _FailureList:
    """Writes the images that failed to a file, again and again as they become more: an object store
    cannot append. Only the last version is complete, but each is valid.

    A list of an earlier run is removed.
    """

    def __init__(self, path: AnyPath) -> None:
        self._path = path
        self._lines = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._unpublished = 0
        self._published = 0.0

    def __enter__(self) -> Self:
        storage.remove(self._path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.publish(now=True)
        self._lines.close()

    def add(self, name: str, reason: str) -> None:
        """Add an image."""
        line = json.dumps({"image": name, "reason": reason}, ensure_ascii=True)
        self._lines.write(line.encode() + b"\n")
        self._unpublished += 1

    def publish(self, *, now: bool = False) -> None:
        """Write the file, if there are new lines and it is time."""
        time_since = time.monotonic() - self._published
        if self._unpublished and (now or time_since >= _PUBLISH_SECONDS):
            self._lines.seek(0)
            storage.write(self._path, self._lines.read())
            self._unpublished, self._published = 0, time.monotonic()
