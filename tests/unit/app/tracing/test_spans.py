"""The spans of requests, images and batches, and how they refer to each other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import propagate
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler
from opentelemetry.trace import StatusCode

from app.batching.deadline import Deadline
from app.batching.device_worker import Runner
from app.errors import CorruptImage, DeadlineExceeded, DeviceLost
from app.inference.outputs import Options
from app.inference.service import Service
from app.tracing.device import TracedDevice
from app.tracing.spans import Tracing
from tests.conftest import encode, nuclei
from tests.in_process import with_service

IMAGE = encode(nuclei(150, 200)[0])
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Recorded:
    """Traces whose spans are kept.

    Attributes:
        tracing: makes them.
    """

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        processor = SimpleSpanProcessor(self._exporter)
        self.tracing = Tracing(processor, Resource({}), sampler)

    @contextlib.contextmanager
    def request(self, caller: str | None = None) -> Iterator[None]:
        """The span of a request, as FastAPI makes it."""
        context = propagate.extract({"traceparent": caller} if caller else {})
        tracer = self.tracing.provider.get_tracer("test")
        with tracer.start_as_current_span("POST", context, record_exception=False):
            yield

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def find(self, name: str) -> ReadableSpan:
        (span,) = (span for span in self.spans if span.name == name)
        return span


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def linked(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


async def segment(
    service: Service, recorded: Recorded, data: bytes = IMAGE, deadline: Deadline | None = None
) -> None:
    with service.registry.lease(None) as model, recorded.request(CALLER):
        limit = deadline or Deadline.after(30)
        await service.segmenter.segment(model, data, Options(), limit)


def test_stages_of_an_image_follow_each_other(tiny: Path) -> None:
    recorded = Recorded()

    async def body(service: Service) -> None:
        await segment(service, recorded)

    with_service(tiny, body, tracing=recorded.tracing)
    image = recorded.find("image")
    names = ("decode", "queue", "infer", "stitch", "encode")
    stages = [recorded.find(name) for name in names]
    assert all(span.parent and span.parent.span_id == ids(image)[1] for span in stages)
    times = [(span.start_time or 0, span.end_time or 0) for span in stages]
    assert all(start <= end for start, end in times)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))
    assert (image.start_time or 0) <= times[0][0]
    assert times[-1][1] <= (image.end_time or 0)
    assert dict(image.attributes or {})["unet.windows"] == 4


def test_batch_and_images_refer_to_each_other(tiny: Path) -> None:
    recorded = Recorded()

    async def body(service: Service) -> None:
        small = encode(nuclei(60, 60)[0])
        await asyncio.gather(*(segment(service, recorded, small) for _ in range(4)))

    with_service(tiny, body, tracing=recorded.tracing, max_batch=4, max_wait_ms=500)
    images = [span for span in recorded.spans if span.name == "image"]
    batch = recorded.find("batch")
    assert batch.parent is None
    assert sorted(linked(batch)) == sorted(map(ids, images))
    assert dict(batch.attributes or {})["unet.batch.windows"] == 4
    inferences = [span for span in recorded.spans if span.name == "infer"]
    assert [linked(span) for span in inferences] == [[ids(batch)]] * 4
    assert ids(batch)[0] not in {ids(image)[0] for image in images}


def test_spans_of_a_request_continue_the_trace_of_the_caller(tiny: Path) -> None:
    recorded = Recorded()

    async def body(service: Service) -> None:
        await segment(service, recorded)

    with_service(tiny, body, tracing=recorded.tracing)
    request = recorded.find("POST")
    assert request.parent is not None
    assert f"{request.parent.span_id:x}" in CALLER
    for span in recorded.spans:
        assert (f"{ids(span)[0]:032x}" in CALLER) == (span.name != "batch")


def test_caller_that_is_not_sampled_makes_no_spans(tiny: Path) -> None:
    recorded = Recorded()

    async def body(service: Service) -> None:
        with service.registry.lease(None) as model, recorded.request(CALLER[:-1] + "0"):
            await service.segmenter.segment(model, IMAGE, Options(), Deadline.after(30))

    with_service(tiny, body, tracing=recorded.tracing)
    assert recorded.spans == []


def test_service_makes_no_spans_of_its_own_work(tiny: Path) -> None:
    recorded = Recorded()

    async def body(service: Service) -> None:
        with service.registry.lease(None) as model:
            await service.segmenter.golden_mask(model)

    with_service(tiny, body, tracing=recorded.tracing)
    assert recorded.spans == []


def test_failed_stage_and_image_name_the_error(tiny: Path) -> None:
    recorded = Recorded()

    async def body(service: Service) -> None:
        with pytest.raises(CorruptImage):
            await segment(service, recorded, IMAGE[: len(IMAGE) // 2])

    with_service(tiny, body, tracing=recorded.tracing)
    for name in ("decode", "image"):
        span = recorded.find(name)
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "CorruptImage"
    assert {span.name for span in recorded.spans} == {"POST", "image", "decode"}


class Device(Runner):
    """A device that hangs or fails at one step."""

    name, depth = "fake", 1

    def __init__(self, failing: str = "") -> None:
        self._failing = failing

    def _call(self, step: str) -> list[int]:
        if step == self._failing:
            raise DeviceLost("secret")
        return [0]

    def prepare(self, key: Any, payloads: Any, /) -> Any:
        return self._call("prepare")

    def submit(self, key: Any, staged: Any, /) -> Any:
        return self._call("submit")

    def collect(self, key: Any, submitted: Any, /) -> Any:
        return self._call("collect")


class Job:
    """A window of an image that has a trace."""

    def __init__(self, tracing: Tracing) -> None:
        self.trace = tracing.start_image("model")


@pytest.mark.parametrize("step", ["prepare", "submit", "collect"])
def test_failed_batch_has_the_error_and_no_text_of_the_device(step: str) -> None:
    recorded = Recorded()
    device = TracedDevice(Device(step), recorded.tracing)
    with recorded.request():
        job = Job(recorded.tracing)
    with pytest.raises(DeviceLost):
        device.collect("key", device.submit("key", device.prepare("key", [job])))
    batch = recorded.find("batch")
    assert batch.status.status_code is StatusCode.ERROR
    assert batch.status.description == "DeviceLost"


def test_batch_of_images_without_traces_has_no_span() -> None:
    recorded = Recorded()
    device = TracedDevice(Device(), recorded.tracing)
    job = Job(recorded.tracing)  # outside of a request
    assert job.trace is None
    assert device.collect("key", device.submit("key", device.prepare("key", [job]))) == [0]
    assert recorded.spans == []


def test_batch_is_recorded_whatever_the_sampler_says_of_its_own_trace() -> None:
    recorded = Recorded(_ByParent())
    device = TracedDevice(Device(), recorded.tracing)
    with recorded.request(CALLER):
        job = Job(recorded.tracing)
    device.collect("key", device.submit("key", device.prepare("key", [job])))
    assert recorded.find("batch").status.status_code is StatusCode.UNSET


class _ByParent(Sampler):
    """Rejects traces that begin here."""

    def should_sample(self, parent_context: Any, *args: Any, **options: Any) -> Any:
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        from opentelemetry.trace import get_current_span

        parent = get_current_span(parent_context).get_span_context()
        chosen = ALWAYS_ON if parent.is_valid else ALWAYS_OFF
        return chosen.should_sample(parent_context, *args, **options)

    def get_description(self) -> str:
        return "by parent"


def test_batch_that_hangs_ends_no_later_than_its_image() -> None:
    recorded = Recorded()
    device = TracedDevice(Device(), recorded.tracing)
    with recorded.request():
        job = Job(recorded.tracing)
        assert job.trace is not None
        job.trace.end_decoding(60, 60, 1)
        device.submit("key", device.prepare("key", [job]))
        job.trace.end(DeadlineExceeded("too late"))
    inference = recorded.find("infer")
    assert inference.status.description == "DeadlineExceeded"
    assert recorded.find("queue").status.status_code is StatusCode.UNSET
    assert len(inference.links) == 1


def test_collector_that_hangs_does_not_delay_the_end() -> None:
    class Hanging(SimpleSpanProcessor):
        def shutdown(self) -> None:
            time.sleep(60)

    tracing = Tracing(Hanging(InMemorySpanExporter()), Resource({}))
    start = time.monotonic()
    asyncio.run(tracing.close())
    assert time.monotonic() - start < 5
