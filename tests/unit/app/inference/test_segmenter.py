"""One image through the pipeline: its steps, its results, and what is left after an error."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from app.batching.deadline import Deadline
from app.engine.device_engines import BatchKey
from app.engine.openvino import OpenVinoEngine
from app.errors import (
    CorruptImage,
    DeadlineExceeded,
    ImageTooLarge,
    InvalidRequest,
    QueueFull,
    WrongSelection,
)
from app.imaging.tiff import encode_tiff
from app.imaging.workers import shared
from app.imaging.workers.worker import CallLimit
from app.inference import reading, steps
from app.inference.job import ImageJob, StageTimer
from app.inference.outputs import FileFormat, Options, Output, Segmentation
from app.inference.registry import ServedModel
from app.inference.service import Service
from model.arrays import ByteArray, FloatArray
from model.checkpoint import load_checkpoint, save_checkpoint, update_manifest
from model.predict import attach_golden
from model.transforms import stretch_contrast
from tests.conftest import decode, encode, nuclei, write_tiny
from tests.in_process import read_metric, with_service

PIXELS = nuclei(150, 200)[0]
IMAGE = encode(PIXELS)
TRUNCATED = IMAGE[: len(IMAGE) // 2]


async def segment(
    service: Service, *outputs: Output, deadline: Deadline | None = None, data: bytes = IMAGE
) -> Segmentation:
    options = Options(outputs or (Output.MASK,))
    with service.registry.lease(None) as model:
        return await service.segmenter.segment(model, data, options, deadline or Deadline.after(30))


def assert_nothing_held(service: Service) -> None:
    now = service.batcher.statistics()
    assert (now.requests, now.reserved, now.waiting) == (0, 0, 0)
    assert service.pixels.used == 0


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with a model that resizes images."""
    folder = tmp_path_factory.mktemp("resized")
    write_tiny(folder / "nuclei.safetensors", resize=True)
    return folder


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with a model that spreads the contrast of images."""
    folder = tmp_path_factory.mktemp("spread")
    path = folder / "nuclei.safetensors"
    write_tiny(path)
    own = load_checkpoint(path)
    preprocess = dataclasses.replace(own.preprocess, intensity="percentile")
    draft = dataclasses.replace(own, preprocess=preprocess)
    save_checkpoint(path, attach_golden(draft, PIXELS))
    update_manifest(path)
    return folder


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    write_tiny(folder / "nuclei.safetensors", classes=3)
    return folder


@pytest.mark.parametrize("weights", ["tiny", "resized"])
def test_several_outputs_come_from_one_inference(
    weights: str, request: pytest.FixtureRequest
) -> None:
    async def body(service: Service) -> None:
        alone = {output: await segment(service, output) for output in Output}
        before = read_metric(service, "unet_batch_windows_sum")
        together = await segment(service, *Output)
        with service.registry.lease(None) as model:
            windows = model.plan(*PIXELS.shape).count
        assert read_metric(service, "unet_batch_windows_sum") - before == windows
        assert read_metric(service, "unet_images_total", model="nuclei") == len(Output) + 1
        for output, single in alone.items():
            assert together.rendered[output] == single.rendered[output]
        assert together.objects == alone[Output.INSTANCES].objects

    with_service(request.getfixturevalue(weights), body)


@pytest.mark.parametrize("shape", [PIXELS.shape, (150, 600)], ids=["one window", "several windows"])
@pytest.mark.parametrize("weights", ["tiny", "resized"])
def test_outputs_of_16_bit_probabilities_are_those_of_floats(
    shape: tuple[int, int],
    weights: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CUDA engine returns integers."""
    image = nuclei(*shape)[0]
    collect = OpenVinoEngine.collect

    def collect_integers(engine: OpenVinoEngine, submitted: ByteArray) -> Any:
        return np.rint(collect(engine, submitted) * 65535).astype(np.uint16)

    async def body(service: Service) -> None:
        for output in (Output.MASK, Output.PROBABILITY):
            masks = []
            for each in (collect, collect_integers):
                monkeypatch.setattr(OpenVinoEngine, "collect", each)
                found = await segment(service, output, data=encode(image))
                masks.append(decode(found.rendered[output].content).astype(int))
            assert np.abs(masks[1] - masks[0]).max() <= (output == Output.PROBABILITY)
            assert masks[0].max() > masks[0].min()
        predictions = []
        for each in (collect, collect_integers):
            monkeypatch.setattr(OpenVinoEngine, "collect", each)
            with service.registry.lease(None) as model:
                found_too = await service.segmenter.predict(model, image, Deadline.after(30))
            predictions.append(found_too)
        assert predictions[1].probabilities is not None
        assert predictions[1].probabilities.dtype == np.float32
        np.testing.assert_array_equal(predictions[0].mask, predictions[1].mask)
        np.testing.assert_allclose(
            predictions[0].probabilities, predictions[1].probabilities, atol=1 / 65535
        )

    with_service(request.getfixturevalue(weights), body)


def test_prediction_is_the_mask_of_the_same_image(tiny: Path) -> None:
    async def body(service: Service) -> None:
        mask = decode((await segment(service)).rendered[Output.MASK].content)
        with service.registry.lease(None) as model:
            for image in (IMAGE, PIXELS):
                predicted = await service.segmenter.predict(model, image, Deadline.after(30))
                np.testing.assert_array_equal(predicted.mask, mask)
                assert predicted.probabilities is not None
                assert predicted.probabilities.shape == (1, *PIXELS.shape)
                np.testing.assert_array_equal(predicted.probabilities[0] >= 0.5, mask > 0)
            alone = await service.segmenter.predict(
                model, PIXELS, Deadline.after(30), probabilities=False
            )
            assert alone.probabilities is None

    with_service(tiny, body)


async def segment_with(service: Service, options: Options, data: bytes = IMAGE) -> Segmentation:
    with service.registry.lease(None) as model:
        return await service.segmenter.segment(model, data, options, Deadline.after(30))


def test_percentiles_of_the_request_replace_those_of_the_model(spread: Path) -> None:
    outputs = (Output.PREVIEW, Output.PROBABILITY)

    async def body(service: Service) -> None:
        own = await segment_with(service, Options(outputs))
        other = await segment_with(service, Options(outputs, percentiles=(20, 80)))
        assert other.rendered[Output.PROBABILITY] != own.rendered[Output.PROBABILITY]
        for result, percentiles in ((own, (1.0, 99.8)), (other, (20.0, 80.0))):
            preview = decode(result.rendered[Output.PREVIEW].content)
            np.testing.assert_array_equal(preview, stretch_contrast(PIXELS, percentiles))

    with_service(spread, body)


def test_measurements_use_the_pixel_size_of_the_file_unless_the_request_has_one(tiny: Path) -> None:
    data = encode_tiff(PIXELS, 0.5)

    async def body(service: Service) -> None:
        async def columns(data: bytes, pixel_size: float | None = None) -> str:
            options = Options((Output.MEASUREMENTS,), 0.0, pixel_size=pixel_size)
            result = await segment_with(service, options, data)
            return result.rendered[Output.MEASUREMENTS].content.decode()

        of_file, of_request = await columns(data), await columns(data, 0.25)
        assert "area_um2" in of_file
        sizes = [
            float(next(csv.DictReader(io.StringIO(text)))["area_um2"])
            for text in (of_file, of_request)
        ]
        assert sizes == [PIXELS.size / 4, PIXELS.size / 16]
        assert "area_px" in await columns(IMAGE)

    with_service(tiny, body)


def test_what_a_file_format_cannot_hold_is_an_invalid_request(tiny: Path) -> None:
    long = encode(np.zeros((1, 16384), np.uint8))

    async def body(service: Service) -> None:
        options = Options((Output.OVERLAY,), format=FileFormat.WEBP)
        with pytest.raises(InvalidRequest, match="use format=png"):
            await segment_with(service, options, long)
        with pytest.raises(InvalidRequest, match="not for mask"):
            await segment_with(service, Options(format=FileFormat.WEBP))
        assert_nothing_held(service)

    with_service(tiny, body)


def test_removing_objects_counts_them(tiny: Path) -> None:
    async def body(service: Service) -> None:
        whole = await segment_with(service, Options(threshold=0.0))
        assert whole.objects is None
        assert whole.coverage == 1
        kept = await segment_with(service, Options(threshold=0.0, min_area=10))
        assert (kept.objects, kept.coverage) == (1, 1)
        removed = await segment_with(service, Options(threshold=0.0, exclude_edges=True))
        assert (removed.objects, removed.coverage) == (0, 0)

    with_service(tiny, body)


def test_threshold_of_the_request_replaces_that_of_the_model(tiny: Path) -> None:
    async def body(service: Service) -> None:
        with service.registry.lease(None) as model:
            for threshold, coverage in ((0.0, 1.0), (1.0, 0.0)):
                options = Options(threshold=threshold)
                result = await service.segmenter.segment(model, IMAGE, options, Deadline.after(30))
                assert result.coverage == coverage

    with_service(tiny, body)


def test_stages_are_measured_in_their_order(tiny: Path) -> None:
    async def body(service: Service) -> None:
        result = await segment(service)
        assert list(result.seconds) == ["decode", "queue", "infer", "stitch", "encode"]
        assert all(seconds >= 0 for seconds in result.seconds.values())
        assert read_metric(service, "unet_stage_seconds_count", stage="encode") == 1
        assert read_metric(service, "unet_pixels_total", model="nuclei") == PIXELS.size

    with_service(tiny, body)


def test_small_image_takes_two_calls_of_workers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change of process holds up the engine when all cores are busy."""

    async def body(service: Service) -> None:
        called: list[str] = []
        call = service.workers.call

        async def count(limit: CallLimit, function: Callable[..., Any], *args: Any) -> Any:
            called.append(function.__name__)
            return await call(limit, function, *args)

        monkeypatch.setattr(service.workers, "call", count)
        await segment(service, Output.POLYGONS, Output.OVERLAY)
        assert called == ["inspect_and_decode", "render_outputs"]
        called.clear()
        monkeypatch.setattr(reading, "_SMALL_PIXELS", PIXELS.size - 1)
        await segment(service)
        assert called == ["inspect_and_decode", "decode_and_prepare", "render_outputs"]
        called.clear()
        with service.registry.lease(None) as model:
            await service.segmenter.predict(model, PIXELS, Deadline.after(30))
        assert called == ["prepare_image", "write_mask"]

    with_service(tiny, body)


def test_no_step_of_a_worker_runs_in_the_process_of_the_service(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoders and encoders of this process are broken, and it does not matter."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    for name in ("inspect", "decode", "prepare", "render", "mask_and_confidence"):
        monkeypatch.setattr(steps, name, fail)

    async def body(service: Service) -> None:
        assert (await segment(service, *Output)).width == 200

    with_service(tiny, body)


def test_shared_memory_is_freed_with_its_image(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_MAP_FROM", 50_000)  # some arrays are copied, some are mapped

    def count_open() -> int:
        """Open files; a mapped block is one of them."""
        return len(list(Path("/proc/self/fd").iterdir()))

    async def body(service: Service) -> None:
        service.segmenter.close()
        before = count_open()
        for data in (IMAGE, TRUNCATED, IMAGE):
            with contextlib.suppress(CorruptImage):
                await segment(service, *Output, data=data)
        service.segmenter.close()
        assert count_open() == before

    with_service(tiny, body)


def test_reused_blocks_do_not_change_results(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image is blended in a block that held the pixels of others."""

    async def body(service: Service) -> None:
        expected = await segment(service, *Output)
        monkeypatch.setattr(shared, "_MAP_FROM", 50_000)
        service.segmenter.close()
        for _ in range(3):
            await segment(service, *Output, data=encode(PIXELS[:100, :100]))
            assert (await segment(service, *Output)).rendered == expected.rendered

    with_service(tiny, body)


def test_only_instances_blend_every_channel_of_a_binary_model(tiny: Path) -> None:
    async def body(service: Service) -> None:
        with service.registry.lease(None) as model:
            architecture = dataclasses.replace(model.checkpoint.architecture, out_channels=2)
            checkpoint = dataclasses.replace(model.checkpoint, architecture=architecture)
            with_borders = ServedModel(checkpoint, model.choices)
            assert ImageJob(with_borders, IMAGE).channels == 1
            assert ImageJob(with_borders, IMAGE, needs_all_channels=True).channels == 2

    with_service(tiny, body)


def test_full_queue_rejects_an_image_before_it_is_decoded(tiny: Path) -> None:
    async def body(service: Service) -> None:
        with pytest.raises(CorruptImage):
            await segment(service, data=TRUNCATED)
        reservations = [service.batcher.admit(["other"]) for _ in range(4)]
        with pytest.raises(QueueFull):
            await segment(service, data=TRUNCATED)
        with service.registry.lease(None) as model, pytest.raises(QueueFull):
            service.segmenter.precheck_admission(model, Deadline.never())
        for reservation in reservations:
            reservation.__exit__()
        assert_nothing_held(service)

    with_service(tiny, body, queue_windows=4)


def test_pixels_of_all_requests_are_bounded(tiny: Path) -> None:
    async def body(service: Service) -> None:
        with service.pixels.allocate() as others:
            others.grow(int(service.pixels.limit) - PIXELS.size + 1)
            with pytest.raises(QueueFull, match="megapixels"):
                await segment(service)
        assert_nothing_held(service)
        assert (await segment(service)).width == 200
        assert read_metric(service, "unet_rejected_total", reason="memory") == 1

    with_service(tiny, body)


def test_missed_deadline_is_counted_and_leaves_nothing_behind(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(service: Service) -> None:
        gate = threading.Event()
        (device,) = service.devices
        collect = device.collect

        def collect_later(key: BatchKey, staged: Any) -> Sequence[FloatArray]:
            assert gate.wait(20)
            return collect(key, staged)

        monkeypatch.setattr(device, "collect", collect_later)
        with pytest.raises(DeadlineExceeded, match="before the mask was ready"):
            await segment(service, deadline=Deadline.after(0.3))
        assert_nothing_held(service)
        assert read_metric(service, "unet_rejected_total", reason="deadline") == 1
        gate.set()
        assert (await segment(service)).width == 200

    with_service(tiny, body)


def test_size_is_that_of_the_upright_image_and_bounded(tiny: Path) -> None:
    async def body(service: Service) -> None:
        for image in (IMAGE, PIXELS):
            assert await service.segmenter.reader.size(image) == PIXELS.shape
        for large in (encode(np.zeros((200, 200), np.uint8)), np.zeros((200, 200), np.uint8)):
            with pytest.raises(ImageTooLarge):
                await service.segmenter.reader.size(large)

    with_service(tiny, body, max_megapixels=0.035)


def test_pages_and_channels_are_chosen(tiny: Path) -> None:
    planes = np.stack([np.zeros_like(PIXELS), PIXELS, PIXELS[::-1]])

    async def mask(service: Service, data: bytes, **options: int) -> Segmentation:
        with service.registry.lease(None) as model:
            return await service.segmenter.segment(
                model, data, Options(**options), Deadline.after(30)
            )

    async def body(service: Service) -> None:
        plain = await mask(service, IMAGE)
        assert plain.pages == 1
        for axes, option in (("ZYX", "page"), ("CYX", "channel")):
            buffer = io.BytesIO()
            tifffile.imwrite(buffer, planes, imagej=True, metadata={"axes": axes})
            data = buffer.getvalue()
            pages = 3 if option == "page" else 1
            assert await service.segmenter.reader.count_pages(data) == pages
            chosen = await mask(service, data, **{option: 1})
            assert chosen.pages == pages
            assert chosen.rendered == plain.rendered
            with pytest.raises(WrongSelection, match=f"3 {option}s; choose {option}=0"):
                await mask(service, data)
        assert await service.segmenter.reader.count_pages(IMAGE) == 1
        assert_nothing_held(service)

    with_service(tiny, body)


def test_pages_together_have_no_more_pixels_than_one_image(tiny: Path) -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((40, 200, 150), np.uint8), photometric="minisblack")

    async def body(service: Service) -> None:
        with pytest.raises(ImageTooLarge, match=r"40 pages of 1.2 megapixels"):
            await service.segmenter.reader.count_pages(buffer.getvalue())

    with_service(tiny, body, max_megapixels=1)


def test_golden_mask_ignores_the_queue_and_is_not_counted(tiny: Path) -> None:
    async def body(service: Service) -> None:
        reservations = [service.batcher.admit(["other"]) for _ in range(4)]
        with service.registry.lease(None) as model:
            mask = await service.segmenter.golden_mask(model)
            np.testing.assert_array_equal(mask, model.checkpoint.golden.mask)
        for reservation in reservations:
            reservation.__exit__()
        assert read_metric(service, "unet_images_total", model="nuclei") == 0

    with_service(tiny, body, queue_windows=4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(threshold=0.9), "threshold=0.9 is only available for binary models"),
        (Options((Output.MASK, Output.INSTANCES)), "output=instances is only available for"),
    ],
)
def test_models_of_several_classes_have_no_threshold_and_no_instances(
    options: Options, says: str, three_classes: Path
) -> None:
    async def body(service: Service) -> None:
        with service.registry.lease(None) as model, pytest.raises(InvalidRequest, match=says):
            await service.segmenter.segment(model, IMAGE, options, Deadline.after(30))

    with_service(three_classes, body)


def test_timer_adds_nothing_between_restart_and_record() -> None:
    timer = StageTimer()
    timer.record("first")
    timer.restart()
    timer.record("second")
    assert list(timer.seconds) == ["first", "second"]
    assert 0 <= timer.seconds["second"] < 1
