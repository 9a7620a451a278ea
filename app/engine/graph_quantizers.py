"""Quantize an ONNX graph in OpenVINO to int8, from ranges that a calibration measured.

Activations get a `FakeQuantize`, and convolutions weights of 8 bits, as the graph of a U-Net does.
OpenVINO turns both into 8-bit layers. `app.engine.graph_ranges` measures the ranges.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from app.engine.quantize import MIN_RANGE, Ranges, quantize_weights
from app.errors import EngineError
from model.arrays import AnyArray

OUTPUT, INPUT, WEIGHTS = "output", "input", "weights"
"""First words of the names of ranges; the name of the operation comes last (`name_operations`). An
input has a number: `input 1 NAME`."""

_CHANNEL_AXES = {"Convolution": 0, "ConvolutionBackpropData": 1, "GroupConvolution": 0}
"""Operation -> the axis of its weights' output channels, after groups are merged with them."""


def insert_quantizers(graph: ov.Model, ranges: Ranges) -> None:
    """Quantize activations and weights of a graph, in place.

    Args:
        graph: from `app.engine.openvino_graph.read_graph`.
        ranges: of the checkpoint's calibration.

    Raises:
        EngineError: the ranges are not those of this graph.
    """
    operations = name_operations(graph)
    for key, (low, high) in ranges.items():
        kind, _, name = key.partition(" ")
        port = "0"
        if kind == INPUT:
            port, _, name = name.partition(" ")
        operation = operations.get(name)
        if operation is None or kind not in (OUTPUT, INPUT, WEIGHTS) or not port.isdecimal():
            raise EngineError(
                f"the graph has no {key!r}, which its calibration names; calibrate it again"
            )
        if kind == WEIGHTS:
            _quantize_kernel(operation)
        elif kind == OUTPUT:
            targets = operation.output(0).get_target_inputs()
            quantized = _fake_quantize(operation.output(0), low, high)
            for target in targets:
                target.replace_source_output(quantized)
        else:
            target = operation.input(int(port))
            target.replace_source_output(_fake_quantize(target.get_source_output(), low, high))


def name_operations(graph: ov.Model) -> dict[str, Any]:
    """Name the operations of a graph as every reading of its file does.

    OpenVINO numbers operations without a name over all graphs of the process. Here they are
    numbered over those of their kind in this graph.
    """
    named, counts = {}, Counter[str]()
    for operation in graph.get_ordered_ops():
        name, kind = operation.get_friendly_name(), operation.get_type_name()
        if name.removeprefix(f"{kind}_").isdecimal():
            name = f"{kind} #{counts[kind]}"
            counts[kind] += 1
        named[name] = operation
    return named


def find_kernel(operation: Any) -> AnyArray | None:
    """The weights of a convolution, (.., .., height, width), or those of a grouped one, with the
    groups first; None if they are not constant."""
    if operation.get_type_name() not in _CHANNEL_AXES:
        return None
    source = operation.input_value(1).get_node()
    shape = tuple(source.get_output_shape(0))
    if source.get_type_name() == "Reshape":  # of a grouped convolution
        source = source.input_value(0).get_node()
    grouped = operation.get_type_name() == "GroupConvolution"
    if source.get_type_name() != "Constant" or len(shape) != (5 if grouped else 4):
        return None
    kernel: AnyArray = source.get_data()
    return kernel.reshape(shape)


def _quantize_kernel(operation: Any) -> None:
    """Round the weights of a convolution to integers, with one scale per output channel.

    Raises:
        EngineError: it is not a convolution with constant weights.
    """
    kernel = find_kernel(operation)
    if kernel is None:
        raise EngineError(f"{operation.get_friendly_name()!r} has no weights that can be quantized")
    merged = kernel.reshape(-1, *kernel.shape[-3:])
    integers, scale = quantize_weights(merged, _CHANNEL_AXES[operation.get_type_name()])
    scales = scale.reshape(*kernel.shape[:2], 1, 1, 1) if kernel.ndim == 5 else scale
    weights = ops.convert(ops.constant(integers.reshape(kernel.shape)), "f32")
    quantized = ops.multiply(weights, ops.constant(scales.astype(np.float32)))
    operation.input(1).replace_source_output(quantized.output(0))


def _fake_quantize(x: Any, low: float, high: float) -> Any:
    """Quantize a tensor to 256 levels."""
    high = max(high, low + MIN_RANGE)
    limits = np.float32(low), np.float32(high)
    return ops.fake_quantize(x, *limits, *limits, 256).output(0)
