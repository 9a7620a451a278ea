"""The torch engine on a CUDA device. Skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.engine.cuda import CudaEngine, batch_sizes
from model.arrays import ByteArray, FloatArray, Shape
from model.checkpoint import Checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.predict import build_network
from model.transforms import normalize, probabilities
from tests.drawing import drawn_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ONE_CHANNEL, TWO_CHANNELS = UNetConfig(3, 1, 8, 1), UNetConfig(3, 2, 8, 1)


def untrained(architecture: UNetConfig, shapes: tuple[Shape, ...]) -> Checkpoint:
    preprocess = PreprocessConfig(overlap=16, window=shapes)
    return Checkpoint("untrained", architecture, preprocess, drawn_weights(architecture, seed=7))


@torch.inference_mode()
def reference(checkpoint: Checkpoint, windows: ByteArray) -> FloatArray:
    """Compute probabilities by `model.unet` in fp32 on the CPU."""
    inputs = normalize(torch.from_numpy(windows), checkpoint.preprocess)
    logits = build_network(checkpoint).eval()(inputs)
    return probabilities(logits, checkpoint.preprocess).numpy()


def compute(engine: CudaEngine, windows: ByteArray) -> FloatArray:
    """Compute a batch of windows as probabilities in 0..1."""
    shape = (windows.shape[1], windows.shape[2])
    staged = engine.stage(shape, len(windows))
    staged[:] = windows
    return engine.collect(engine.submit(staged)) / np.float32(65535)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-2), ("fp16", 2e-2), ("bf16", 1e-1)]
)
def test_cuda_computes_the_network_at_every_batch_size(precision: str, tolerance: float) -> None:
    """Compare CUDA graphs of every batch size, also padded ones, with the reference.

    Tolerances are twice the largest differences that rounding on a CPU gave: 0.0045 with TF32,
    which fp32 convolutions may use, 0.005 in fp16 and 0.044 in bf16.
    """
    checkpoint = untrained(TWO_CHANNELS, ((96, 64),))
    engine = CudaEngine(checkpoint, device="cuda:0", precision=precision, max_batch=6)
    engine.warm()
    assert sorted(size for _, size in engine.captured()) == list(batch_sizes(6))
    rng = np.random.default_rng(5)
    for count in (1, 2, 3, 4, 5, 6):
        staged = rng.integers(0, 256, (count, 96, 64, 3)).astype(np.uint8)
        expected = reference(checkpoint, staged)
        result = compute(engine, staged)
        assert np.abs(result - expected).max() <= tolerance
        alone = compute(engine, staged[-1:])
        assert np.abs(alone - result[-1:]).max() <= tolerance


def test_cuda_allocates_no_memory_after_warming() -> None:
    checkpoint = untrained(ONE_CHANNEL, ((64, 96), (128, 128)))
    engine = CudaEngine(checkpoint, device="cuda:0", precision="bf16", max_batch=4)
    engine.warm()

    def run(count: int) -> None:
        engine.collect(engine.submit(engine.stage((128, 128), count)))

    for count in (1, 2, 3, 4):
        run(count)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for count in (4, 1, 3, 2) * 5:
        run(count)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
