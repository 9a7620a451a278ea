"""An ONNX graph in OpenVINO: reading it, and what comes before and after it.

OpenVINO reads ONNX from memory. The result takes bytes and returns probabilities, as
`app.engine.openvino.build_graph` does for a U-Net. Knows no files and no engine.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from app.engine.openvino_core import shared_core
from model.arrays import AnyArray
from model.config import GraphConfig, PreprocessConfig
from model.errors import CheckpointError

_MAX_VALUES_PER_PIXEL = 4096
"""Values of a tensor inside a graph, per pixel of its window."""


def read_graph(content: bytes | AnyArray) -> ov.Model:
    """Read an ONNX file that `model.graph.check_graph` accepted.

    Raises:
        CheckpointError: OpenVINO cannot convert it.
    """
    try:
        return shared_core().read_model(bytes(content))
    except RuntimeError as error:
        raise CheckpointError(f"OpenVINO cannot read the graph: {extract_reason(error)}") from error


def set_shape(graph: ov.Model, shape: list[int]) -> None:
    """Fix the shape of a graph's only input, and check that all tensors follow from it.

    Raises:
        CheckpointError: the graph does not accept the shape, or a tensor is unknown in size or far
            larger than the image.
    """
    try:
        graph.reshape(shape)
    except RuntimeError as error:
        raise CheckpointError(
            f"the graph does not accept {shape}: {extract_reason(error)}"
        ) from error
    most = _MAX_VALUES_PER_PIXEL * math.prod(shape)
    largest = 0  # of the constants
    weights: set[str] = set()  # constants, and what is computed of them alone
    for operation in graph.get_ordered_ops():
        name = f"{operation.get_type_name()} {operation.get_friendly_name()!r}"
        sources = {each.get_node().get_name() for each in operation.input_values()}
        is_constant = operation.get_type_name() == "Constant"
        is_weight = is_constant or (bool(sources) and sources <= weights)
        if is_weight:
            weights.add(operation.get_name())
        for output in operation.outputs():
            size = output.get_partial_shape()
            if size.is_dynamic:
                raise CheckpointError(f"{name} has a size that depends on pixels")
            values = math.prod(size.to_shape())
            if is_constant:
                largest = max(largest, values)
            elif values > (max(most, largest) if is_weight else most):
                raise CheckpointError(
                    f"{name} has {values:,} values for a window of {shape}; at most {most:,} are "
                    "allowed"
                )


def normalize_windows(image: Any, preprocess: PreprocessConfig) -> Any:
    """Add (value/255 - mean) / std to a graph: (N, H, W, C) uint8 -> (N, C, H, W) float32."""
    mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
    x = ops.transpose(ops.convert(image, "f32"), np.array([0, 3, 1, 2]))
    scale, shift = 1 / (255 * std), -mean / std
    return ops.add(ops.multiply(x, scale.reshape(1, -1, 1, 1)), shift.reshape(1, -1, 1, 1))


def wrap_graph(graph: ov.Model, config: GraphConfig, preprocess: PreprocessConfig) -> ov.Model:
    """Put normalization before a graph, and the activation after it.

    Args:
        graph: from `read_graph`; it becomes a part of the result.

    Returns:
        A model from (1, H, W, C) uint8 to (1, out_channels, H', W') float32. Height and width are
        fixed if there is one window.
    """
    height, width = preprocess.window[0] if len(preprocess.window) == 1 else (-1, -1)
    image = ops.parameter([1, height, width, config.in_channels], np.uint8, name="image")
    x = normalize_windows(image, preprocess)
    if config.layout == "NHWC":
        x = ops.transpose(x, np.array([0, 2, 3, 1]))
    source = graph.inputs[0]
    x = ops.convert(x, source.get_element_type().get_type_name())
    for target in source.get_target_inputs():
        target.replace_source_output(x.output(0))
    outputs = [_to_nchw(_find_output(graph, name), config) for name in config.outputs]
    y = outputs[0] if len(outputs) == 1 else ops.concat(outputs, axis=1)
    if config.activation == "sigmoid":
        y = ops.sigmoid(y)
    elif config.activation == "softmax":
        y = ops.softmax(y, axis=1)
    if config.foreground_only:
        y = ops.slice(y, [1], [2], [1], [1])
    wrapped = ov.Model([y], [image], "graph")
    wrapped.validate_nodes_and_infer_types()  # the input has another shape than before
    return wrapped


def _find_output(graph: ov.Model, name: str) -> Any:
    """The node that computes a named output of a graph."""
    return graph.output(name).get_node().input_value(0)


def _to_nchw(x: Any, config: GraphConfig) -> Any:
    x = ops.convert(x, "f32")
    if config.output_layout == "NHW":
        return ops.unsqueeze(x, np.array([1]))
    return ops.transpose(x, np.array([0, 3, 1, 2])) if config.output_layout == "NHWC" else x


def extract_reason(error: BaseException) -> str:
    """Return the last line of OpenVINO's message: those before it name places in its code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
