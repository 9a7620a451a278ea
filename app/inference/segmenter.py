"""One image through the whole pipeline, from its bytes to its outputs.

::

    bytes ─ inspect ─▶ size ─ admit ─▶ reservation
          ─ decode ──▶ pixels ─ submit ─▶ windows ─ engines, blend ─▶ probabilities
          ─ decide ──▶ mask ─ render ─▶ outputs

The header of an image gives its size, and so its number of windows: it is admitted or rejected
before it is decoded. Every step that takes time runs on a pool of threads; the event loop only
moves an image from one step to the next. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Generic, TypeVar

from app.batching.batcher import Batcher
from app.batching.deadline import Deadline
from app.engine.device_engines import WindowJob
from app.errors import InvalidRequest
from app.imaging.bounds import check_size
from app.imaging.decode import ImageHeader, decode, inspect
from app.inference.budget import Budget
from app.inference.outputs import Decision, Options, Output, Segmentation, render
from app.inference.registry import ServedModel
from app.metrics import Metrics
from model.arrays import AnyArray, ByteArray, FloatArray, Shape
from model.transforms import mask_and_confidence, prepare, resize_to_image
from model.windows import Stitcher, Window

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
        self.seconds[stage] = now - self._start
        self._start = now


@dataclasses.dataclass(frozen=True)
class ImageJob(Generic[T]):
    """One image, and what to make of it. The methods block: they run on the pool's threads.

    Attributes:
        model: segments the image.
        source: the encoded image, or its pixels: (H, W) or (H, W, C), uint8 or uint16.
        finish: makes the result from the decision.
        threshold: of the mask; None is the model's own.
        needs_image: `finish` needs the decoded pixels.
        needs_full_probabilities: `finish` needs the probabilities at the size of the image.
        needs_all_channels: `finish` needs every channel of a binary model, not only the first.
        timer: started when the job was created.
    """

    model: ServedModel
    source: bytes | AnyArray
    finish: Callable[[Decision], T]
    threshold: float | None = None
    needs_image: bool = False
    needs_full_probabilities: bool = False
    needs_all_channels: bool = False
    timer: StageTimer = dataclasses.field(default_factory=StageTimer)

    @property
    def channels(self) -> int:
        """How many of the model's channels are blended."""
        if self.model.checkpoint.preprocess.binary and not self.needs_all_channels:
            return 1
        return self.model.checkpoint.architecture.out_channels

    def decode(self, header: ImageHeader | None) -> tuple[ByteArray, AnyArray | None]:
        """Return the pixels that the windows are cut from, (H, W, C) uint8, and the decoded image
        if it is needed: otherwise its memory is freed here.

        Args:
            header: of an encoded image.

        Raises:
            ImageError: truncated or damaged.
        """
        preprocess = self.model.checkpoint.preprocess
        if isinstance(self.source, bytes):
            assert header is not None
            # An image that is resized anyway may be decoded at a fraction of its size.
            smaller = preprocess.mode == "resize" and not self.needs_image
            size = preprocess.resized if smaller else None
            decoded = decode(self.source, header, at_least=size)
        else:
            decoded = self.source
        pixels = prepare(decoded, preprocess)
        self.timer.record("decode")
        return pixels, decoded if self.needs_image else None

    def complete(
        self,
        stitcher: Stitcher,
        window: Window,
        probabilities: FloatArray,
        size: Shape,
        image: AnyArray | None,
    ) -> T:
        """Blend the last window, decide on the mask, and make the result.

        One call, because all of it must run in one turn of a thread: on a machine whose cores are
        all busy, each change of thread holds up the engine.

        Args:
            window, probabilities: the last window and its (channels, h, w) probabilities.
            size: of the image.
            image: decoded, if it is needed.
        """
        self.timer.restart()
        stitcher.add(window, probabilities)
        decision = self._decide(stitcher.result(), size, image)
        self.timer.record("stitch")
        return self.finish(decision)

    def _decide(self, stitched: FloatArray, size: Shape, image: AnyArray | None) -> Decision:
        preprocess = self.model.checkpoint.preprocess
        threshold = preprocess.threshold if self.threshold is None else self.threshold
        if self.needs_full_probabilities:  # resized once, for the mask as well
            stitched = resize_to_image(stitched, *size)
        mask, confidence = mask_and_confidence(stitched, *size, preprocess, threshold)
        return Decision(stitched, mask, confidence, threshold, preprocess, image)


class Segmenter:
    """Runs images through decoding, the batcher, blending and rendering.

    Args:
        batcher: computes windows.
        pool: threads for everything else that takes time.
        max_pixels: of one image.
        pixels: budget of the decoded images of all requests.
        metrics: records stages, images and missed deadlines.
    """

    def __init__(
        self,
        batcher: Batcher[WindowJob, FloatArray],
        pool: Executor,
        *,
        max_pixels: int,
        pixels: Budget,
        metrics: Metrics,
    ) -> None:
        self._batcher = batcher
        self._pool = pool
        self._max_pixels = max_pixels
        self._pixels = pixels
        self._metrics = metrics

    @staticmethod
    def check(model: ServedModel, options: Options) -> None:
        """Check that the model can do what is asked for.

        Raises:
            InvalidRequest: the model does not have such an output, or does not use a threshold.
        """
        if model.checkpoint.preprocess.binary:
            return
        classes = len(model.checkpoint.preprocess.classes)
        if Output.INSTANCES in options.outputs:
            raise InvalidRequest(
                f"output=instances is only available for binary models; this model has {classes} "
                "classes"
            )
        if options.threshold is not None:
            raise InvalidRequest(
                f"threshold is only available for binary models; this model has {classes} classes "
                "and picks the most probable one"
            )

    def precheck_admission(self, model: ServedModel, deadline: Deadline) -> None:
        """Reject a request before its image is read, if not even the smallest image would fit.

        Raises:
            RequestRejected: the queue is full, or the deadline cannot be met.
        """
        with self._batcher.admit(model.keys(model.plan(1, 1)), deadline=deadline):
            pass  # the image itself is admitted once its size is known

    async def size(self, image: bytes | AnyArray) -> Shape:
        """(height, width) of an upright image, encoded or decoded.

        Raises:
            ImageError: not an image, an unsupported format, or too large.
        """
        if isinstance(image, bytes):
            header = await self._inspect(image)
            return header.height, header.width
        height, width = image.shape[:2]
        check_size(height, width, self._max_pixels)
        return height, width

    async def segment(
        self, model: ServedModel, data: bytes, options: Options, deadline: Deadline
    ) -> Segmentation:
        """Segment one encoded image; all outputs come from one inference.

        Raises:
            ImageError: the bytes are not an image that is accepted.
            RequestRejected: the queue is full, or the deadline passed or cannot be met.
            InvalidRequest: the model does not have such an output, or does not use a threshold.
            EngineError: the engine failed.
        """
        self.check(model, options)
        timer = StageTimer()

        def finish(decision: Decision) -> Segmentation:
            result = render(decision, options)
            timer.record("encode")
            return dataclasses.replace(result, seconds=timer.seconds)

        job = ImageJob(
            model,
            data,
            finish,
            options.threshold,
            needs_image=options.needs_image,
            needs_full_probabilities=options.needs_full_probabilities,
            needs_all_channels=options.needs_instances,
            timer=timer,
        )
        result = await self._run_until(deadline, job)
        self._count(job, result.height, result.width)
        return result

    async def predict(
        self,
        model: ServedModel,
        image: bytes | AnyArray,
        deadline: Deadline,
        *,
        threshold: float | None = None,
        probabilities: bool = True,
    ) -> Prediction:
        """Segment one image and return arrays.

        Args:
            image: encoded, or decoded: (H, W) or (H, W, C), uint8 or uint16.
            threshold: of the mask; None is the model's own.
            probabilities: return them too.

        Raises:
            ImageError: the bytes are not an image that is accepted, or it is too large.
            RequestRejected: the queue is full, or the deadline passed or cannot be met.
            InvalidRequest: the model does not use a threshold.
            EngineError: the engine failed.
        """
        self.check(model, Options(threshold=threshold))
        if not isinstance(image, bytes):
            await self.size(image)

        def finish(decision: Decision) -> Prediction:
            return Prediction(decision.mask, decision.probabilities if probabilities else None)

        job = ImageJob(
            model,
            image,
            finish,
            threshold,
            needs_full_probabilities=probabilities,
            needs_all_channels=probabilities,
        )
        result = await self._run_until(deadline, job)
        self._count(job, *result.mask.shape)
        return result

    async def golden_mask(self, model: ServedModel) -> ByteArray:
        """Segment the model's golden image by the path of requests.

        It is admitted even if the queue is full, and is not counted as a request.
        """
        job = ImageJob(model, model.checkpoint.golden.image, lambda decision: decision.mask)
        return await self._run(job, Deadline.never(), ignore_capacity=True)

    async def _run_until(self, deadline: Deadline, job: ImageJob[T]) -> T:
        """Run a client's job, and count it if the deadline passes."""
        count = self._metrics.rejected.labels("deadline").inc
        async with deadline.enforced("the deadline passed before the mask was ready", count):
            return await self._run(job, deadline)

    async def _run(
        self, job: ImageJob[T], deadline: Deadline, *, ignore_capacity: bool = False
    ) -> T:
        """Take an image through every step. Whatever ends this early frees all that it holds."""
        header = None
        if isinstance(job.source, bytes):
            header = await self._inspect(job.source)
            height, width = header.height, header.width
        else:
            height, width = job.source.shape[:2]
        plan = job.model.plan(height, width)
        with (
            self._pixels.allocate() as allocation,
            self._batcher.admit(
                job.model.keys(plan), deadline=deadline, ignore_capacity=ignore_capacity
            ) as reservation,
        ):
            if not ignore_capacity:
                allocation.grow(height * width)
            pixels, image = await self._call(job.decode, header)
            windows = [WindowJob(pixels, plan, window) for window in plan.windows]
            futures = deque(reservation.submit(windows))
            del pixels, windows  # freed once the last window is on a device
            stitcher = Stitcher(plan, job.channels)
            *others, last = plan.windows
            for window in others:
                await self._call(stitcher.add, window, await futures.popleft())
            probabilities = await futures.popleft()
            job.timer.seconds["queue"] = reservation.queue_seconds
            job.timer.seconds["infer"] = reservation.infer_seconds
            return await self._call(
                job.complete, stitcher, last, probabilities, (height, width), image
            )

    def _count(self, job: ImageJob[Any], height: int, width: int) -> None:
        for stage, seconds in job.timer.seconds.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        name = job.model.checkpoint.name
        self._metrics.images.labels(name).inc()
        self._metrics.pixels.labels(name).inc(height * width)

    async def _inspect(self, data: bytes) -> ImageHeader:
        return await self._call(inspect, data, max_pixels=self._max_pixels)

    async def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a blocking function on the pool."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, functools.partial(function, *args, **kwargs))
