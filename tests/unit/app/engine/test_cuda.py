"""The CUDA engine on a fake device: order, capture, memory and loss. Real ones: `tests/gpu`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine import cuda as cuda_engine
from app.engine.cuda import CudaEngine, batch_sizes
from app.engine.cuda_queues import CudaQueues
from app.engine.torch import TorchEngine
from app.engine.torch_network import FusedUNet, WindowNetwork
from app.errors import DeviceLost, EngineError, NonFiniteOutput, OutOfMemory
from model import transforms
from model.arrays import ByteArray, FloatArray
from model.checkpoint import Checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.predict import build_network
from model.transforms import to_mask
from tests.conftest import drawn_weights
from tests.fake_cuda import FakeCuda, FakeQueues, FakeStream, fake_cuda

LARGE, SMALL = (32, 48), (32, 32)
UNIT = 1 / 65535
SMALLEST = UNetConfig(3, 2, 2, 1)


def untrained(architecture: UNetConfig = SMALLEST) -> Checkpoint:
    preprocess = PreprocessConfig(overlap=16, window=(SMALL, LARGE))
    return Checkpoint("untrained", architecture, preprocess, drawn_weights(architecture, seed=7))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    transforms._constants_by_device.clear()  # as in a new process
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these operators are small
    with fake_cuda(monkeypatch) as fake:
        yield fake
    torch.set_num_threads(threads)


def build(checkpoint: Checkpoint | None = None, *, max_batch: int = 4) -> CudaEngine:
    return CudaEngine(
        checkpoint or untrained(),
        device="cuda:0",
        precision="fp32",
        max_batch=max_batch,
        queues=FakeQueues("cpu"),
    )


@pytest.fixture
def engine(cuda: FakeCuda) -> CudaEngine:
    engine = build()
    engine.warm()
    return engine


def draw(engine: CudaEngine, count: int, seed: int = 0) -> ByteArray:
    staged = engine.stage(LARGE, count)
    staged[:] = np.random.default_rng(seed).integers(0, 256, staged.shape)
    return staged


def reference(windows: ByteArray) -> FloatArray:
    return TorchEngine(untrained(), max_batch=len(windows)).collect(windows)


def test_every_shape_is_captured_at_every_batch_size(engine: CudaEngine) -> None:
    expected = {(shape, size) for shape in (LARGE, SMALL) for size in (1, 2, 3, 4)}
    assert engine.captured() == expected


def test_batches_of_every_size_agree_with_the_reference(cuda: FakeCuda) -> None:
    engine = build(max_batch=6)
    engine.warm()
    for count in range(1, 7):  # 5 is padded to 6
        windows = draw(engine, count, seed=count)
        result = engine.collect(engine.submit(windows))
        assert result.dtype == np.uint16
        assert np.abs(result * UNIT - reference(windows)).max() <= 0.5 * UNIT + 1e-6


def test_batch_sizes_waste_less_than_a_third() -> None:
    assert batch_sizes(16) == (1, 2, 3, 4, 6, 8, 12, 16)
    assert batch_sizes(7) == (1, 2, 3, 4, 6, 7)
    assert batch_sizes(1) == (1,)
    for count in range(1, 65):
        size = next(size for size in batch_sizes(64) if size >= count)
        assert 3 * (size - count) < size


def test_two_batches_are_in_flight_and_events_order_them(
    cuda: FakeCuda, engine: CudaEngine
) -> None:
    batches = [draw(engine, 1 + n % 4, seed=n) for n in range(6)]
    flights = [engine.submit(batches[0]), engine.submit(batches[1])]
    for n, windows in enumerate(batches):
        flight = flights.pop(0)
        result = engine.collect(flight)
        for tensor in (flight.outputs, flight.finite):
            cuda.access("host", "numpy", tensor, write=False)
        if n + 2 < len(batches):
            flights.append(engine.submit(batches[n + 2]))
        assert np.abs(result * UNIT - reference(windows)).max() <= UNIT
    assert cuda.races == []


@pytest.mark.parametrize("missing", range(4))
def test_every_event_is_needed(
    missing: int, cuda: FakeCuda, engine: CudaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race detector notices each wait that is left out."""
    waits = iter(range(10**6))
    wait_event = FakeStream.wait_event

    def wait_for_most(self: FakeStream, event: Any) -> None:
        if next(waits) % 4 != missing:
            wait_event(self, event)

    monkeypatch.setattr(FakeStream, "wait_event", wait_for_most)
    for n in range(4):  # without collecting, which orders the host
        engine.submit(draw(engine, 2, seed=n))
    assert cuda.races


def test_host_waits_once_per_batch_and_sleeps_meanwhile(cuda: FakeCuda, engine: CudaEngine) -> None:
    cuda.waits.clear()
    first, second = engine.submit(draw(engine, 2)), engine.submit(draw(engine, 4))
    assert not cuda.waits  # submitting waits for nothing
    engine.collect(first)
    engine.collect(second)
    assert cuda.waits == {"event": 2}  # not "spinning"


def test_steady_state_allocates_nothing_on_the_device(cuda: FakeCuda, engine: CudaEngine) -> None:
    windows = draw(engine, 3)
    cuda.copies.clear()
    cuda.allocations.clear()
    flight = engine.submit(windows)
    assert cuda.allocations == ["aten::empty"] * 2  # pinned memory of the host for the results
    engine.collect(flight)
    # to the slot, to the graph's input, and two results to the slot and two to the host
    assert cuda.copies == ["aten::copy_"] * 6


def test_capture_and_replay_use_one_stream_per_device(cuda: FakeCuda) -> None:
    queues = [FakeQueues("cpu"), FakeQueues("meta")]
    engine = CudaEngine(
        untrained(), device="cuda:0", precision="fp32", max_batch=2, queues=queues[0]
    )
    engine.warm()
    assert set(cuda.captures) == {queues[0].compute}
    assert len({each.compute for each in queues}) == 2


def test_no_memory_is_lent_to_another_stream(
    engine: CudaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("torch never reuses such memory after an invalid capture")

    monkeypatch.setattr(Tensor, "record_stream", fail)
    engine.collect(engine.submit(draw(engine, 2)))


def fail_on(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the network fail while it is captured."""
    forward = WindowNetwork.forward

    def fail(self: WindowNetwork, windows: Tensor) -> Tensor:
        if torch.cuda.Event().cuda.graph is not None:  # type: ignore[no-untyped-call]
            raise error
        return forward(self, windows)

    monkeypatch.setattr(WindowNetwork, "forward", fail)


def test_copy_from_the_host_cannot_be_captured_and_stops_the_model(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = WindowNetwork.forward
    monkeypatch.setattr(
        WindowNetwork,
        "forward",
        lambda self, windows: forward(self, windows) * windows.new_tensor([1.0]),
    )
    engine = build()
    with pytest.raises(EngineError, match="not permitted when stream is capturing"):
        engine.warm()
    assert engine.captured() == set()


def test_no_capture_follows_an_invalid_one(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()
    with monkeypatch.context() as patch:
        fail_on(patch, RuntimeError("CUDA error: capture invalidated\nmore"))
        with pytest.raises(EngineError, match=r"^cpu: CUDA error: capture invalidated$"):
            engine.warm()
    with pytest.raises(EngineError, match="a capture has failed before"):
        engine.warm()
    assert len(cuda.captures) == 1


def test_batch_sizes_that_memory_does_not_hold_are_left_to_the_batcher(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    engine = build()
    cuda.memory = 3 * 4 * 32 * 48  # values of the largest activation of three large windows
    engine.warm()
    assert engine.captured() == {(SMALL, n) for n in (1, 2, 3, 4)} | {(LARGE, n) for n in (1, 2, 3)}
    assert "not enough memory for 4 windows of 32x48" in caplog.text
    windows = draw(engine, 4)  # without a graph
    result = engine.collect(engine.submit(windows))
    assert np.abs(result * UNIT - reference(windows)).max() <= UNIT


def test_graphs_are_captured_when_all_sizes_were_run_without_one(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the largest graph and a run of a smaller batch need memory at the same time."""
    order: list[str] = []
    for name in ("burn_in", "return_memory", "capture"):
        original = getattr(CudaQueues, name)

        def record(
            queues: CudaQueues, *args: Any, name: str = name, original: Any = original
        ) -> Any:
            order.append(name)
            return original(queues, *args)

        monkeypatch.setattr(CudaQueues, name, record)
    build().warm()
    assert order == ["burn_in"] * 8 + ["return_memory"] + ["capture"] * 8


def test_memory_for_less_than_one_window_stops_the_model(cuda: FakeCuda) -> None:
    engine = build()
    cuda.memory = 1000
    with pytest.raises(OutOfMemory, match="out of memory"):
        engine.warm()


@pytest.mark.parametrize("call", ["stage", "submit", "collect", "check", "close"])
def test_loss_is_noticed_by_every_call(call: str, cuda: FakeCuda, engine: CudaEngine) -> None:
    windows = draw(engine, 1)
    submitted = engine.submit(windows)
    cuda.lost = True
    calls = {
        "stage": lambda: engine.stage(LARGE, 1),
        "submit": lambda: engine.submit(windows),
        "collect": lambda: engine.collect(submitted),
        "check": engine.check,
        "close": engine.close,
    }
    with pytest.raises(DeviceLost, match=r"^cpu: CUDA error: the launch failed$"):
        calls[call]()


def test_error_of_a_device_that_responds_is_not_a_loss(
    cuda: FakeCuda, engine: CudaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for the whole device would fail while another thread captures; the fake forbids it."""

    def fail(self: object, batch: object) -> None:
        raise RuntimeError("cuDNN error: EXECUTION_FAILED")

    monkeypatch.setattr(CudaEngine, "_compute_batch", fail)
    with pytest.raises(EngineError, match="EXECUTION_FAILED") as caught:
        engine.submit(draw(engine, 1))
    assert type(caught.value) is EngineError


def test_check_returns_the_memory_in_use(engine: CudaEngine) -> None:
    assert engine.check() == 70


def test_device_that_may_not_be_used_is_reported_in_one_line(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.lost = True
    with pytest.raises(EngineError, match=r"^cuda:0: CUDA error: the launch failed$"):
        CudaQueues("cuda:0")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found_on_the_device(value: float, cuda: FakeCuda) -> None:
    broken = untrained()
    broken.state["final_conv.bias"][1] = value
    broken_engine = build(broken)
    submitted = broken_engine.submit(draw(broken_engine, 2))
    if np.isnan(value):
        with pytest.raises(NonFiniteOutput):
            broken_engine.collect(submitted)
    else:
        assert (broken_engine.collect(submitted)[:, 1] == 65535).all()  # a sigmoid is at most 1


def test_mask_of_integers_is_the_mask_of_floats() -> None:
    """At a threshold of 0.5, also for the floats next to it."""
    half = np.float32(0.5)
    close = [half, *(np.nextafter(half, np.float32(end)) for end in (0, 1)), 0, 1, UNIT, 1 - UNIT]
    exact = np.array([close, *np.random.default_rng(0).random((9, len(close)))], np.float32)[None]
    integers = torch.empty(exact.shape, dtype=torch.uint16)
    integers.copy_(torch.from_numpy(exact) * cuda_engine._LARGEST + 0.5)
    restored = integers.numpy() / np.float32(65535)
    config = PreprocessConfig()
    assert np.array_equal(to_mask(restored, config), to_mask(exact, config))


@pytest.mark.parametrize(
    "architecture",
    [SMALLEST, UNetConfig(1, 9, 2, 0), UNetConfig(3, 2, 8, 1), UNetConfig(1, 1, 4, 0)],
)
@pytest.mark.parametrize(("grow", "pool"), [(False, False), (True, False), (True, True)])
def test_fused_layers_compute_the_network(architecture: UNetConfig, grow: bool, pool: bool) -> None:
    network = build_network(untrained(architecture)).eval()
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calls: list[tuple[int, int]] = []

    def convolve(x: Tensor, layer: torch.nn.Conv2d) -> Tensor:
        calls.append((layer.in_channels, layer.out_channels))
        return layer(x).relu()  # type: ignore[no-any-return]

    side = 64 if architecture.padding else 188
    x = torch.rand(2, architecture.in_channels, side, side)
    x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        fused = FusedUNet(network, convolve, grow_by_product=grow, pool_by_maxima=pool)
        torch.testing.assert_close(fused(x), network(x))
    assert len(calls) == 18
    assert calls[0] == (8, architecture.base_features)


@pytest.mark.parametrize("fastest", range(4))
def test_fastest_form_of_the_network_is_used(
    fastest: int, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convolve(x: Tensor, layer: torch.nn.Conv2d, *_: object) -> Tensor:
        return layer(x).relu()  # type: ignore[no-any-return]

    measured: list[torch.nn.Module] = []
    times = iter([0.5 if form == fastest else 1.0 for form in range(4)])

    def measure(self: CudaQueues, function: Any) -> float:
        function()
        measured.append(engine._network.unet)
        return next(times)

    monkeypatch.setattr(FusedUNet.__init__, "__defaults__", (convolve,))
    monkeypatch.setattr(CudaQueues, "measure", measure)
    engine = build()
    engine._choose_network(LARGE)
    assert len(measured) == len(set(measured)) == 4
    assert engine._network.unet is measured[fastest]


def test_layers_that_cannot_be_fused_are_left_alone(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    """A CPU has no cuDNN."""
    engine = build()
    engine._choose_network(LARGE)
    assert not isinstance(engine._network.unet, FusedUNet)
    assert "no fused layers" in caplog.text


def test_lack_of_memory_keeps_no_tensors_and_gives_no_advice(cuda: FakeCuda) -> None:
    """The text is that of torch 2.11."""
    sentences = (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB "
        "of which 11.12 MiB is free."
    )
    queues = CudaQueues("cuda:0")

    def run_out() -> None:
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError(
            f"{sentences} Including non-PyTorch memory, this process has 139.78 GiB memory in use. "
            "See documentation for Memory Management"
        )

    kept: list[weakref.ref[Tensor]] = []
    with pytest.raises(OutOfMemory) as raised, queues.errors():
        run_out()
    assert str(raised.value) == f"cuda:0: {sentences}"
    assert kept[0]() is None
