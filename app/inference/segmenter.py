"""One image through the whole pipeline, from its bytes to its outputs.

::

    bytes ─ inspect ─▶ size ─ admit ─▶ reservation
          ─ decode ──▶ pixels ─ submit ─▶ windows ─ engines, blend ─▶ probabilities
          ─ decide ──▶ mask ─ render ─▶ outputs

The header of an image gives its size, and so its number of windows: it is admitted or rejected
before it is decoded, unless it is small and sure to be admitted. Image workers, which are
processes, inspect, decode, prepare, decide and render (`app.inference.steps`). Threads blend
windows. The event loop only moves an image from one step to the next. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np

from app.batching.batcher import Batcher
from app.batching.deadline import Deadline
from app.engine.device_engines import WindowJob
from app.imaging.bounds import check_size
from app.imaging.workers.pool import WorkerPool
from app.imaging.workers.shared import BlockCache, SharedBlock, StoredArray
from app.imaging.workers.worker import CallLimit
from app.inference.budget import Budget
from app.inference.image_group import ImageGroup
from app.inference.outputs import Options, Rendered, Segmentation
from app.inference.progress import ProgressLog
from app.inference.registry import ServedModel
from app.inference.steps import (
    EncodedImage,
    Stitched,
    count_image_pages,
    decode_and_prepare,
    inspect_and_decode,
    inspect_image,
    join_pages,
    prepare_image,
    render_outputs,
    write_mask,
)
from app.metrics import Metrics
from model.arrays import AnyArray, ByteArray, FloatArray, Probabilities, Shape
from model.config import PreprocessConfig
from model.windows import Stitcher, WindowPlan, to_floats

T = TypeVar("T")

DECODING_SECONDS, RENDERING_SECONDS = 5.0, 10.0
"""Limits for a small image, on a machine whose processors are all busy."""
_SMALL_PIXELS = 1_000_000
"""Most pixels of an image that is decoded in the call that reads its header."""
_QUICK_COPY = 1 << 21
"""Bytes that the event loop copies itself: it takes less time than a change of thread."""
_QUICK_BLEND = 1 << 18
"""Bytes of a window that the event loop blends itself. Blending takes several times as long."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The result for one image as arrays.

    Attributes:
        mask: (H, W) uint8 of the upright image: 0 and 255, or class indices.
        probabilities: (out_channels, H, W) float32, if they were asked for.
    """

    mask: ByteArray
    probabilities: FloatArray | None


class StageTimer:
    """Measures stages that run one after the other.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Start to measure a stage."""
        self._start = time.perf_counter()

    def record(self, stage: str) -> None:
        """Record the stage that was measured and start the next one."""
        now = time.perf_counter()
        self.add({stage: now - self._start})
        self._start = now

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add to the seconds of stages."""
        for stage, duration in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + duration


@dataclasses.dataclass(frozen=True)
class ImageJob:
    """One image, and what is needed of it.

    Attributes:
        model: segments the image.
        source: the encoded image, or its pixels: (H, W) or (H, W, C), uint8 or uint16.
        threshold: of the mask; None is the model's own.
        page, channel: of the file, from 0; None for the only page and for all colours.
        percentiles: for the contrast of the image; None are the model's own.
        needs_image: the outputs need the decoded image.
        needs_full_probabilities: the outputs need the probabilities at the size of the image.
        needs_all_channels: the outputs need every channel of a binary model, not only the first.
        group: of the request, if it has several images.
        timer: started when the job was created.
    """

    model: ServedModel
    source: bytes | AnyArray
    threshold: float | None = None
    page: int | None = None
    channel: int | None = None
    percentiles: tuple[float, float] | None = None
    needs_image: bool = False
    needs_full_probabilities: bool = False
    needs_all_channels: bool = False
    group: ImageGroup | None = None
    timer: StageTimer = dataclasses.field(default_factory=StageTimer)

    @property
    def preprocess(self) -> PreprocessConfig:
        """The preprocessing of the model, with the percentiles of the job."""
        own = self.model.checkpoint.preprocess
        if self.percentiles is None:
            return own
        return dataclasses.replace(own, percentiles=self.percentiles)

    @property
    def channels(self) -> int:
        """How many of the model's channels are blended."""
        if self.preprocess.binary and not self.needs_all_channels:
            return 1
        return self.model.checkpoint.architecture.out_channels


Finish = Callable[[Stitched, CallLimit], Awaitable[T]]
"""Makes the result from the blended probabilities."""


class Segmenter:
    """Runs images through decoding, the batcher, blending and rendering.

    Args:
        batcher: computes windows.
        workers: processes that decode, prepare, render and encode.
        pool: threads that blend windows and copy large blocks.
        max_pixels: of one image.
        pixels: budget of the decoded images of all requests.
        metrics: records stages, images and missed deadlines.
    """

    def __init__(
        self,
        batcher: Batcher[WindowJob, Probabilities],
        workers: WorkerPool,
        pool: Executor,
        *,
        max_pixels: int,
        pixels: Budget,
        metrics: Metrics,
    ) -> None:
        self._batcher = batcher
        self._workers = workers
        self._blocks = BlockCache()
        self._pool = pool
        self._max_pixels = max_pixels
        self._pixels = pixels
        self._metrics = metrics

    def close(self) -> None:
        """Free the shared memory that is kept for reuse."""
        self._blocks.close()

    @staticmethod
    def check(model: ServedModel, options: Options) -> None:
        """Check that the model can do what is asked for.

        Raises:
            InvalidRequest: see `Options.check`.
        """
        options.check(model.checkpoint.preprocess)

    def precheck_admission(self, model: ServedModel, deadline: Deadline) -> None:
        """Reject a request before its image is read, if not even the smallest image would fit.

        Raises:
            RequestRejected: the queue is full, or the deadline cannot be met.
        """
        with self._batcher.admit(model.keys(model.plan(1, 1)), deadline=deadline):
            pass  # the image itself is admitted once its size is known

    def group(self, model: ServedModel) -> ImageGroup:
        """The group for the images of one request."""
        windows = 2 * sum(choice.max_batch for choice in model.choices)  # on a device, and prepared
        return ImageGroup(windows + 2 * self._workers.size, self._pixels.limit / 4)

    async def size(self, image: bytes | AnyArray) -> Shape:
        """(height, width) of an upright image, encoded or decoded.

        Raises:
            ImageError: not an image, an unsupported format, or too large.
        """
        if isinstance(image, bytes):
            with self._blocks.borrow() as block:
                data = await self._share(image, block)
                assert isinstance(data, EncodedImage)
                header = await self._inspect(data, None, None, Deadline.never())
            return header["height"], header["width"]
        height, width = image.shape[:2]
        check_size(height, width, self._max_pixels)
        return height, width

    async def count_pages(self, data: bytes) -> int:
        """Count the pages of an encoded image: several in a TIFF, one in other formats.

        Raises:
            ImageError: a damaged TIFF.
            ImageTooLarge: its pages have more pixels together than one image may have.
        """
        with self._blocks.borrow() as block:
            encoded = await self._share(data, block)
            limit = decoding_limit(0, Deadline.never())
            pages: int = await self._workers.call(
                limit, count_image_pages, encoded, self._max_pixels
            )
        return pages

    async def segment(
        self,
        model: ServedModel,
        data: bytes,
        options: Options,
        deadline: Deadline,
        group: ImageGroup | None = None,
    ) -> Segmentation:
        """Segment one encoded image; all outputs come from one inference.

        Args:
            group: of the request, if it has several images.

        Raises:
            ImageError: the bytes are not an image that is accepted.
            RequestRejected: the queue is full, or the deadline passed or cannot be met.
            InvalidRequest: see `Options.check`, or a file format cannot hold an output.
            EngineError: the engine failed.
        """
        self.check(model, options)
        job = ImageJob(
            model,
            data,
            options.threshold,
            options.page,
            options.channel,
            options.percentiles,
            needs_image=options.needs_image,
            needs_full_probabilities=options.needs_full_probabilities,
            needs_all_channels=options.needs_objects,
            group=group,
        )

        async def render(stitched: Stitched, limit: CallLimit) -> Segmentation:
            with self._blocks.borrow() as outputs:
                fields = await self._workers.call(limit, render_outputs, stitched, options, outputs)
                job.timer.add(fields["seconds"])
                rendered, start = {}, 0
                for output, (media_type, suffix, size) in zip(
                    options.outputs, fields["rendered"], strict=True
                ):
                    content = await self._copy(size, outputs.read, size, start)
                    rendered[output] = Rendered(content, media_type, suffix)
                    start += size
            return Segmentation(**fields | {"rendered": rendered, "seconds": job.timer.seconds})

        result = await self._run_until(deadline, job, render)
        self._count(job, result.height, result.width)
        return result

    async def stack_tiffs(self, files: Sequence[bytes], pixels: int, deadline: Deadline) -> bytes:
        """Join TIFFs that `segment` made, in their order, to one with all pages.

        Args:
            pixels: of all files together.

        Raises:
            RequestRejected: the deadline passed.
        """
        with self._blocks.borrow() as pages, self._blocks.borrow() as stack:
            end = 0
            for file in files:
                end = await self._copy(len(file), pages.write, file, end)
            sizes = [len(file) for file in files]
            limit = rendering_limit(pixels, deadline)
            size: int = await self._workers.call(limit, join_pages, pages, sizes, stack)
            return await self._copy(size, stack.read, size)

    async def predict(
        self,
        model: ServedModel,
        image: bytes | AnyArray,
        deadline: Deadline,
        *,
        threshold: float | None = None,
        probabilities: bool = True,
        group: ImageGroup | None = None,
    ) -> Prediction:
        """Segment one image and return arrays.

        Args:
            image: encoded, or decoded: (H, W) or (H, W, C), uint8 or uint16.
            threshold: of the mask; None is the model's own.
            probabilities: return them too.
            group: of the request, if it has several images.

        Raises:
            ImageError: the bytes are not an image that is accepted, or it is too large.
            RequestRejected: the queue is full, or the deadline passed or cannot be met.
            InvalidRequest: the model does not use a threshold.
            EngineError: the engine failed.
        """
        self.check(model, Options(threshold=threshold))
        if not isinstance(image, bytes):
            await self.size(image)

        job = ImageJob(
            model,
            image,
            threshold,
            needs_full_probabilities=probabilities,
            needs_all_channels=probabilities,
            group=group,
        )
        result = await self._run_until(deadline, job, self._predict_with(job))
        self._count(job, *result.mask.shape)
        return result

    async def golden_mask(self, model: ServedModel) -> ByteArray:
        """Segment the model's golden image by the path of requests.

        It is admitted even if the queue is full, and is not counted as a request.
        """
        job = ImageJob(model, model.checkpoint.golden.image)
        finish = self._predict_with(job)
        prediction = await self._run(job, finish, Deadline.never(), ignore_capacity=True)
        return prediction.mask

    def _predict_with(self, job: ImageJob) -> Finish[Prediction]:
        async def finish(stitched: Stitched, limit: CallLimit) -> Prediction:
            shape = stitched.height, stitched.width
            full = (job.channels, *shape)
            with self._blocks.borrow() as mask, self._blocks.borrow() as resized:
                resize = stitched.full and stitched.probabilities.shape != full
                result = await self._workers.call(
                    limit, write_mask, stitched, mask, resized if resize else None
                )
                job.timer.add(result["seconds"])
                probabilities = (
                    StoredArray(resized, full, "<f4") if resize else stitched.probabilities
                )
                return Prediction(
                    await self._load(StoredArray(mask, shape, "|u1")),
                    to_floats(await self._load(probabilities)) if stitched.full else None,
                )

        return finish

    async def _run_until(self, deadline: Deadline, job: ImageJob, finish: Finish[T]) -> T:
        """Run a client's job, and count it."""
        count = self._metrics.rejected.labels("deadline").inc
        start = time.perf_counter()
        try:
            async with deadline.enforced("the deadline passed before the mask was ready", count):
                result = await self._run(job, finish, deadline)
        except BaseException:  # a client that disconnects cancels its job
            job.model.statistics.count_failure(time.perf_counter() - start)
            raise
        job.model.statistics.count_image(time.perf_counter() - start, job.timer.seconds)
        return result

    async def _run(
        self,
        job: ImageJob,
        finish: Finish[T],
        deadline: Deadline,
        *,
        ignore_capacity: bool = False,
    ) -> T:
        """Take an image through every step. Whatever ends this early frees all that it holds."""
        with contextlib.ExitStack() as held, contextlib.ExitStack() as reading:
            source = await self._share(job.source, reading.enter_context(self._blocks.borrow()))
            pixels = held.enter_context(self._blocks.borrow())
            image = held.enter_context(self._blocks.borrow()) if job.needs_image else None
            opened: dict[str, Any] = {}
            if isinstance(source, EncodedImage):
                opened = await self._open(job, source, pixels, image, deadline)
                header = opened["header"]
                height, width, pages = header["height"], header["width"], header["pages"]
                pixel_size = header["pixel_size"]
            else:
                height, width = source.shape[:2]
                pages, pixel_size = 1, None
            plan = job.model.plan(height, width)
            if job.group is not None:
                await job.group.enter(height * width)
                held.callback(job.group.leave, height * width)
            allocation = held.enter_context(self._pixels.allocate())
            reservation = held.enter_context(
                self._batcher.admit(
                    job.model.keys(plan),
                    deadline=deadline,
                    share=None if job.group is None else job.group.share,
                    ignore_capacity=ignore_capacity,
                )
            )
            if not ignore_capacity:
                allocation.grow(height * width)
            if "pixels" not in opened:
                opened = await self._prepare(job, source, opened, pixels, image, deadline)
            reading.close()
            prepared = StoredArray(pixels, tuple(opened["pixels"]), "|u1")
            stored_image = None if image is None else _stored_image(image, *opened["image"])
            job.timer.record("decode")
            shape = plan.rows.length, plan.columns.length, len(job.preprocess.mean)
            array = np.broadcast_to(prepared.map(), shape)
            if prepared.is_large:
                pixels.close()  # freed once the last window is on a device
            windows = [WindowJob(array, plan, window) for window in plan.windows]
            futures = deque(reservation.submit(windows))
            del array, windows
            stitched = await self._stitch(job, plan, futures, held)
            job.timer.seconds["queue"] = reservation.queue_seconds
            job.timer.seconds["infer"] = reservation.infer_seconds
            job.timer.record("stitch")  # of the last window; the others overlap with inference
            threshold = job.preprocess.threshold if job.threshold is None else job.threshold
            result = Stitched(
                stitched,
                height,
                width,
                job.preprocess,
                threshold,
                job.needs_full_probabilities,
                stored_image,
                pages,
                pixel_size,
            )
            return await finish(result, rendering_limit(height * width, deadline))

    async def _stitch(
        self,
        job: ImageJob,
        plan: WindowPlan,
        futures: deque[asyncio.Future[Probabilities]],
        held: contextlib.ExitStack,
    ) -> StoredArray:
        """Blend the probabilities of the windows into a block, which `held` frees.

        Those of a single window keep their type; see `Probabilities`.

        Args:
            futures: one per window of the plan, in their order.
        """
        probabilities = await futures.popleft()
        job.timer.restart()
        shape = (job.channels, plan.rows.length, plan.columns.length)
        block = held.enter_context(self._blocks.borrow())
        if plan.count == 1:  # stored as the engine returned it
            part = probabilities[: shape[0], : shape[1], : shape[2]]
            await self._copy(part.nbytes, block.store, part)
            return StoredArray(block, shape, part.dtype.str)
        stored = StoredArray(block, shape, "<f4")
        blended = None
        if stored.is_large:  # it is blended in shared memory; a small one is copied there
            block.clear()
            blended = stored.map()
        stitcher = Stitcher(plan, job.channels, blended)
        progress = ProgressLog(plan.count, "windows")
        for window in plan.windows:
            job.timer.restart()
            is_quick = probabilities.nbytes <= _QUICK_BLEND
            await self._call(is_quick, stitcher.add, window, probabilities)
            progress.advance()
            if futures:
                probabilities = await futures.popleft()
        if blended is None:
            await self._copy(stored.nbytes, block.store, stitcher.result())
        return stored

    async def _open(
        self,
        job: ImageJob,
        source: EncodedImage,
        pixels: SharedBlock,
        image: SharedBlock | None,
        deadline: Deadline,
    ) -> dict[str, Any]:
        """Read the header of an encoded image. A small one is decoded and prepared as well, unless
        the queue is so full that it may have to be rejected."""
        small = _SMALL_PIXELS if self._batcher.has_room else 0
        # The pixels of a small image need more memory than a header, but no more time.
        limit = dataclasses.replace(decoding_limit(small, deadline), seconds=DECODING_SECONDS)
        result: dict[str, Any] = await self._workers.call(
            limit,
            inspect_and_decode,
            source,
            self._max_pixels,
            small,
            job.page,
            job.channel,
            job.preprocess,
            pixels,
            image,
        )
        return result

    async def _prepare(
        self,
        job: ImageJob,
        source: EncodedImage | StoredArray,
        opened: dict[str, Any],
        pixels: SharedBlock,
        image: SharedBlock | None,
        deadline: Deadline,
    ) -> dict[str, Any]:
        """Decode an image if it is encoded, and prepare it. See `decode_and_prepare`."""
        result: dict[str, Any]
        if isinstance(source, StoredArray):
            limit = decoding_limit(math.prod(source.shape), deadline)
            result = await self._workers.call(limit, prepare_image, source, job.preprocess, pixels)
            return result
        header = opened["header"]
        limit = decoding_limit(header["height"] * header["width"], deadline)
        result = await self._workers.call(
            limit, decode_and_prepare, source, header, job.preprocess, pixels, image
        )
        return result

    def _count(self, job: ImageJob, height: int, width: int) -> None:
        for stage, seconds in job.timer.seconds.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        name = job.model.checkpoint.name
        self._metrics.images.labels(name).inc()
        self._metrics.pixels.labels(name).inc(height * width)

    async def _inspect(
        self, data: EncodedImage, page: int | None, channel: int | None, deadline: Deadline
    ) -> dict[str, Any]:
        limit = decoding_limit(0, deadline)
        header: dict[str, Any] = await self._workers.call(
            limit, inspect_image, data, self._max_pixels, page, channel
        )
        return header

    async def _share(
        self, source: bytes | AnyArray, block: SharedBlock
    ) -> EncodedImage | StoredArray:
        """Copy an encoded image, or pixels, to shared memory."""
        if isinstance(source, bytes):
            await self._copy(len(source), block.write, source)
            return EncodedImage(block, len(source))
        return await self._copy(source.nbytes, block.store, source)

    async def _load(self, stored: StoredArray) -> AnyArray:
        return await self._copy(stored.nbytes, stored.load)

    async def _copy(self, size: int, function: Callable[..., T], *args: Any) -> T:
        """Call a function that copies `size` bytes: on a thread if that takes long."""
        return await self._call(size <= _QUICK_COPY, function, *args)

    async def _call(self, is_quick: bool, function: Callable[..., T], *args: Any) -> T:
        """Call a function, on a thread if it is not quick."""
        if is_quick:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


def _stored_image(block: SharedBlock, shape: list[int], dtype: str) -> StoredArray:
    return StoredArray(block, tuple(shape), dtype)


def decoding_limit(pixels: int, deadline: Deadline) -> CallLimit:
    """The limits of decoding and preparing an image of so many pixels.

    Measured: up to 0.04 s per megapixel, and 22 bytes per pixel.
    """
    seconds = DECODING_SECONDS + 0.25e-6 * pixels
    return CallLimit("decoding", seconds, 300_000_000 + 48 * pixels, deadline.at)


def rendering_limit(pixels: int, deadline: Deadline) -> CallLimit:
    """The limits of deciding on the mask and rendering the outputs.

    Measured with 2,500 objects per megapixel: see docs/decisions/0030-outputs-of-objects.md.
    """
    seconds = RENDERING_SECONDS + 4e-6 * pixels
    return CallLimit("rendering", seconds, 300_000_000 + 72 * pixels, deadline.at)
