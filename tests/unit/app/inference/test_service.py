"""The service without HTTP: when it is ready and alive, and how it stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.engine.device_engines import BatchKey
from app.engine.openvino import OpenVinoEngine
from app.errors import DeviceLost, SettingsError, Unavailable
from app.imaging.workers.worker import CallLimit
from app.inference import service as service_module
from app.inference.allocator import trim_memory
from app.inference.service import Service
from app.metrics import Metrics
from app.settings import Settings, load_settings
from model.arrays import FloatArray
from tests.conftest import write_tiny
from tests.devices import until
from tests.in_process import read_metric, with_service


def test_default_model_that_does_not_exist_aborts_startup(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"UNET_MODEL='cells': .* holds nuclei$"):
        Service(Settings(weights_dir=tiny, model="cells"))
    with pytest.raises(SettingsError, match=r"holds no \.safetensors files$"):
        Service(Settings(weights_dir=tmp_path))
    for name in ("lit", "whole"):
        write_tiny(tmp_path / f"{name}.safetensors")
    with pytest.raises(SettingsError) as caught:
        Service(load_settings(weights_dir=str(tmp_path)))
    assert str(caught.value) == (
        f"UNET_MODEL is not set, and {tmp_path} holds lit, whole; set UNET_MODEL or --model to one "
        "of them"
    )


def test_service_is_ready_once_the_default_model_is_loaded(tiny: Path) -> None:
    async def body(service: Service) -> None:
        assert service.readiness_error() == "starting: nuclei is loading"
        assert service.liveness_error() is None
        assert not service.started
        with pytest.raises(Unavailable, match="is loading"):
            service.check_ready()
        await service.start()
        await until(lambda: service.started)
        assert service.readiness_error() is None
        assert read_metric(service, "unet_ready") == 1

    with_service(tiny, body, load=False)


def test_memory_is_given_back_after_loading_and_in_pauses(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed = 0
    monkeypatch.setattr(service_module, "_IDLE_S", 0.02)

    async def body(service: Service) -> None:
        call_each = service.workers.call_each

        async def count(limit: CallLimit, function: Callable[..., Any], *args: Any) -> None:
            nonlocal trimmed
            await call_each(limit, function, *args)
            trimmed += function is trim_memory

        monkeypatch.setattr(service.workers, "call_each", count)
        await service.start()
        await until(lambda: trimmed == 1)
        for requests in (1, 5):
            before = trimmed
            for _ in range(requests):
                with service.track_request():
                    pass
            await until(lambda: trimmed > before)  # noqa: B023
            await asyncio.sleep(0.2)
            assert trimmed == before + 1  # once in each pause

    with_service(tiny, body, load=False)


def test_bad_default_model_is_why_the_service_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "nuclei.safetensors").write_bytes(b"not a checkpoint")

    async def body(service: Service) -> None:
        await service.start()
        await service.failed.wait()
        assert "the default model cannot be served" in str(service.readiness_error())
        assert service.liveness_error() is None

    with_service(tmp_path, body, load=False)


def test_drain_waits_for_accepted_requests_and_accepts_no_more(tiny: Path) -> None:
    async def body(service: Service) -> None:
        end = asyncio.Event()

        async def handle_request() -> None:
            with service.track_request():
                await end.wait()

        request = asyncio.create_task(handle_request())
        await asyncio.sleep(0)
        drain = asyncio.create_task(service.drain())
        await asyncio.sleep(0.01)
        assert not drain.done()
        assert service.readiness_error() == "draining: the service is about to stop"
        with pytest.raises(Unavailable), service.track_request():
            pass
        end.set()
        await asyncio.gather(request, drain)

    with_service(tiny, body)


def test_cancel_accepted_ends_the_requests_that_are_not_answered(tiny: Path) -> None:
    async def body(service: Service) -> None:
        async def handle_request(seconds: float) -> None:
            with service.track_request():
                await asyncio.sleep(seconds)

        requests = [asyncio.create_task(handle_request(seconds)) for seconds in (0, 60, 60)]
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        assert service.cancel_accepted() == 2
        await asyncio.gather(*requests, return_exceptions=True)
        assert [request.cancelled() for request in requests] == [False, True, True]
        await service.drain()

    with_service(tiny, body)


def test_hung_or_lost_engine_is_not_alive(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(service: Service) -> None:
        gate = threading.Event()
        (device,) = service.devices

        def hang(key: BatchKey, staged: Any) -> Sequence[FloatArray]:
            assert gate.wait(20)
            raise DeviceLost("illegal address")

        monkeypatch.setattr(device, "collect", hang)
        with service.registry.lease(None) as model:
            golden = asyncio.create_task(service.segmenter.golden_mask(model))
            await until(lambda: service.liveness_error() is not None)
            assert "the engine is hung" in str(service.liveness_error())
            assert "the engine is hung" in str(service.readiness_error())
            gate.set()
            with pytest.raises(Unavailable):
                await golden
        assert service.liveness_error() == "the engine is lost; see the server log"

    with_service(tiny, body, watchdog_s=0.1)


def test_loss_of_a_device_is_noticed_without_a_request(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: OpenVinoEngine) -> float:
        raise DeviceLost("cpu: fell off the bus")

    async def body(service: Service) -> None:
        await service.start()
        await until(lambda: service.started)
        monkeypatch.setattr(OpenVinoEngine, "check", lost)
        await until(lambda: service.liveness_error() is not None)
        assert service.liveness_error() == "the engine is lost; see the server log"

    with_service(tiny, body, load=False, watchdog_s=2)


def test_engine_that_hangs_while_it_is_freed_does_not_delay_the_end(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, closing = threading.Event(), threading.Event()

    def hang(self: OpenVinoEngine) -> None:
        closing.set()
        assert gate.wait(20)

    monkeypatch.setattr(OpenVinoEngine, "close", hang)

    async def scene() -> None:
        service = Service(Settings(weights_dir=tiny, threads=1, image_workers=1))
        await service.start_without_probes()
        async with asyncio.timeout(5):
            await service.stop()
        assert closing.wait(5)

    try:
        asyncio.run(scene())
    finally:
        gate.set()


def test_metrics_show_a_devices_memory_without_a_call_to_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(service: Service) -> None:
        (device,) = service.devices
        device.name = "cuda:0"
        service.metrics = Metrics()
        service._register_gpu_memory()
        device.used_bytes = 70.0

        def hang() -> None:
            raise AssertionError("on the event loop")

        monkeypatch.setattr(device, "check", hang)
        assert read_metric(service, "unet_gpu_memory_used_bytes", device="cuda:0") == 70

    with_service(tiny, body, load=False)


def test_engines_are_warmed_and_freed_on_the_thread_that_runs_them(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches of cuDNN, streams and OpenMP pools belong to a thread."""
    threads: dict[str, set[str]] = {}

    def record(name: str) -> None:
        method = getattr(OpenVinoEngine, name)

        def recorded(self: OpenVinoEngine, *args: Any) -> Any:
            threads.setdefault(name, set()).add(threading.current_thread().name)
            return method(self, *args)

        monkeypatch.setattr(OpenVinoEngine, name, recorded)

    for name in ("_compute_black", "submit", "collect", "close"):
        record(name)

    async def body(service: Service) -> None:
        with service.registry.lease(None) as model:
            await service.segmenter.golden_mask(model)
        service.registry.close()
        await service.batcher.workers[0].call(lambda: None)

    with_service(tiny, body)
    assert threads == {name: {"cpu"} for name in ("_compute_black", "submit", "collect", "close")}
