"""Input and outputs of a graph are found by trying it; what it does not show is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from app.engine.inspection import running
from app.engine.inspection.facts import Finding, GraphOptions
from app.engine.inspection.inspect_graph import inspect_graph
from model.arrays import Shape
from model.errors import CheckpointError
from model.graph import parse_graph
from tests.onnx_networks import Net, Several, export

WINDOWS: tuple[Shape, ...] = ((64, 64), (64, 90))


def inspect(content: bytes, windows: tuple[Shape, ...] = WINDOWS, **options: Any) -> Finding:
    return inspect_graph(parse_graph(content), content, GraphOptions(**options), windows)


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_least_divisor_of_sizes_is_found(levels: int) -> None:
    finding = inspect(export(Net(levels=levels)))
    assert finding.config.divisor == 2**levels
    assert finding.config.grid == 32
    assert finding.windows == ((64, 64), (64, 96))  # multiples of 32
    assert finding.config.batch == "any"


def test_divisor_that_is_told_is_used() -> None:
    content = export(Net(levels=3))
    assert inspect(content, divisor=48).config.divisor == 48
    assert inspect(content, divisor=48).windows == ((96, 96),)
    with pytest.raises(CheckpointError, match="does not accept"):
        inspect(content, divisor=4)


def test_fixed_size_is_the_only_window() -> None:
    content = export(Net(), (1, 3, 96, 64), dynamic_axes={})
    finding = inspect(content)
    assert finding.windows == (finding.config.size,) == ((96, 64),)
    assert finding.config.batch == "one"
    assert "96x64 alone" in finding.notes[0]
    with pytest.raises(CheckpointError, match="accepts windows of 96x64 alone"):
        inspect_graph(parse_graph(content), content, GraphOptions(windows=((64, 64),)), WINDOWS)


def test_margin_of_unpadded_convolutions_is_found() -> None:
    finding = inspect(export(Net(padding=0)))
    assert (finding.config.margin, finding.config.divisor) == (1, 1)
    assert "2 pixels smaller than the image" in finding.notes[1]


def test_smaller_map_is_not_an_output() -> None:
    with pytest.raises(CheckpointError, match="a smaller map must be resized in the graph"):
        inspect(export(nn.Conv2d(3, 1, 2, stride=2)))
    with pytest.raises(CheckpointError, match="no output has values for each pixel of a window"):
        inspect(export(nn.Conv2d(3, 1, 2, stride=2), dynamic_axes={}))


def test_only_output_of_full_size_is_used() -> None:
    network = Several(nn.Conv2d(3, 2, 2, stride=2), Net(outputs=2))
    finding = inspect(export(network, output_names=["half", "full"]))
    assert finding.config.outputs == ("full",)
    assert "output 'half': not used, it does not have the size of the image" in finding.notes


def test_one_of_several_outputs_must_be_chosen() -> None:
    content = export(Several(Net(outputs=2), Net(outputs=3)), output_names=["out", "aux"])
    with pytest.raises(
        CheckpointError, match=r"'out' \(2 channels\), 'aux' \(3 channels\); choose"
    ):
        inspect(content)
    assert inspect(content, outputs=("aux",)).config.out_channels == 3
    both = inspect(content, outputs=("aux", "out"))
    assert (both.config.outputs, both.config.out_channels) == (("aux", "out"), 5)
    with pytest.raises(CheckpointError, match="'no' is not an output with values for each pixel"):
        inspect(content, outputs=("no",))


@pytest.mark.parametrize(
    ("ending", "values"),
    [
        (None, "logits"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Softmax(dim=1), "softmax"),
        (nn.LogSoftmax(dim=1), "logits"),
        (nn.Sequential(nn.Softmax(dim=1), nn.UpsamplingNearest2d(scale_factor=1)), "softmax"),
        (nn.Sequential(nn.Softmax(dim=1), nn.Conv2d(2, 2, 1)), "logits"),
    ],
)
def test_values_are_found_by_the_last_operator(ending: Any, values: str) -> None:
    assert inspect(export(Net(outputs=2, ending=ending))).values == values


def test_values_that_could_be_probabilities_are_asked_for() -> None:
    content = export(Net(ending=nn.Hardtanh(0.0, 1.0)))
    with pytest.raises(CheckpointError, match="set --activation to logits, sigmoid or softmax"):
        inspect(content)
    assert inspect(content, values="sigmoid").values == "sigmoid"
    assert inspect(content, values="logits").values == "logits"


@pytest.mark.parametrize("axis", [2, 3])
def test_softmax_over_pixels_is_asked_for(axis: int) -> None:
    content = export(Net(outputs=2, ending=nn.Softmax(axis)))
    with pytest.raises(CheckpointError, match="softmax that is not over its channels"):
        inspect(content)
    assert inspect(content, values="sigmoid").values == "sigmoid"


def test_logits_are_not_taken_for_probabilities() -> None:
    network = Net()
    nn.init.constant_(network.last.weight, 3.0)
    with pytest.raises(CheckpointError, match=r"--activation sigmoid: .* are not probabilities"):
        inspect(export(network), values="sigmoid")


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = Net(outputs=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_axes_are_found() -> None:
    free = {0: "n", 1: "h", 2: "w"}
    content = export(ChannelsLast(), (1, 64, 64, 3), dynamic_axes={"x": free})
    config = inspect(content).config
    assert (config.layout, config.output_layout, config.in_channels) == ("NHWC", "NHWC", 3)
    squeezed = inspect(export(Net(ending=nn.Flatten(0, 1)))).config
    assert (squeezed.output_layout, squeezed.out_channels) == ("NHW", 1)


@pytest.mark.parametrize(
    ("network", "shape", "options", "message"),
    [
        (nn.Conv2d(4, 1, 1), (1, 4, 64, 64), {}, "images have 1 or 3"),
        (nn.Conv1d(3, 1, 1), (1, 3, 64), {"dynamic_axes": {}}, "an image has four axes"),
        (nn.Conv2d(3, 1, 1), (2, 3, 64, 64), {"dynamic_axes": {}}, "export it with one image"),
        (nn.Conv2d(3, 1, 1), (1, 3, 64, 64), {"dynamic_axes": {"x": {2: "h"}}}, "both free"),
        (nn.Conv2d(3, 1, 1), (1, 3, 8192, 64), {"dynamic_axes": {}}, "sides of at most 4096"),
        (nn.Conv2d(3, 1, 1), (1, 3, 16, 16), {"dynamic_axes": {}}, "sides of at least 32"),
    ],
)
def test_other_inputs_are_rejected(
    network: nn.Module, shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        inspect(export(network, shape, **options))
    assert "\n" not in str(caught.value)


class Mixed(nn.Module):
    """Computes something of a batch that depends on all of its images."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] - x.mean(0, keepdim=True)[:, :1] * 0.5


def test_images_that_influence_each_other_are_computed_one_by_one() -> None:
    assert inspect(export(Mixed())).config.batch == "one"


def make_graph(*nodes: onnx.NodeProto, **constants: np.ndarray) -> bytes:
    model = helper.make_model(
        helper.make_graph(
            list(nodes),
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    return model.SerializeToString()


def test_sizes_that_depend_on_pixels_are_rejected() -> None:
    content = make_graph(
        helper.make_node("NonZero", ["x"], ["i"]),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    )
    with pytest.raises(CheckpointError, match=r"NonZero .* has a size that depends on pixels"):
        inspect(content)


def test_tensors_far_larger_than_the_image_are_rejected() -> None:
    content = make_graph(
        helper.make_node("Tile", ["x", "times"], ["huge"]),
        helper.make_node("ReduceMean", ["huge"], ["y"], axes=[1]),
        times=np.array([1, 10**6, 1, 1]),
    )
    with pytest.raises(CheckpointError, match=r"Tile .* values for a window of .*; at most"):
        inspect(content)


def test_output_without_axes_is_rejected() -> None:
    content = make_graph(helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0))
    with pytest.raises(CheckpointError, match=r"no output has values for each pixel .*'y' \[\]"):
        inspect(content)


def test_map_of_classes_is_rejected() -> None:
    with pytest.raises(CheckpointError, match="whole numbers; export the logits"):
        inspect(export(Net(outputs=3, ending=Largest())))


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1, keepdim=True)


def test_difference_between_runtimes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    content = export(Net())
    assert "ONNX Runtime compute the same outputs" in inspect(content).notes[-1]
    monkeypatch.setattr(running, "measure_difference", lambda *_: 0.1)
    with pytest.raises(CheckpointError, match=r"ONNX Runtime compute different outputs: 1\.0e-01"):
        inspect(export(Net(), dynamic_axes={}))


def test_missing_onnx_runtime_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda _: None)
    assert inspect(export(Net())).notes[-1].startswith("not compared with ONNX Runtime")
