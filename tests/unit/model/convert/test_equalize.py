"""Channels that use the range of their layer: the same network, and a more exact int8."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from app.engine.quantize import quantize_weights
from model.checkpoint import Checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.convert.equalize import MAX_FACTOR, equalize_channels, measure_channels
from model.predict import Predictor
from tests.conftest import drawn_weights, nuclei

IMAGES = [nuclei(64, 96, seed)[0] for seed in range(2)]


@pytest.fixture(params=[(1, 1), (3, 1), (1, 0)], ids=["binary", "classes", "unpadded"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    """A network with a quiet channel in each layer, on which the next layer depends much."""
    outputs, padding = request.param
    architecture = UNetConfig(3, outputs, 4, padding)
    classes = ("background", "a", "b")[: max(2, outputs)]
    palette = ((0, 0, 0), (255, 0, 0), (0, 255, 0))[: len(classes)]
    window = ((64, 64),) if padding else ((204, 204),)
    preprocess = PreprocessConfig(window=window, overlap=0, classes=classes, palette=palette)
    state = drawn_weights(architecture, 0)
    return Checkpoint("drawn", architecture, preprocess, state)


def test_network_computes_the_same(checkpoint: Checkpoint) -> None:
    highs = measure_channels(Predictor.of(checkpoint), IMAGES)
    state = equalize_channels(checkpoint.state, highs)
    changed = [name for name in state if not np.array_equal(state[name], checkpoint.state[name])]
    assert len(changed) > 30
    assert all(state[name].dtype == value.dtype for name, value in checkpoint.state.items())
    equalized = dataclasses.replace(checkpoint, state=state)
    for image in IMAGES:
        expected = Predictor.of(checkpoint)(image)
        assert np.abs(Predictor.of(equalized)(image) - expected).max() < 1e-5


def test_channels_use_at_least_half_of_the_range(checkpoint: Checkpoint) -> None:
    before = measure_channels(Predictor.of(checkpoint), IMAGES)
    state = equalize_channels(checkpoint.state, before)
    after = measure_channels(Predictor.of(dataclasses.replace(checkpoint, state=state)), IMAGES)
    for layer, high in before.items():
        assert after[layer].max() == pytest.approx(high.max(), rel=1e-4)
        reachable = high > high.max() / MAX_FACTOR
        assert (after[layer][reachable] > high.max() / 2.001).all()


def test_error_of_int8_weights_falls(checkpoint: Checkpoint) -> None:
    """The last layer has a large weight for a channel with small values."""
    state = {name: value.astype(np.float32) for name, value in checkpoint.state.items()}
    state["up_conv.3.second.weight"][0] /= MAX_FACTOR
    state["up_conv.3.second.bias"][0] /= MAX_FACTOR
    state["final_conv.weight"][:, 0] *= MAX_FACTOR
    draft = dataclasses.replace(checkpoint, state=state)
    highs = measure_channels(Predictor.of(draft), IMAGES)
    equalized = equalize_channels(state, highs)

    def measure_error(tensors: dict[str, np.ndarray]) -> float:
        exact = tensors["final_conv.weight"]
        quantized, scale = quantize_weights(exact, 0)
        values = measure_channels(
            Predictor.of(dataclasses.replace(checkpoint, state=tensors)), IMAGES[:1]
        )["up_conv.3.second"]
        return float(np.abs((quantized * scale - exact)[..., 0, 0] * values).max())

    assert measure_error(equalized) < measure_error(state) / 3
