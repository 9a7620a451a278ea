"""An exported graph computes what the network does, for every kind of network and any window."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from model.checkpoint import Checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.convert.export import load_onnx
from model.convert.onnx import Pixels, build_onnx
from model.errors import ExportError
from model.predict import build_network
from model.transforms import normalize, probabilities
from tests.conftest import drawn_weights


def make_checkpoint(architecture: UNetConfig, **preprocess: Any) -> Checkpoint:
    side = 64 if architecture.padding else 204
    channels = architecture.in_channels
    config = PreprocessConfig(
        window=((side, side),),
        overlap=16,
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        **preprocess,
    )
    return Checkpoint("drawn", architecture, config, drawn_weights(architecture, 0))


THREE: dict[str, Any] = {
    "classes": ("background", "cell", "debris"),
    "palette": ((0, 0, 0), (255, 0, 0), (0, 255, 0)),
}


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
@pytest.mark.parametrize(
    ("architecture", "preprocess", "shapes"),
    [
        (UNetConfig(3, 1, 4), {}, [(1, 64, 64), (2, 48, 80)]),
        (UNetConfig(1, 2, 4), {}, [(2, 64, 32)]),
        (UNetConfig(3, 3, 4), THREE, [(1, 32, 64)]),
        (UNetConfig(3, 2, 4, padding=0), {}, [(1, 204, 220), (2, 188, 188)]),
    ],
)
def test_probabilities_equal_those_of_the_network(
    architecture: UNetConfig,
    preprocess: dict[str, Any],
    shapes: list[tuple[int, ...]],
    pixels: Pixels,
) -> None:
    checkpoint = make_checkpoint(architecture, **preprocess)
    model = build_onnx(checkpoint, pixels)
    onnx.checker.check_model(model, full_check=True)
    compute = load_onnx(model.SerializeToString(), pixels)
    network = build_network(checkpoint).eval()
    rng = np.random.default_rng(0)
    for shape in shapes:
        windows = rng.integers(0, 256, (*shape, architecture.in_channels), np.uint8)
        with torch.inference_mode():
            inputs = normalize(torch.from_numpy(windows), checkpoint.preprocess)
            expected = probabilities(network(inputs), checkpoint.preprocess).numpy()
        found = compute(windows)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-5
        assert np.ptp(expected) > 0.05


def test_float_pixels_are_rounded_and_clipped_as_the_service_does() -> None:
    checkpoint = make_checkpoint(UNetConfig(1, 1, 4))
    import onnxruntime

    content = build_onnx(checkpoint, "float32").SerializeToString()
    session = onnxruntime.InferenceSession(content)
    whole = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32)).astype(np.float32)
    shifted = np.where(whole == 255, 1000, np.where(whole == 0, -9, whole + 0.3))
    (expected,) = session.run(None, {"image": whole})
    (found,) = session.run(None, {"image": shifted.astype(np.float32)})
    assert np.array_equal(found, expected)


def test_tensors_have_names_and_free_sizes() -> None:
    graph = build_onnx(make_checkpoint(UNetConfig(3, 2, 4))).graph
    (image,), (result,) = graph.input, graph.output
    sizes = [
        [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in (image, result)
    ]
    assert (image.name, sizes[0]) == ("image", ["batch", "height", "width", 3])
    assert (result.name, sizes[1]) == ("probabilities", ["batch", 2, "height", "width"])


def test_metadata_describes_preprocessing_and_outputs() -> None:
    checkpoint = make_checkpoint(UNetConfig(3, 2, 4), threshold=0.65, intensity="percentile")
    found = {each.key: each.value for each in build_onnx(checkpoint).metadata_props}
    assert found["intensity"] == "percentile"
    assert found["licence"] == "unknown"
    assert json.loads(found["threshold"]) == 0.65
    assert json.loads(found["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(found["std"]) == [0.2, 0.25, 0.3]
    assert json.loads(found["window"]) == [[64, 64]]
    assert json.loads(found["classes"]) == ["background", "foreground"]
    assert json.loads(found["outputs"]) == ["foreground", "border"]


def test_network_above_the_limit_of_the_format_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.convert.onnx._MAX_BYTES", 1000)
    with pytest.raises(ExportError, match="drawn is too large for ONNX"):
        build_onnx(make_checkpoint(UNetConfig(3, 1, 4)))
