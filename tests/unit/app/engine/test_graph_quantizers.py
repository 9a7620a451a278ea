"""An ONNX graph in int8: quantizers where the calibration has ranges, and 8-bit convolutions."""

from __future__ import annotations

import dataclasses
import platform

import numpy as np
import pytest
from torch import nn

from app.engine.graph_quantizers import insert_quantizers, name_operations
from app.engine.openvino import OpenVinoEngine
from app.engine.openvino_graph import read_graph, set_shape
from app.errors import EngineError
from model.checkpoint import GRAPH_TENSOR, Checkpoint
from model.config import Calibration, GraphConfig, PreprocessConfig
from tests.drawing import nuclei
from tests.onnx_networks import export

WINDOWS = ((64, 96), (32, 32))


def make_content() -> bytes:
    """A network with a convolution of each kind, whose values are about as large as its input."""
    layers = [
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
        nn.Conv2d(8, 1, 1),
    ]
    for index, layer in enumerate(layers):
        if hasattr(layer, "weight"):
            rng = np.random.default_rng(index)
            size = layer.weight.shape
            values = rng.normal(size=size) * np.sqrt(2 / np.prod(size[1:]))
            layer.weight.data.copy_(layer.weight.data.new_tensor(values))
    return export(nn.Sequential(*layers), (1, 1, 32, 32), output_names=["y"])


def find_ranges(content: bytes, high: float = 1.0) -> dict[str, tuple[float, float]]:
    """Ranges for all convolutions and their inputs."""
    ranges: dict[str, tuple[float, float]] = {"output x": (0.0, 1.0)}
    operations = name_operations(read_graph(content))
    names = {each.get_friendly_name(): name for name, each in operations.items()}
    for name, operation in operations.items():
        if "Convolution" in operation.get_type_name():
            ranges[f"weights {name}"] = (-1.0, 1.0)
            source = operation.input_value(0).get_node()
            if source.get_type_name() != "Parameter":
                ranges[f"output {names[source.get_friendly_name()]}"] = (-high * 128 / 127, high)
    return ranges


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    content = make_content()
    return Checkpoint(
        "theirs",
        GraphConfig(in_channels=1, input="x", outputs=("y",), divisor=2, activation="sigmoid"),
        PreprocessConfig(window=WINDOWS, overlap=0, mean=(0.0,), std=(1.0,)),
        {GRAPH_TENSOR: np.frombuffer(content, np.uint8)},
        calibration=Calibration(find_ranges(content)),
    )


def build(checkpoint: Checkpoint, precision: str) -> OpenVinoEngine:
    return OpenVinoEngine(checkpoint, threads=2, max_batch=2, precision=precision)


@pytest.mark.parametrize("shape", WINDOWS)
def test_int8_is_close_to_fp32_and_differs(checkpoint: Checkpoint, shape: tuple[int, int]) -> None:
    windows = np.stack([nuclei(*shape, seed)[0] for seed in range(2)])[..., None]
    exact, rounded = (build(checkpoint, precision) for precision in ("fp32", "int8"))
    rounded.warm()
    expected, found = exact.collect(windows), rounded.collect(windows)
    difference = np.abs(found - expected).mean()
    assert 0 < difference < 0.2 * expected.std()


def test_convolutions_run_in_8_bits_in_int8_alone(checkpoint: Checkpoint) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("other processors have other kernels")
    for precision, expected in (("fp32", {"f32"}), ("int8", {"u8", "i8"})):
        engine = build(checkpoint, precision)
        engine.warm()
        layers = [each for each in engine.layers() if each[0] in ("Convolution", "Deconvolution")]
        assert len(layers) == 4
        assert {bits for _, bits in layers} <= expected


def test_int8_needs_a_calibration(checkpoint: Checkpoint) -> None:
    plain = dataclasses.replace(checkpoint, calibration=None)
    with pytest.raises(EngineError, match="theirs has no calibration; int8 needs one"):
        build(plain, "int8")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("output nothing", "has no 'output nothing', which its calibration names"),
        ("weights x", "'x' has no weights that can be quantized"),
        ("input one x", "has no 'input one x'"),
        ("down_conv.0.first", "has no 'down_conv.0.first'"),
    ],
)
def test_ranges_of_another_graph_are_an_error_of_one_line(
    checkpoint: Checkpoint, key: str, message: str
) -> None:
    other = dataclasses.replace(checkpoint, calibration=Calibration({key: (0.0, 1.0)}))
    with pytest.raises(EngineError, match=message) as caught:
        build(other, "int8")
    assert "\n" not in str(caught.value)


def test_range_of_an_input_is_that_of_one_reader_alone(checkpoint: Checkpoint) -> None:
    graph = read_graph(checkpoint.state[GRAPH_TENSOR])
    reader = next(each for each in graph.get_ordered_ops() if each.get_type_name() == "MaxPool")
    insert_quantizers(graph, {f"input 0 {reader.get_friendly_name()}": (0.0, 1.0)})
    assert reader.input_value(0).get_node().get_type_name() == "FakeQuantize"
    kinds = [each.get_type_name() for each in graph.get_ops()]
    assert kinds.count("FakeQuantize") == 1


def test_weights_may_be_larger_than_the_tensors_of_a_small_window() -> None:
    """Only tensors that depend on the window are bounded by it."""
    network = nn.Sequential(nn.Conv2d(1, 4000, 1), nn.Conv2d(4000, 1100, 1))
    content = export(network, (1, 1, 32, 32), output_names=["y"])
    graph = read_graph(content)
    insert_quantizers(graph, find_ranges(content))
    assert 4000 * 1100 > 4096 * 32 * 32
    set_shape(graph, [1, 1, 32, 32])
