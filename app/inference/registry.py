"""The models in service: loading, proving, swapping and freeing them.

A model is served only after it reproduced its golden mask through the very path that requests
take. A changed file is loaded beside the old one, and takes its place between two batches; a bad
file leaves the old one where it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from app.batching.call_thread import CallThread
from app.engine.device_engines import BatchKey, DeviceEngines
from app.engine.selection import EngineChoice, build_engine, resolve
from app.errors import GoldenMaskMismatch, Unavailable, UnknownModel
from app.metrics import Metrics
from model.checkpoint import MANIFEST, SUFFIX, Checkpoint, load_checkpoint
from model.config import GOLDEN_IOU, check_name
from model.evaluation.metrics import Overlap
from model.windows import WindowPlan, plan_windows

log = logging.getLogger(__name__)

_RELOAD_SECONDS = 1.0

_loads = itertools.count(1)

Stamp = tuple[int, ...]


@dataclasses.dataclass
class ServedModel:
    """A model that engines are ready for.

    Attributes:
        checkpoint: without its weights; those are the engines' now.
        choices: the engine it runs on, one a device.
        golden_iou: what its proof gave.
        users: requests that hold it at the moment; it is freed after the last.
        engine_id: names its engines. Not `id`: a file may come back while requests still hold the
            model it was before, and they must not share engines that one of them frees.
    """

    checkpoint: Checkpoint
    choices: Sequence[EngineChoice]
    golden_iou: float = 0.0
    users: int = 0
    engine_id: str = ""

    def __post_init__(self) -> None:
        self.engine_id = f"{self.id}#{next(_loads)}"

    @property
    def id(self) -> str:
        return self.checkpoint.id

    def plan(self, height: int, width: int) -> WindowPlan:
        """The windows of an image of this size."""
        if self.checkpoint.preprocess.mode == "resize":
            height, width = self.checkpoint.preprocess.resized
        return plan_windows(height, width, self.checkpoint.architecture, self.checkpoint.preprocess)

    def keys(self, plan: WindowPlan) -> list[BatchKey]:
        """Of its windows, in their order."""
        return [BatchKey(self.engine_id, window.shape) for window in plan.windows]


@dataclasses.dataclass
class ModelEntry:
    """A name clients may ask for, and what became of its file.

    Attributes:
        stamp: of the file as it was loaded last, or tried.
        seen: of the file at the last look.
    """

    path: Path
    stamp: Stamp | None = None
    seen: Stamp | None = None
    served: ServedModel | None = None
    error: str | None = None


GoldenMaskFn = Callable[[ServedModel], Awaitable[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]]


class Registry:
    """Names -> models.

    Args:
        folder: of the checkpoints.
        default: name of the model that serves when none is asked for.
        choices: one a device.
        workers: the devices, in the order of `choices`.
        prove: gives the mask of a model's golden image by the path of requests.
        metrics: where models and reloads are shown.
    """

    def __init__(
        self,
        folder: Path,
        default: str,
        choices: Sequence[EngineChoice],
        workers: Sequence[DeviceEngines],
        prove: GoldenMaskFn,
        metrics: Metrics,
    ) -> None:
        self.folder = folder
        self.default = default
        self.entries = {path.stem: ModelEntry(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}
        self._choices = choices
        self._workers = workers
        self._prove = prove
        self._metrics = metrics
        # Not an executor: those are joined at the end, and a model takes long to load.
        self._thread = CallThread("models")

    def entry(self, name: str) -> ModelEntry:
        """
        Raises:
            UnknownModel: no checkpoint of that name.
        """
        if name not in self.entries:
            known = ", ".join(sorted(self.entries))
            raise UnknownModel(f"there is no model {name!r} here; there is {known}")
        return self.entries[name]

    @contextmanager
    def lease(self, name: str | None) -> Iterator[ServedModel]:
        """Hold the model of that name (None: the default) while a request uses it.

        Raises:
            UnknownModel: no checkpoint of that name.
            Unavailable: it is there, but not (or not yet) fit to serve.
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
        """Load and prove the default model.

        Raises:
            CheckpointError, ConfigError, EngineUnavailable, GoldenMaskMismatch: it cannot serve.
            ServiceError: what its proof met instead of a mask.
        """
        entry = self.entries[self.default]
        try:
            await self._load(entry)
        except Exception as error:
            entry.error = str(error)
            raise

    async def load_others(self) -> None:
        """Load what is not loaded yet; a file that is no good is reported and left out."""
        for entry in list(self.entries.values()):
            if entry.served is None and entry.error is None:
                await self._try(entry)

    async def watch(self) -> None:
        """Take in changed and new files, for ever."""
        while True:
            await asyncio.sleep(_RELOAD_SECONDS)
            await self.scan()

    async def scan(self) -> None:
        """Take in files that are new or changed, and have not changed since the last look: one
        that is being copied is left alone. A model whose file is gone goes on serving."""
        for path in await asyncio.to_thread(lambda: sorted(self.folder.glob(f"*{SUFFIX}"))):
            self.entries.setdefault(path.stem, ModelEntry(path))
        for name, entry in list(self.entries.items()):
            last, entry.seen = entry.seen, _stamp(entry.path)
            if entry.seen is None and entry.served is None and name != self.default:
                del self.entries[name]
            elif entry.seen not in (None, entry.stamp) and entry.seen == last:
                await self._try(entry)

    def close(self) -> None:
        self._thread.end()
        for entry in self.entries.values():
            if entry.served is not None:
                self._free(entry.served)
                entry.served = None

    async def _try(self, entry: ModelEntry) -> None:
        before = entry.served
        try:
            await self._load(entry)
        except Exception as error:  # whatever a file does, the other models go on serving
            entry.error = str(error)
            self._metrics.reloads.labels("rejected").inc()
            log.error("model %s is not taken in: %s", entry.path.stem, error)
        else:
            if entry.served is not before:
                self._metrics.reloads.labels("accepted").inc()

    async def _load(self, entry: ModelEntry) -> None:
        # Before reading: a file that changes meanwhile has another stamp, and is read again.
        entry.stamp = _stamp(entry.path)
        check_name(entry.path.stem)
        checkpoint = await self._thread.call(load_checkpoint, entry.path)
        if entry.served is not None and entry.served.checkpoint.sha256 == checkpoint.sha256:
            entry.error = None
            return
        choices = [resolve(choice, checkpoint) for choice in self._choices]
        served = ServedModel(dataclasses.replace(checkpoint, state={}), choices)
        try:
            await self._thread.call(self._build, checkpoint, served)
            mask = await self._prove(served)
            served.golden_iou = Overlap.of_classes(mask, checkpoint.golden.mask).iou
            if served.golden_iou < GOLDEN_IOU:
                raise GoldenMaskMismatch(
                    f"{entry.path} does not reproduce its golden mask: IoU "
                    f"{served.golden_iou:.3f}, at least {GOLDEN_IOU} is asked for"
                )
        except BaseException:
            self._free(served)
            raise
        old, entry.served, entry.error = entry.served, served, None
        self._announce(served, old)
        if old is not None and old.users == 0:
            self._free(old)

    def _build(self, checkpoint: Checkpoint, served: ServedModel) -> None:
        for choice, worker in zip(served.choices, self._workers, strict=True):
            engine = build_engine(choice, checkpoint)
            engine.warm()
            worker.engines[served.engine_id] = engine

    def _free(self, served: ServedModel) -> None:
        for worker in self._workers:
            engine = worker.engines.pop(served.engine_id, None)
            if engine is not None:
                engine.close()

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


def _labels(served: ServedModel, choice: EngineChoice) -> tuple[str, ...]:
    name = served.checkpoint.name
    return name, served.id, choice.backend, choice.device, choice.precision


def _stamp(path: Path) -> Stamp | None:
    """What changes when a file or its manifest does; None when the file is gone.

    The manifest is written after the file. Seen between the two, a checkpoint has the wrong hash;
    with the manifest's own change it is looked at again. A link may be turned to another file of
    the same size and time: its number and the time of its entry tell them apart.
    """
    try:
        stamp = _changes(path)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        stamp += _changes(path.parent / MANIFEST)
    return stamp


def _changes(path: Path) -> Stamp:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size
