"""Write a checkpoint's network as an ONNX graph, with what comes before and after it.

The graph takes raw pixels and returns probabilities. It is written operator by operator, as that of
`app.engine.openvino`: the network has six kinds of layers, and neither torch nor a tracer is needed
(docs/decisions/0041-exports-are-written-down-and-checked.md).

Knows tensors and operators; no files and no runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from model.arrays import AnyArray
from model.checkpoint import Checkpoint
from model.config import LEVELS, SKIP_MARGINS, UNetConfig
from model.convert.metadata import describe_checkpoint
from model.errors import ExportError

Pixels = Literal["uint8", "float32"]
"""uint8: (N, H, W, C), as a decoded image. float32: (N, C, H, W), values 0..255."""

INPUT, OUTPUT = "image", "probabilities"
OPSET = 17
"""Version of the operators; ONNX Runtime reads it since 1.12 (July 2022)."""
_IR_VERSION = 8
"""Version of the file format that belongs to it."""
_MAX_BYTES = 2_000_000_000
"""A protobuf has at most 2 GiB."""


class _Graph:
    """Operators and constants that are added one by one; each result is named by its node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: AnyArray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, operator: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name


def build_onnx(checkpoint: Checkpoint, pixels: Pixels = "uint8") -> onnx.ModelProto:
    """Build `model.unet.UNet` between normalization and probabilities, for any window shape.

    Args:
        pixels: what the graph takes. float32 is clipped to 0..255 and rounded, so that both kinds
            give the same result.

    Returns:
        A model from `INPUT` to `OUTPUT`, (N, out_channels, H', W') float32, with the fields of
        `describe_checkpoint` as metadata.

    Raises:
        ExportError: the weights are too large for a file of ONNX.
    """
    config = checkpoint.unet
    if sum(4 * array.size for array in checkpoint.state.values()) > _MAX_BYTES:
        raise ExportError(f"{checkpoint.name} is too large for ONNX, whose files have 2 GB")
    graph = _Graph()
    x = _normalize(graph, checkpoint, pixels)
    x = _add_network(graph, x, config, checkpoint.state)
    if checkpoint.preprocess.binary:
        graph.add("Sigmoid", OUTPUT, x)
    else:
        graph.add("Softmax", OUTPUT, x, axis=1)
    result = ("out_height", "out_width") if config.margin else ("height", "width")
    layout: list[Any] = (
        ["batch", "height", "width", config.in_channels]
        if pixels == "uint8"
        else ["batch", config.in_channels, "height", "width"]
    )
    kind = TensorProto.UINT8 if pixels == "uint8" else TensorProto.FLOAT
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            checkpoint.name,
            [helper.make_tensor_value_info(INPUT, kind, layout)],
            [
                helper.make_tensor_value_info(
                    OUTPUT, TensorProto.FLOAT, ["batch", config.out_channels, *result]
                )
            ],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="unet-server",
    )
    helper.set_model_props(model, describe_checkpoint(checkpoint))
    return model


def _normalize(graph: _Graph, checkpoint: Checkpoint, pixels: Pixels) -> str:
    """(value/255 - mean) / std as one factor and one offset per channel."""
    if pixels == "uint8":
        x = graph.add("Cast", "values", INPUT, to=TensorProto.FLOAT)
        x = graph.add("Transpose", "planes", x, perm=[0, 3, 1, 2])
    else:
        half = graph.constant("half", np.array(0.5, np.float32))
        limits = [
            graph.constant(f"pixel_{value}", np.array(value, np.float32)) for value in (0, 255)
        ]
        x = graph.add("Floor", "whole", graph.add("Add", "values", INPUT, half))
        x = graph.add("Clip", "bytes", x, *limits)
    mean, std = (
        np.array(values, np.float32).reshape(1, -1, 1, 1)
        for values in (checkpoint.preprocess.mean, checkpoint.preprocess.std)
    )
    x = graph.add("Mul", "scaled", x, graph.constant("scale", 1 / (255 * std)))
    return graph.add("Add", "normalized", x, graph.constant("shift", -mean / std))


def _add_network(graph: _Graph, x: str, config: UNetConfig, state: Mapping[str, AnyArray]) -> str:
    """Add `model.unet.UNet`, from normalized pixels to logits."""

    def convolve(x: str, name: str, padding: int = 0, operator: str = "Conv", **more: Any) -> str:
        constants = [
            graph.constant(f"{name}.{kind}", state[f"{name}.{kind}"].astype(np.float32))
            for kind in ("weight", "bias")
        ]
        size = list(state[f"{name}.weight"].shape[2:])
        return graph.add(
            operator, name, x, *constants, kernel_shape=size, pads=[padding] * 4, **more
        )

    def convolve_twice(x: str, name: str) -> str:
        for each in ("first", "second"):
            x = convolve(x, f"{name}.{each}", config.padding)
            x = graph.add("Relu", f"{name}.{each}.relu", x)
        return x

    def crop(skip: str, level: int) -> str:
        if config.padding:
            return skip
        name, margin = f"crop.{level}", SKIP_MARGINS[level]
        bounds = ([margin] * 2, [-margin] * 2, [2, 3])
        constants = [
            graph.constant(f"{name}.{part}", np.array(value, np.int64))
            for part, value in zip(("starts", "ends", "axes"), bounds, strict=True)
        ]
        return graph.add("Slice", name, skip, *constants)

    skips = []
    for level in range(LEVELS):
        x = convolve_twice(x, f"down_conv.{level}")
        skips.append(x)
        x = graph.add("MaxPool", f"down_sample.{level}", x, kernel_shape=[2, 2], strides=[2, 2])
    x = convolve_twice(x, "middle_conv")
    for level in range(LEVELS):
        x = convolve(x, f"up_sample.{level}.up", operator="ConvTranspose", strides=[2, 2])
        skip = crop(skips.pop(), LEVELS - 1 - level)
        x = graph.add("Concat", f"concat.{level}", x, skip, axis=1)
        x = convolve_twice(x, f"up_conv.{level}")
    return convolve(x, "final_conv")
