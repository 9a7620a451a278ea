"""Bytes of an image in, bytes of its mask out: the one place where the rooms are joined.

::

    bytes ─ inspect ─ plan ─ batcher.admit ─ decode.decode ─ transforms.prepare
          ─ batcher (windows, engines) ─ stitch ─ mask_and_confidence ─ png ─ bytes

What an image costs is known from its header, so it is admitted or refused before it is decoded.
Everything that takes time runs on a pool of threads; the event loop only hands things on. Knows
no HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, cast

from app.batching.batcher import Batcher, Reservation
from app.engine.device_engines import WindowJob
from app.errors import DeadlineExceeded, InvalidRequest
from app.imaging.bounds import check_size
from app.imaging.decode import decode, inspect
from app.inference.budget import Budget
from app.inference.outputs import Options, Output, Segmentation, render
from app.inference.registry import ServedModel
from app.metrics import Metrics
from model.arrays import AnyArray, ByteArray, FloatArray, Shape
from model.transforms import mask_and_confidence, prepare, resize_to_image
from model.windows import Stitcher, Window, WindowPlan

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one image, not encoded.

    Attributes:
        mask: (H, W) of the upright image: 0 and 255, or the indices of the classes.
        probabilities: (out_channels, H, W), if they were asked for.
    """

    mask: ByteArray
    probabilities: FloatArray | None


class Segmenter:
    """Joins decoding, windows, batcher, stitching and encoding.

    Args:
        batcher: computes windows.
        pool: threads for everything else that takes time.
        max_pixels: of one image.
        pixels: of decoded images that may be held at once.
        metrics: where stages are observed.
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
        """
        Raises:
            InvalidRequest: the model has no such output, or no threshold.
        """
        if model.checkpoint.preprocess.binary:
            return
        if options.output is Output.INSTANCES:
            raise InvalidRequest("output=instances needs a model of one class; this one has more")
        if options.threshold is not None:
            raise InvalidRequest(
                "threshold needs a model of one class; this one has more, and takes the likeliest"
            )

    def precheck_admission(self, model: ServedModel, deadline: float) -> None:
        """Most refusals need not wait for the image: what has no room for the smallest has none.

        Args:
            deadline: on the event loop's clock.

        Raises:
            RequestRejected: the service will not do it now, or not in time.
        """
        with self._batcher.admit(model.keys(model.plan(1, 1)), deadline=deadline):
            pass  # the image is admitted once its size is known

    async def size(self, image: bytes | AnyArray) -> Shape:
        """(height, width) of an image, encoded or decoded: all there is to know before its turn.

        Raises:
            ImageError: it is not one, of no accepted format, or too large.
        """
        if isinstance(image, bytes):
            header = await self._call(inspect, image, max_pixels=self._max_pixels)
            return header.height, header.width
        height, width = image.shape[:2]
        check_size(height, width, self._max_pixels)
        return height, width

    async def segment(
        self, model: ServedModel, data: bytes, options: Options, deadline: float
    ) -> Segmentation:
        """The mask of one encoded image.

        Args:
            deadline: on the event loop's clock.

        Raises:
            ImageError: the bytes are not an image that is accepted.
            RequestRejected: the service will not do it now, or not in time.
            InvalidRequest: the model has no such output, or no threshold.
            EngineError: our own fault.
        """
        self.check(model, options)
        clock = _Stages()

        def finish(
            probabilities: FloatArray, mask: ByteArray, confidence: float, shown: AnyArray | None
        ) -> Segmentation:
            preprocess = model.checkpoint.preprocess
            result = render(probabilities, mask, confidence, shown, preprocess, options)
            clock.done("encode")
            return dataclasses.replace(result, seconds=clock.seconds)

        result = await self._in_time(
            deadline,
            self._compute(
                model,
                data,
                finish,
                clock,
                options.threshold,
                deadline=deadline,
                all_channels=options.output.needs_instances,
                restored=options.output.needs_full_probabilities,
                shown=options.output.needs_image,
            ),
        )
        self._count(model, (result.height, result.width), clock)
        return result

    async def predict(
        self,
        model: ServedModel,
        image: bytes | AnyArray,
        deadline: float,
        *,
        threshold: float | None = None,
        probabilities: bool = True,
    ) -> Prediction:
        """What the model says of one image, as arrays.

        Args:
            image: encoded, or decoded: (H, W) or (H, W, C) uint8 or uint16.
            deadline: on the event loop's clock.
            threshold: of the mask; None is the model's own.
            probabilities: whether they are wanted too.

        Raises:
            ImageError: the bytes are not an image that is accepted, or it is too large.
            RequestRejected: the service will not do it now, or not in time.
            InvalidRequest: the model has no threshold.
            EngineError: our own fault.
        """
        self.check(model, Options(threshold=threshold))
        if not isinstance(image, bytes):
            await self.size(image)
        clock = _Stages()
        result = await self._in_time(
            deadline, self._predict(model, image, clock, threshold, probabilities, deadline)
        )
        self._count(model, result.mask.shape, clock)
        return result

    async def golden_mask(self, model: ServedModel) -> ByteArray:
        """The mask of the model's golden image, by the path of requests; none of them pushes it
        aside, and it is counted as none."""
        image = model.checkpoint.golden.image
        return (await self._predict(model, image, _Stages(), bounded=False)).mask

    async def _predict(
        self,
        model: ServedModel,
        image: bytes | AnyArray,
        clock: _Stages,
        threshold: float | None = None,
        probabilities: bool = False,
        deadline: float = math.inf,
        bounded: bool = True,
    ) -> Prediction:
        def finish(computed: FloatArray, mask: ByteArray, *_: object) -> Prediction:
            return Prediction(mask, computed if probabilities else None)

        return await self._compute(
            model,
            image,
            finish,
            clock,
            threshold,
            deadline=deadline,
            all_channels=probabilities,
            restored=probabilities,
            bounded=bounded,
        )

    async def _compute(
        self,
        model: ServedModel,
        image: bytes | AnyArray,
        finish: Callable[[FloatArray, ByteArray, float, AnyArray | None], T],
        clock: _Stages,
        threshold: float | None,
        *,
        deadline: float,
        all_channels: bool,
        restored: bool,
        shown: bool = False,
        bounded: bool = True,
    ) -> T:
        """From the image to what `finish` makes of its probabilities, its mask, the confidence in
        that and (if `shown`) its pixels, while it still counts as held.

        Args:
            restored: whether the probabilities are wanted at the size of the image.
        """
        preprocess = model.checkpoint.preprocess
        if isinstance(image, bytes):
            header = await self._call(inspect, image, max_pixels=self._max_pixels)
            size = header.height, header.width
        else:
            size = image.shape[0], image.shape[1]
        plan = model.plan(*size)
        # Of one class, the borders between objects are of no use but to tell them apart.
        only_first = preprocess.binary and not all_channels
        channels = 1 if only_first else model.checkpoint.architecture.out_channels
        # A resized image may be decoded at a fraction of its size, unless it is to be shown.
        enough = preprocess.resized if preprocess.mode == "resize" and not shown else None
        with (
            self._pixels.share() as held,
            self._batcher.admit(model.keys(plan), deadline=deadline, bounded=bounded) as ticket,
        ):
            if bounded:
                held.take(size[0] * size[1])

            def prepared() -> tuple[ByteArray, AnyArray | None]:
                decoded = (
                    decode(image, header, at_least=enough) if isinstance(image, bytes) else image
                )
                kept = decoded if shown else None
                return prepare(decoded, preprocess), kept  # nobody else keeps the decoded image

            pixels, kept = await self._call(prepared)
            clock.done("decode")

            def finished(stitched: FloatArray) -> T:
                clock.seconds["queue"] = ticket.queue_seconds
                clock.seconds["infer"] = ticket.infer_seconds
                clock.restart()
                if restored:  # then the mask, too, is made of what is restored once
                    stitched = resize_to_image(stitched, *size)
                mask, confidence = mask_and_confidence(stitched, *size, preprocess, threshold)
                clock.done("stitch")
                return finish(stitched, mask, confidence, kept)

            return await self._infer(plan, ticket, pixels, channels, finished)

    async def _in_time(self, deadline: float, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout_at(deadline):
                return await work
        except TimeoutError:
            self._metrics.rejected.labels("deadline").inc()
            raise DeadlineExceeded("the deadline passed before the mask was done") from None

    def _count(self, model: ServedModel, size: tuple[int, ...], clock: _Stages) -> None:
        for stage, seconds in clock.seconds.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        self._metrics.images.labels(model.checkpoint.name).inc()
        self._metrics.pixels.labels(model.checkpoint.name).inc(math.prod(size))

    async def _infer(
        self,
        plan: WindowPlan,
        ticket: Reservation[WindowJob, FloatArray],
        pixels: ByteArray,
        channels: int,
        finish: Callable[[FloatArray], T],
    ) -> T:
        """What `finish` makes of the stitched probabilities.

        It is called in the same turn of a thread as the last window is added: on a machine whose
        cores are all busy, each change of thread holds up the engine.
        """
        stitcher = Stitcher(plan, channels)

        def add(window: Window, probabilities: FloatArray) -> T | None:
            stitcher.add(window, probabilities)
            return finish(stitcher.result()) if window is plan.windows[-1] else None

        pieces = [WindowJob(pixels, plan, window) for window in plan.windows]
        result: T | None = None
        for window, future in zip(plan.windows, ticket.submit(pieces), strict=True):
            result = await self._call(add, window, await future)
        return cast(T, result)

    async def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))


class _Stages:
    """Seconds by stage, of what runs one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
