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

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, TypeVar

from app.batching.batcher import Batcher
from app.batching.deadline import Deadline
from app.engine.device_engines import WindowJob
from app.imaging.workers.pool import WorkerPool
from app.imaging.workers.shared import StoredArray
from app.imaging.workers.worker import CallLimit
from app.inference.blocks import Blocks
from app.inference.budget import Budget
from app.inference.image_group import ImageGroup
from app.inference.job import ImageJob
from app.inference.limits import rendering_limit
from app.inference.outputs import Options, Rendered, Segmentation
from app.inference.reading import ImageReader
from app.inference.registry import ServedModel
from app.inference.steps import EncodedImage, Stitched, join_pages, render_outputs, write_mask
from app.inference.stitching import WindowBlender
from app.metrics import Metrics
from model.arrays import AnyArray, ByteArray, FloatArray, Probabilities
from model.windows import to_floats

if TYPE_CHECKING:
    from app.tracing.spans import Tracing

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The result for one image as arrays.

    Attributes:
        mask: (H, W) uint8 of the upright image: 0 and 255, or class indices.
        probabilities: (out_channels, H, W) float32, if they were asked for.
    """

    mask: ByteArray
    probabilities: FloatArray | None


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
        tracing: makes the traces of images, if there are any.

    Attributes:
        reader: reads sizes and counts pages without segmenting anything.
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
        tracing: Tracing | None = None,
    ) -> None:
        self._batcher = batcher
        self._workers = workers
        self._blocks = Blocks(pool)
        self.reader = ImageReader(workers, self._blocks, max_pixels)
        self._blender = WindowBlender(self._blocks)
        self._pixels = pixels
        self._metrics = metrics
        self._tracing = tracing

    def close(self) -> None:
        """Free the shared memory that is kept for reuse."""
        self._blocks.close()

    @staticmethod
    def check(model: ServedModel, options: Options) -> None:
        """Check that the model can do what is asked for.

        Raises:
            InvalidRequest: see `Options.check`.
        """
        model.check(options)

    def precheck_admission(self, model: ServedModel, deadline: Deadline) -> None:
        """Reject a request before its image is read, if not even the smallest image would fit.

        Raises:
            RequestRejected: the queue is full, or the deadline cannot be met.
        """
        # The image itself is admitted once its size is known.
        self._batcher.check_admission(model.smallest, deadline=deadline)

    def group(self, model: ServedModel) -> ImageGroup:
        """The group for the images of one request."""
        windows = 2 * sum(choice.max_batch for choice in model.choices)  # on a device, and prepared
        return ImageGroup(windows + 2 * self._workers.size, self._pixels.limit / 4)

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
                    content = await self._blocks.copy(size, outputs.read, size, start)
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
                end = await self._blocks.copy(len(file), pages.write, file, end)
            sizes = [len(file) for file in files]
            limit = rendering_limit(pixels, deadline)
            size: int = await self._workers.call(limit, join_pages, pages, sizes, stack)
            return await self._blocks.copy(size, stack.read, size)

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
            await self.reader.size(image)

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
                    await self._blocks.load(StoredArray(mask, shape, "|u1")),
                    to_floats(await self._blocks.load(probabilities)) if stitched.full else None,
                )

        return finish

    async def _run_until(self, deadline: Deadline, job: ImageJob, finish: Finish[T]) -> T:
        """Run a client's job, trace it and count it."""
        if self._tracing is not None:
            job = dataclasses.replace(job, trace=self._tracing.start_image(job.model.id))
        count = self._metrics.count_missed_deadline
        start = time.perf_counter()
        try:
            async with deadline.enforced("the deadline passed before the mask was ready", count):
                result = await self._run(job, finish, deadline)
        except BaseException as error:  # a client that disconnects cancels its job
            job.model.statistics.count_failure(time.perf_counter() - start)
            if job.trace is not None:
                job.trace.end(error)
            raise
        if job.trace is not None:
            job.trace.end()
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
            source = await self._blocks.share(
                job.source, reading.enter_context(self._blocks.borrow())
            )
            pixels = held.enter_context(self._blocks.borrow())
            image = held.enter_context(self._blocks.borrow()) if job.needs_image else None
            opened: dict[str, Any] = {}
            if isinstance(source, EncodedImage):
                opened = await self.reader.open(
                    job, source, pixels, image, deadline, decode=self._batcher.has_room
                )
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
                opened = await self.reader.prepare(job, source, opened, pixels, image, deadline)
            reading.close()
            prepared = StoredArray(pixels, tuple(opened["pixels"]), "|u1")
            stored_image = None
            if image is not None:
                image_shape, image_type = opened["image"]
                stored_image = StoredArray(image, tuple(image_shape), image_type)
            job.timer.record("decode")
            if job.trace is not None:
                job.trace.end_decoding(height, width, plan.count)
            array = prepared.map()
            if prepared.is_large:
                pixels.close()  # freed once the last window is on a device
            windows = [WindowJob(array, plan, window, job.trace) for window in plan.windows]
            futures = deque(reservation.submit(windows))
            del array, windows
            stitched = await self._blender.blend(job, plan, futures, held)
            job.timer.seconds["queue"] = reservation.queue_seconds
            job.timer.seconds["infer"] = reservation.infer_seconds
            job.timer.record("stitch")  # of the last window; the others overlap with inference
            if job.trace is not None:
                job.trace.end_stitching(reservation.queue_seconds, reservation.infer_seconds)
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

    def _count(self, job: ImageJob, height: int, width: int) -> None:
        name = job.model.checkpoint.name
        self._metrics.count_image(name, height * width, job.timer.seconds)
