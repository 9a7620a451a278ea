"""int8 on the CPU: close to the network, with every layer in 8 bits."""

from __future__ import annotations

import dataclasses
import platform
from collections import Counter

import numpy as np
import pytest
import torch

from app.engine.openvino import OpenVinoEngine
from app.engine.quantize import equalize_branches
from model.checkpoint import Checkpoint
from model.config import Calibration, PreprocessConfig, UNetConfig
from model.convert.calibration import measure_ranges
from model.predict import Predictor
from model.unet import UNet
from tests.conftest import nuclei
from tests.parity.test_engines import CASES as ENGINE_CASES
from tests.parity.test_engines import reference, untrained

MAX_MEAN_ERROR, MAX_ERROR = 0.02, 0.2  # of a probability
IMAGES = [np.stack([nuclei(130, 110, seed)[0]] * 3, -1) for seed in range(2)]
CASES = {
    **ENGINE_CASES,
    "unpadded": (UNetConfig(3, 1, 8, 0), PreprocessConfig(window=((300, 316), (188, 204)))),
}


def calibrate(checkpoint: Checkpoint) -> Checkpoint:
    ranges = measure_ranges(Predictor.of(checkpoint), IMAGES)
    return dataclasses.replace(checkpoint, calibration=Calibration(ranges))


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return calibrate(untrained(*CASES[request.param]))


def build_int8(checkpoint: Checkpoint) -> OpenVinoEngine:
    return OpenVinoEngine(checkpoint, threads=2, max_batch=4, precision="int8")


def stage_windows(engine: OpenVinoEngine, count: int = 1, which: int = 0) -> np.ndarray:
    staged = engine.stage(engine.shapes[which], count)
    for index, window in enumerate(staged):
        image, _ = nuclei(*engine.shapes[which], seed=20 + index)
        window[:] = image[..., None]
    return staged


def test_int8_is_close_to_the_network(checkpoint: Checkpoint) -> None:
    engine = build_int8(checkpoint)
    for which in range(len(engine.shapes)):
        staged = stage_windows(engine, 2, which)
        error = np.abs(engine.collect(engine.submit(staged)) - reference(checkpoint, staged))
        assert error.mean() <= MAX_MEAN_ERROR
        assert error.max() <= MAX_ERROR


def test_every_layer_runs_in_8_bits(checkpoint: Checkpoint) -> None:
    """Also the first, the pooling, the concatenation and the last; only logits are floats."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("other processors have other kernels")
    expected = {"Convolution": 19, "Deconvolution": 4, "Pooling": 4, "Concatenation": 4}
    layers = [layer for layer in build_int8(checkpoint).layers() if layer[0] in expected]
    assert Counter(kind for kind, _ in layers) == expected
    assert {precision for _, precision in layers} <= {"u8", "i8"}


def test_a_window_depends_neither_on_its_batch_nor_on_warming(checkpoint: Checkpoint) -> None:
    cold, warm = build_int8(checkpoint), build_int8(checkpoint)
    warm.warm()
    for which in range(len(warm.shapes)):
        staged = stage_windows(warm, 4, which)
        together = np.array(warm.collect(staged), copy=True)
        for index in range(4):
            assert np.array_equal(
                cold.collect(staged[index : index + 1].copy())[0], together[index]
            )


@pytest.mark.parametrize("case", CASES)
def test_equalizing_branches_is_exact_in_fp32(case: str) -> None:
    checkpoint = calibrate(untrained(*CASES[case]))
    assert checkpoint.calibration is not None
    state = equalize_branches(checkpoint.state, checkpoint.calibration.ranges)
    assert any(not np.array_equal(state[name], checkpoint.state[name]) for name in state)
    network = UNet.from_config(checkpoint.architecture).eval()
    size = (208, 224) if checkpoint.architecture.padding else (188, 204)
    inputs = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    logits = []
    for tensors in (checkpoint.state, state):
        network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
        with torch.inference_mode():
            logits.append(network(inputs))
    assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_an_up_sampled_branch_may_have_a_much_larger_range_than_its_skip() -> None:
    """25 times as large, and read by weights 25 times smaller; one shared scale would ruin it."""
    plain = untrained(*CASES["padded"])
    state = dict(plain.state)
    for level in range(4):
        up, joined = f"up_sample.{level}.up", f"up_conv.{level}.first.weight"
        half = state[f"{up}.bias"].size
        state[joined] = state[joined].copy()
        state[joined][:, :half] /= 25
        for name in (f"{up}.weight", f"{up}.bias"):
            state[name] = state[name] * 25
    lopsided = dataclasses.replace(plain, state=state)
    results = []
    for each in (plain, lopsided):
        engine = build_int8(calibrate(each))
        staged = stage_windows(engine)
        results.append(
            np.abs(engine.collect(engine.submit(staged)) - reference(plain, staged)).mean()
        )
    assert results[1] <= 1.1 * results[0]
