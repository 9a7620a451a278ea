"""Every engine computes the network, and a window never depends on the rest of its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.cli.evaluate import http_predictor
from app.engine.base import Engine
from app.engine.openvino import OpenVinoEngine, has_bf16
from app.engine.predictor import engine_predictor
from app.engine.torch import TorchEngine
from app.errors import NonFiniteOutput
from model.checkpoint import Checkpoint, load_checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.evaluation.evaluate import evaluate, from_probabilities
from model.predict import Predictor
from model.training.data import Sample
from model.training.images import read_image
from model.transforms import normalize, probabilities
from model.unet import UNet
from tests.conftest import FIXTURES, ROOT, drawn_weights, nuclei, serving
from unet_client import Client

BINARY = ("background", "nucleus")
CASES = {
    "padded": (UNetConfig(3, 1, 8, 1), PreprocessConfig(overlap=16, window=((64, 96), (128, 128)))),
    "two channels, percentile": (
        UNetConfig(3, 2, 8, 1),
        PreprocessConfig(overlap=16, window=((96, 64),), intensity="percentile", classes=BINARY),
    ),
    "unpadded": (UNetConfig(3, 1, 8, 0), PreprocessConfig(overlap=16, window=((188, 204),))),
    "classes": (
        UNetConfig(3, 4, 8, 1),
        PreprocessConfig(
            overlap=16,
            window=((64, 64),),
            classes=("none", "a", "b", "c"),
            palette=((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)),
        ),
    ),
}


def untrained(architecture: UNetConfig, preprocess: PreprocessConfig) -> Checkpoint:
    return Checkpoint("untrained", architecture, preprocess, drawn_weights(architecture, seed=7))


def build_engines(checkpoint: Checkpoint) -> list[Engine]:
    return [
        OpenVinoEngine(checkpoint, threads=2, max_batch=4),
        TorchEngine(checkpoint, max_batch=4),
    ]


def reference(checkpoint: Checkpoint, windows: np.ndarray) -> np.ndarray:
    """Compute probabilities by `model.unet` in torch."""
    network = UNet.from_config(checkpoint.architecture).eval()
    network.load_state_dict(
        {name: torch.from_numpy(value).float() for name, value in checkpoint.state.items()}
    )
    with torch.inference_mode():
        batch = normalize(torch.from_numpy(windows), checkpoint.preprocess)
        return probabilities(network(batch), checkpoint.preprocess).numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", [0, 1], ids=["openvino", "torch"])
def test_an_engine_computes_the_network(case: str, which: int) -> None:
    checkpoint = untrained(*CASES[case])
    engine = build_engines(checkpoint)[which]
    rng = np.random.default_rng(1)
    for shape in checkpoint.preprocess.window:
        staged = engine.stage(shape, 2)
        staged[:] = rng.integers(0, 256, staged.shape)
        expected = reference(checkpoint, staged)
        assert expected.std() > 0.01  # not a constant, which anything would reproduce
        assert np.abs(engine.collect(engine.submit(staged)) - expected).max() <= 1e-5


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")
@pytest.mark.parametrize("case", CASES)
def test_bf16_on_a_cpu_is_close_to_the_network(case: str) -> None:
    """8 bits of mantissa give a relative error of 2^-9 per layer, and there are 23 layers."""
    checkpoint = untrained(*CASES[case])
    engine = OpenVinoEngine(checkpoint, threads=2, max_batch=1, precision="bf16")
    shape = checkpoint.preprocess.window[0]
    staged = engine.stage(shape, 1)
    staged[:] = np.random.default_rng(1).integers(0, 256, staged.shape)
    errors = np.abs(engine.collect(engine.submit(staged)) - reference(checkpoint, staged))
    assert 1e-5 < errors.max() < 0.1  # not fp32, and close to it
    assert errors.mean() < 0.01


@pytest.mark.parametrize("which", [0, 1], ids=["openvino", "torch"])
def test_a_window_does_not_depend_on_its_batch(which: int) -> None:
    """Equal bit by bit in OpenVINO; torch may pick another kernel for another batch size."""
    checkpoint = untrained(*CASES["padded"])
    engine = build_engines(checkpoint)[which]
    staged = engine.stage((64, 96), 4)
    staged[:] = np.random.default_rng(2).integers(0, 256, staged.shape)
    together = np.array(engine.collect(engine.submit(staged)), copy=True)
    for index in range(4):
        alone = engine.collect(engine.submit(np.ascontiguousarray(staged[index : index + 1])))[0]
        if which == 0:
            assert np.array_equal(alone, together[index])
        else:
            assert np.abs(alone - together[index]).max() < 1e-5


@pytest.mark.parametrize("which", [0, 1], ids=["openvino", "torch"])
def test_values_that_are_not_finite_are_an_error(which: int) -> None:
    checkpoint = untrained(*CASES["padded"])
    checkpoint.state["final_conv.bias"][:] = np.nan
    engine = build_engines(checkpoint)[which]
    staged = engine.stage((64, 96), 2)
    staged[:] = 0
    with pytest.raises(NonFiniteOutput):
        engine.collect(engine.submit(staged))


@pytest.mark.parametrize("which", [0, 1], ids=["openvino", "torch"])
def test_stage_rejects_undeclared_shapes_and_batch_sizes(which: int) -> None:
    engine = build_engines(untrained(*CASES["padded"]))[which]
    for shape, count in (((64, 64), 1), ((64, 96), 0), ((64, 96), 5)):
        with pytest.raises(ValueError, match="windows of"):
            engine.stage(shape, count)


def test_evaluation_of_network_engine_and_service_agrees() -> None:
    """On a real and a synthetic image."""
    checkpoint = load_checkpoint(ROOT / "weights" / "nuclei.safetensors")
    real = Sample(
        "real",
        read_image(FIXTURES / "img2d.tif")[:300, :280],
        read_image(FIXTURES / "mask2d.tif")[:300, :280].astype(np.int32),
    )
    image, labels = nuclei(200, 170, seed=9)
    samples = [real, Sample("synthetic", image, labels.astype(np.int32))]
    engine = OpenVinoEngine(checkpoint, threads=2, max_batch=1)
    predictors = {
        "network": from_probabilities(
            Predictor.of(checkpoint), checkpoint.preprocess, instances=True
        ),
        "engine": from_probabilities(
            engine_predictor(engine, checkpoint), checkpoint.preprocess, instances=True
        ),
    }
    with serving(UNET_PRECISION="fp32") as server, Client(server.url) as client:
        predictors["service"] = http_predictor(client, instances=True)
        figures = {
            name: evaluate(predict, samples, instances=True).summary()
            for name, predict in predictors.items()
        }
    assert figures["network"]["dice"] > 0.8
    unknown = {"engine": set(), "service": {"uncertainty"}}  # masks alone come over HTTP
    for name in ("engine", "service"):
        assert figures["network"].keys() - figures[name].keys() == unknown[name]
        for figure, value in figures["network"].items():
            if figure in unknown[name]:
                continue
            assert figures[name][figure] == pytest.approx(value, abs=2e-4), (name, figure)
