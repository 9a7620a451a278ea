"""Run an ONNX graph with random pixels: sizes of its outputs, batches, and another runtime.

Knows arrays; does not know what their values mean.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov

from app.engine.openvino_core import shared_core
from app.engine.openvino_graph import set_shape
from model.arrays import FloatArray, Shape
from model.config import GraphConfig
from model.errors import CheckpointError

TOLERANCE = 1e-3
"""Largest deviation from 0..1, and difference of two results, relative to the largest value."""


def draw_pixels(config: GraphConfig, window: Shape, count: int) -> FloatArray:
    axes = {"N": count, "C": config.in_channels, "H": window[0], "W": window[1]}
    rng = np.random.default_rng(0)
    return rng.normal(size=[axes[axis] for axis in config.layout]).astype(np.float32)


def find_output_shapes(
    graph: ov.Model, names: Sequence[str], config: GraphConfig, window: Shape
) -> dict[str, tuple[int, ...]]:
    """The shapes of these outputs for a window, without outputs of whole numbers."""
    fixed = fix_shape(graph, config, window, 1)
    outputs = {name: fixed.output(name) for name in names}
    return {
        name: tuple(output.get_shape())
        for name, output in outputs.items()
        if output.get_element_type().is_real()
    }


def fix_shape(graph: ov.Model, config: GraphConfig, window: Shape, count: int) -> ov.Model:
    height, width = window
    axes = {"N": count, "C": config.in_channels, "H": height, "W": width}
    fixed = graph.clone()
    set_shape(fixed, [axes[axis] for axis in config.layout])
    return fixed


def compute(graph: ov.Model, config: GraphConfig, pixels: FloatArray) -> list[FloatArray]:
    """Compute the outputs that are used."""
    axes = dict(zip(config.layout, pixels.shape, strict=True))
    fixed = fix_shape(graph, config, (axes["H"], axes["W"]), axes["N"])
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    results = shared_core().compile_model(fixed, "CPU", options)([pixels])
    return [np.asarray(results[name], np.float32) for name in config.outputs]


def computes_batches(
    graph: ov.Model,
    config: GraphConfig,
    pixels: FloatArray,
    singles: Sequence[Sequence[FloatArray]],
) -> bool:
    """Whether the results of windows in one run equal those of each."""
    try:
        together = compute(graph, config, pixels)
    except (CheckpointError, RuntimeError):
        return False
    apart = [np.concatenate(each) for each in zip(*singles, strict=True)]
    return all(
        batch.shape == each.shape and measure_difference(batch, each) < TOLERANCE
        for batch, each in zip(together, apart, strict=True)
    )


def measure_difference(values: FloatArray, others: FloatArray) -> float:
    """The largest difference, relative to the largest value if that is above 1."""
    return float(np.abs(values - others).max() / max(1.0, np.abs(others).max()))


def compare_runtimes(
    content: bytes, config: GraphConfig, pixels: FloatArray, outputs: Sequence[FloatArray]
) -> str:
    """Compare OpenVINO's outputs with those of ONNX Runtime, if it is installed.

    Raises:
        CheckpointError: they differ.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "not compared with ONNX Runtime, which is not installed"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    pixels = pixels.astype(np.float16 if source.type == "tensor(float16)" else np.float32)
    expected: list[Any] = session.run(list(config.outputs), {config.input: pixels})
    difference = max(
        measure_difference(each, np.asarray(other, np.float32))
        for each, other in zip(outputs, expected, strict=True)
    )
    if not difference < TOLERANCE:
        raise CheckpointError(
            f"OpenVINO and ONNX Runtime compute different outputs: {difference:.1e}"
        )
    return f"OpenVINO and ONNX Runtime compute the same outputs, to {difference:.0e}"
