"""The torch engine on a CUDA device: what a fake one cannot show. Skipped without one."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from app.engine.cuda import CudaEngine, batch_sizes
from app.engine.predictor import engine_predictor
from app.engine.torch_network import FusedUNet
from app.errors import OutOfMemory
from model.arrays import ByteArray, FloatArray, Shape, UInt16Array
from model.checkpoint import Checkpoint, load_checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.evaluation.metrics import Overlap
from model.predict import Predictor, build_network
from model.transforms import normalize, probabilities, to_mask
from tests.drawing import drawn_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ONE_CHANNEL, TWO_CHANNELS = UNetConfig(3, 1, 8, 1), UNetConfig(3, 2, 8, 1)
FULL_WIDTH = UNetConfig(3, 1, 64, 1)
NUCLEI = Path(__file__).parents[2] / "weights" / "nuclei.safetensors"


def untrained(architecture: UNetConfig, *shapes: Shape) -> Checkpoint:
    preprocess = PreprocessConfig(overlap=16, window=shapes)
    return Checkpoint("untrained", architecture, preprocess, drawn_weights(architecture, seed=7))


def build(
    checkpoint: Checkpoint, precision: str = "fp16", max_batch: int = 4, device: str = "cuda:0"
) -> CudaEngine:
    return CudaEngine(checkpoint, device=device, precision=precision, max_batch=max_batch)


def draw(engine: CudaEngine, shape: Shape, count: int, seed: int = 5) -> ByteArray:
    staged = engine.stage(shape, count)
    staged[:] = np.random.default_rng(seed).integers(0, 256, staged.shape)
    return staged


def compute(engine: CudaEngine, windows: ByteArray) -> FloatArray:
    return engine.collect(engine.submit(windows)) / np.float32(65535)


@torch.inference_mode()
def reference(checkpoint: Checkpoint, windows: ByteArray) -> FloatArray:
    """Compute probabilities by `model.unet` in fp32 on the CPU."""
    inputs = normalize(torch.from_numpy(windows), checkpoint.preprocess)
    logits = build_network(checkpoint).eval()(inputs)
    return probabilities(logits, checkpoint.preprocess).numpy()


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-2), ("fp16", 2e-2), ("bf16", 1e-1)]
)
def test_cuda_computes_the_network_at_every_batch_size(precision: str, tolerance: float) -> None:
    """Compare CUDA graphs of every batch size, also padded ones, with the reference.

    Tolerances are twice the largest differences that rounding on a CPU gave: 0.0045 with TF32,
    which fp32 convolutions may use, 0.005 in fp16 and 0.044 in bf16.
    """
    checkpoint = untrained(TWO_CHANNELS, (96, 64))
    engine = build(checkpoint, precision, max_batch=6)
    engine.warm()
    for count in (1, 2, 3, 4, 5, 6):
        windows = draw(engine, (96, 64), count)
        result = compute(engine, windows)
        assert np.abs(result - reference(checkpoint, windows)).max() <= tolerance
        alone = compute(engine, np.ascontiguousarray(windows[-1:]))
        assert np.abs(alone - result[-1:]).max() <= tolerance


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_are_captured_for_every_shape_and_batch_size(precision: str) -> None:
    shapes = ((64, 96), (96, 64), (128, 128))
    engine = build(untrained(ONE_CHANNEL, *shapes), precision, max_batch=8)
    engine.warm()
    assert engine.captured() == {(shape, size) for shape in shapes for size in batch_sizes(8)}


@pytest.mark.skipif(not NUCLEI.exists(), reason="needs the weights of nuclei")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_masks_agree_with_those_of_fp32(precision: str) -> None:
    checkpoint = load_checkpoint(NUCLEI)
    image = checkpoint.golden.image
    engine = build(checkpoint, precision, max_batch=1)
    mask = to_mask(engine_predictor(engine, checkpoint)(image), checkpoint.preprocess)
    expected = to_mask(Predictor.of(checkpoint)(image), checkpoint.preprocess)
    assert Overlap.of_classes(mask, expected).iou >= 0.99


def test_batches_in_flight_do_not_disturb_each_other() -> None:
    engine = build(untrained(ONE_CHANNEL, (64, 96), (256, 256)), max_batch=8)
    engine.warm()
    rng = np.random.default_rng(0)
    batches = []
    for seed in range(60):
        shape = engine.shapes[rng.integers(2)]
        batches.append(draw(engine, shape, int(rng.integers(1, 9)), seed))
    alone = [engine.collect(engine.submit(each)) for each in batches]
    flights = [engine.submit(batches[0])]
    for n, expected in enumerate(alone):
        if n + 1 < len(batches):
            flights.append(engine.submit(batches[n + 1]))
        assert np.array_equal(engine.collect(flights.pop(0)), expected)


def test_cuda_allocates_no_memory_after_warming() -> None:
    engine = build(untrained(ONE_CHANNEL, (64, 96), (128, 128)), "bf16")
    engine.warm()
    for count in (1, 2, 3, 4):
        compute(engine, draw(engine, (128, 128), count))
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for count in (4, 1, 3, 2) * 5:
        compute(engine, draw(engine, (128, 128), count))
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_host_sleeps_while_it_waits() -> None:
    engine = build(untrained(FULL_WIDTH, (512, 512)), max_batch=4)
    engine.warm()
    windows = draw(engine, (512, 512), 4)
    compute(engine, windows)
    wall, cpu = 0.0, 0.0
    for _ in range(10):
        submitted = engine.submit(windows)
        start = time.perf_counter(), time.thread_time()
        engine.collect(submitted)
        wall += time.perf_counter() - start[0]
        cpu += time.thread_time() - start[1]
    assert cpu < 0.5 * wall


def test_model_is_captured_while_another_thread_stages_windows() -> None:
    """As when a second model is loaded under load: batches run between two steps."""
    first = build(untrained(ONE_CHANNEL, (64, 96)))
    first.warm()
    windows = draw(first, (64, 96), 3)
    expected = first.collect(first.submit(windows))
    stop = threading.Event()
    errors: list[Exception] = []

    def stage() -> None:
        while not stop.is_set():
            try:
                first.stage((64, 96), 4)
            except Exception as error:
                errors.append(error)
                return

    staging = threading.Thread(target=stage)
    staging.start()
    try:
        second = build(untrained(TWO_CHANNELS, (128, 128)))
        for step in second.warm_steps():
            step()
            assert np.array_equal(first.collect(first.submit(windows)), expected)
    finally:
        stop.set()
        staging.join()
    assert errors == []
    assert len(second.captured()) == len(batch_sizes(4))


@pytest.fixture
def scarce_memory() -> Iterator[list[torch.Tensor]]:
    """All but a gigabyte of the device's memory; a test may free it."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(0)
    hog = [torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda:0")]
    yield hog
    hog.clear()
    torch.cuda.empty_cache()


def test_lack_of_memory_costs_large_batches_and_passes(scarce_memory: list[torch.Tensor]) -> None:
    engine = build(untrained(FULL_WIDTH, (512, 512)), max_batch=16)
    engine.warm()
    assert ((512, 512), 1) in engine.captured()
    assert ((512, 512), 16) not in engine.captured()
    windows = draw(engine, (512, 512), 16)
    with pytest.raises(OutOfMemory):
        compute(engine, windows)
    one = compute(engine, np.ascontiguousarray(windows[:1]))
    scarce_memory.clear()
    torch.cuda.empty_cache()
    assert np.abs(compute(engine, windows)[:1] - one).max() <= 2e-2


def test_closed_engine_returns_its_memory() -> None:
    def used() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = used()
    engine = build(untrained(FULL_WIDTH, (256, 256)))
    engine.warm()
    engine.submit(draw(engine, (256, 256), 4))  # never collected
    assert used() > before
    engine.close()
    del engine
    assert used() - before < 1 << 20  # constants of the normalization stay


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)
def test_every_device_computes_its_own_batches() -> None:
    checkpoint = untrained(ONE_CHANNEL, (64, 96))
    engines = [build(checkpoint, device=f"cuda:{index}") for index in range(2)]
    for engine in engines:
        engine.warm()
        assert len(engine.captured()) == len(batch_sizes(4))
    results: list[list[UInt16Array]] = [[], []]
    for seed in range(4):
        windows = [draw(engine, (64, 96), 2, seed) for engine in engines]
        flights = [engine.submit(each) for engine, each in zip(engines, windows, strict=True)]
        for result, engine, flight in zip(results, engines, flights, strict=True):
            result.append(engine.collect(flight))
        expected = reference(checkpoint, windows[0])
        for result in results:
            assert np.abs(result[-1] / 65535 - expected).max() <= 2e-2
    assert not np.array_equal(results[1][0], results[1][1])  # not a replay of old outputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("grow", "pool"), [(False, False), (True, False), (True, True)])
@torch.inference_mode()
def test_fused_layers_compute_the_network_in_cudnn(
    dtype: torch.dtype, grow: bool, pool: bool
) -> None:
    network = build_network(untrained(TWO_CHANNELS, (96, 64))).eval().cuda()
    network = network.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(2, 3, 96, 64, device="cuda", dtype=dtype)
    fused = FusedUNet(network, grow_by_product=grow, pool_by_maxima=pool)
    expected, result = network(x).float().sigmoid(), fused(x).float().sigmoid()
    assert (expected - result).abs().max() <= (1e-1 if dtype is torch.bfloat16 else 2e-2)
