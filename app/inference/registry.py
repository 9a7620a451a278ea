"""The models that the service has: loading, checking, replacing and freeing them.

A model is served only after it has reproduced its golden mask by the path that requests take. A
changed file is loaded beside the model it replaces, which is served until then; a bad file leaves
that model in service. Knows no HTTP and no queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.batching.call_thread import CallThread
from app.batching.device_worker import DeviceWorker
from app.engine.base import Engine
from app.engine.device_engines import BatchKey, DeviceEngines
from app.engine.selection import EngineChoice, build_engine, resolve
from app.errors import GoldenMaskMismatch, ImageTooLarge, Unavailable, UnknownModel
from app.inference.outputs import Options
from app.inference.statistics import ModelStatistics
from app.metrics import Metrics
from model.arrays import ByteArray
from model.checkpoint import MANIFEST, SUFFIX, Checkpoint, load_checkpoint
from model.config import GOLDEN_IOU, check_name
from model.errors import UserError
from model.evaluation.metrics import Overlap
from model.windows import WindowPlan, plan_windows

log = logging.getLogger(__name__)

MAX_WINDOWS = 10_000
"""Windows of one image. The event loop lists and admits them in one turn, and queues them in
another: 13 and 19 ms (measured)."""

_MAX_PLANS = 256
"""Sizes of images whose windows are remembered."""
_MAX_OPTIONS = 256
"""Options that are checked once."""
_SCAN_SECONDS = 1.0

_loads = itertools.count(1)

Fingerprint = tuple[int, ...]
"""Changes when a checkpoint or its manifest does."""


@dataclasses.dataclass
class ServedModel:
    """A model whose engines are ready.

    Attributes:
        checkpoint: without its weights, which only the engines hold.
        choices: the engine it runs on, one per device.
        golden_iou: of its golden mask with the mask it gave.
        users: requests that use it at the moment. A model that was replaced is freed after the
            last one.
        statistics: of its images.
        engine_id: names its engines. Not the same as `id`: if a file is replaced by another and
            then put back, requests may still use the first model, and must not share engines with
            the third.
    """

    checkpoint: Checkpoint
    choices: Sequence[EngineChoice]
    golden_iou: float = 0.0
    users: int = 0
    statistics: ModelStatistics = dataclasses.field(default_factory=ModelStatistics)
    engine_id: str = ""

    def __post_init__(self) -> None:
        self.engine_id = f"{self.id}#{next(_loads)}"
        # The cache of `plan_windows` hashes the whole configuration at each look-up.
        self._plan_windows = functools.lru_cache(_MAX_PLANS)(
            functools.partial(
                plan_windows,
                architecture=self.checkpoint.architecture,
                preprocess=self.checkpoint.preprocess,
            )
        )
        self._key_of = functools.cache(functools.partial(BatchKey, self.engine_id))
        self._check_options = functools.lru_cache(_MAX_OPTIONS)(
            functools.partial(Options.check, preprocess=self.checkpoint.preprocess)
        )

    @property
    def id(self) -> str:
        """name@hash."""
        return self.checkpoint.id

    def plan(self, height: int, width: int) -> WindowPlan:
        """The windows of an image of this size, counted and not yet listed.

        Raises:
            ImageTooLarge: more windows than `MAX_WINDOWS`.
        """
        if self.checkpoint.preprocess.mode == "resize":
            height, width = self.checkpoint.preprocess.resized
        plan = self._plan_windows(height, width)
        if plan.count > MAX_WINDOWS:
            raise ImageTooLarge(
                f"the image needs {plan.count} windows of this model, {MAX_WINDOWS} are allowed"
            )
        return plan

    def check(self, options: Options) -> None:
        """Check that the model can do what is asked for.

        Raises:
            InvalidRequest: see `Options.check`.
        """
        self._check_options(options)

    def keys(self, plan: WindowPlan) -> list[BatchKey]:
        """The batch key of each window of the plan."""
        return [self._key_of(window.shape) for window in plan.windows]

    @functools.cached_property
    def smallest(self) -> list[BatchKey]:
        """The batch keys of an image of one pixel."""
        return self.keys(self.plan(1, 1))


@dataclasses.dataclass
class ModelEntry:
    """A checkpoint file and the model that was loaded from it.

    Attributes:
        path: of the file; its stem is the name of the model.
        loaded: fingerprint of the file when it was last loaded, successfully or not.
        scanned: fingerprint of the file at the last scan.
        served: the model in service, if there is one.
        error: why the file could not be loaded, or that it is missing.
        missing: the model is in service, and its file was deleted.
    """

    path: Path
    loaded: Fingerprint | None = None
    scanned: Fingerprint | None = None
    served: ServedModel | None = None
    error: str | None = None
    missing: bool = False


GoldenMaskFn = Callable[[ServedModel], Awaitable[ByteArray]]
WrapEngineFn = Callable[[Engine], Engine]
"""Returns the engine to use in place of the one that was built."""


def use_as_built(engine: Engine) -> Engine:
    """Return the same engine."""
    return engine


class Registry:
    """The models by name.

    Args:
        folder: with the checkpoints.
        default: name of the model that is used if a request names none.
        choices: one per device.
        devices: in the order of `choices`.
        workers: of the devices, in the same order.
        golden_mask: segments a model's golden image by the path of requests.
        on_free: called with the `engine_id` of a model whose engines were freed.
        metrics: shows models and reloads.
        wrap_engine: for tests, which inject faults (docs/reliability.md).
    """

    def __init__(
        self,
        folder: Path,
        default: str,
        choices: Sequence[EngineChoice],
        devices: Sequence[DeviceEngines],
        workers: Sequence[DeviceWorker],
        golden_mask: GoldenMaskFn,
        on_free: Callable[[str], object],
        metrics: Metrics,
        wrap_engine: WrapEngineFn = use_as_built,
    ) -> None:
        self.folder = folder
        self.default = default
        self.entries = {path.stem: ModelEntry(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}
        self._choices = choices
        self._devices = devices
        self._workers = workers
        self._golden_mask = golden_mask
        self._on_free = on_free
        self._metrics = metrics
        self._wrap_engine = wrap_engine
        # Not an executor: Python joins its threads at exit, and a model takes long to load.
        self._thread = CallThread("models")

    def entry(self, name: str) -> ModelEntry:
        """The entry of a model.

        Raises:
            UnknownModel: there is no checkpoint of that name.
        """
        if name not in self.entries:
            available = ", ".join(sorted(self.entries))
            raise UnknownModel(f"unknown model {name!r}; available: {available}")
        return self.entries[name]

    @contextmanager
    def lease(self, name: str | None) -> Iterator[ServedModel]:
        """Use a model: it is not freed before the end of the block.

        Args:
            name: of the model; None is the default model.

        Raises:
            UnknownModel: there is no checkpoint of that name.
            Unavailable: the model is still loading, or could not be loaded.
        """
        entry = self.entry(self.default if name is None else name)
        served = entry.served
        if served is None:
            raise Unavailable(entry.error or f"{entry.path.stem} is still loading", retry_after=2)
        served.users += 1
        try:
            yield served
        finally:
            served.users -= 1
            if served.users == 0 and entry.served is not served:
                self._free(served)

    async def load_default(self) -> None:
        """Load the default model.

        Raises:
            CheckpointError, ConfigError, EngineUnavailable, GoldenMaskMismatch: it cannot be
                served.
            ServiceError: its golden image could not be segmented.
        """
        entry = self.entries[self.default]
        try:
            await self._load(entry)
        except Exception as error:
            entry.error = _public_message(error)
            raise

    async def load_others(self) -> None:
        """Load the models that are not loaded. One that cannot be served is reported."""
        for entry in list(self.entries.values()):
            if entry.served is None and entry.error is None:
                await self._reload(entry)

    async def watch(self) -> None:
        """Scan the folder every second. Does not return."""
        while True:
            await asyncio.sleep(_SCAN_SECONDS)
            await self.scan()

    async def scan(self) -> None:
        """Load files that are new or changed.

        A file that has changed since the last scan is left for the next one: it may still be
        copied. A model whose file was deleted stays in service, because a program that copies
        files may delete one for a moment. A file that comes back is loaded again.
        """
        for path in await asyncio.to_thread(lambda: sorted(self.folder.glob(f"*{SUFFIX}"))):
            self.entries.setdefault(path.stem, ModelEntry(path))
        for name, entry in list(self.entries.items()):
            previous = entry.scanned
            entry.scanned = _fingerprint(entry.path)
            if entry.scanned is None:
                if entry.served is not None:
                    if previous is None:
                        _note_missing(entry)
                elif name != self.default:
                    del self.entries[name]
                continue
            if entry.missing:
                entry.missing = False
                log.info("model %s: its file is back, and is loaded again", name)
            if entry.scanned == previous and entry.scanned != entry.loaded:
                result = await self._reload(entry)
                if result is not None:
                    self._metrics.reloads.labels(result).inc()

    def close(self) -> None:
        """Free every model."""
        self._thread.stop()
        for entry in self.entries.values():
            if entry.served is not None:
                self._free(entry.served)
                entry.served = None

    async def _reload(self, entry: ModelEntry) -> str | None:
        """Load a model; if that fails, report it and keep the model in service.

        Returns:
            "accepted", "rejected", or None if the checkpoint is the one in service.
        """
        before = entry.served
        try:
            await self._load(entry)
        except Exception as error:  # no file may affect the other models
            entry.error = _public_message(error)
            log.error("model %s rejected: %s", entry.path.stem, error)
            return "rejected"
        return None if entry.served is before else "accepted"

    async def _load(self, entry: ModelEntry) -> None:
        """Load a model, check its golden mask, and replace the one in service."""
        # Before reading: if the file changes meanwhile, the next scan sees another fingerprint.
        entry.loaded = _fingerprint(entry.path)
        check_name(entry.path.stem)
        checkpoint = await self._thread.call(load_checkpoint, entry.path)
        if entry.served is not None and entry.served.checkpoint.sha256 == checkpoint.sha256:
            entry.error = None
            return
        choices = [resolve(choice, checkpoint) for choice in self._choices]
        served = ServedModel(dataclasses.replace(checkpoint, state={}), choices)
        try:
            await self._build(checkpoint, served)
            await self._check_golden_mask(served, entry.path)
        except BaseException:
            self._free(served)
            raise
        old, entry.served, entry.error = entry.served, served, None
        self._announce(served, old)
        if old is not None and old.users == 0:
            self._free(old)

    async def _build(self, checkpoint: Checkpoint, served: ServedModel) -> None:
        """Build the engines, and warm them on the threads that will run them.

        The devices take turns: while one is being captured, no other call may wait for a device.
        """
        parts = zip(served.choices, self._devices, self._workers, strict=True)
        for choice, device, worker in parts:
            built = await self._thread.call(build_engine, choice, checkpoint)
            engine = self._wrap_engine(built)
            device.engines[served.engine_id] = engine
            for step in engine.warm_steps():
                await worker.call(step)  # batches of other models run between the steps

    async def _check_golden_mask(self, served: ServedModel, path: Path) -> None:
        """Set `golden_iou`.

        Raises:
            GoldenMaskMismatch: it is too low.
        """
        mask = await self._golden_mask(served)
        served.golden_iou = Overlap.of_classes(mask, served.checkpoint.golden.mask).iou
        if served.golden_iou < GOLDEN_IOU:
            raise GoldenMaskMismatch(
                f"{path} does not reproduce its golden mask: IoU {served.golden_iou:.3f}, at least "
                f"{GOLDEN_IOU} is required"
            )

    def _free(self, served: ServedModel) -> None:
        for device, worker in zip(self._devices, self._workers, strict=True):
            engine = device.engines.pop(served.engine_id, None)
            if engine is not None:
                worker.post(engine.close)  # it would wait forever for a device that hangs
        self._on_free(served.engine_id)

    def _announce(self, served: ServedModel, old: ServedModel | None) -> None:
        info = self._metrics.model_info
        if old is not None:
            for choice in old.choices:
                info.remove(*_labels(old, choice))
        for choice in served.choices:
            info.labels(*_labels(served, choice)).set(1)
            log.info(
                "model %s is ready on %s (%s, %s; %s), golden IoU %.4f",
                served.id,
                choice.device,
                choice.backend,
                choice.precision,
                choice.reason,
                served.golden_iou,
            )


def _note_missing(entry: ModelEntry) -> None:
    """Report once that the file of a model in service was deleted."""
    if entry.missing:
        return
    entry.missing, entry.loaded = True, None
    entry.error = f"{entry.path} was deleted; the model is served until the service stops"
    log.warning("model %s: %s", entry.path.stem, entry.error)


def _labels(served: ServedModel, choice: EngineChoice) -> tuple[str, ...]:
    name = served.checkpoint.name
    return name, served.id, choice.backend, choice.device, choice.precision


def _fingerprint(path: Path) -> Fingerprint | None:
    """The fingerprint of a checkpoint; None if the file does not exist.

    It includes the manifest, which is written after the checkpoint: a checkpoint that is read
    between the two does not match its hash, and must be read again once the manifest has changed.
    """
    try:
        fingerprint = _file_fingerprint(path)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fingerprint += _file_fingerprint(path.parent / MANIFEST)
    return fingerprint


def _file_fingerprint(path: Path) -> Fingerprint:
    """Inode and change time as well as time and size: a link may be turned to another file that
    has the same time and size."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size


def _public_message(error: Exception) -> str:
    """The reason that clients may read. Errors of libraries and devices go to the log only."""
    return str(error) if isinstance(error, UserError) else "loading failed; see the server log"
