"""Measure the ranges of an ONNX graph's activations, by NNCF, which is the extra `quantize`.

NNCF chooses the layers that compute in 8 bits, and measures the values between them on images. Only
these ranges are kept. Knows no masks: `app.engine.calibrate` measures what int8 costs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator

import nncf
import numpy as np
import openvino as ov
import torch
from nncf.openvino.quantization.backend_parameters import BackendParameters
from tqdm import tqdm

from app.engine.graph_quantizers import (
    INPUT,
    OUTPUT,
    WEIGHTS,
    find_kernel,
    name_operations,
)
from app.engine.openvino_graph import read_graph
from model.arrays import AnyArray, ByteArray, FloatArray
from model.checkpoint import GRAPH_TENSOR, Checkpoint
from model.config import GraphConfig, PreprocessConfig
from model.errors import CheckpointError, first_line
from model.sliding_window import cut_image
from model.transforms import normalize

WINDOWS_PER_IMAGE = 4
"""Most windows of an image on which ranges are measured, evenly spread."""

_QUANTIZER = re.compile(rf"(?P<name>.*)/fq_(?P<kind>{OUTPUT}|{INPUT}|{WEIGHTS})_(?P<port>\d+)")
"""Names of the quantizers of NNCF."""

_FAILURES = (
    nncf.InternalError,
    nncf.ParameterNotSupportedError,
    nncf.UnsupportedModelError,
    nncf.ValidationError,
)


def measure_graph_ranges(
    checkpoint: Checkpoint, images: Iterable[AnyArray]
) -> dict[str, tuple[float, float]]:
    """Measure the ranges that `app.engine.graph_quantizers.insert_quantizers` needs.

    Args:
        checkpoint: of an ONNX graph.
        images: decoded, (H, W) or (H, W, 3), uint8 or uint16.

    Returns:
        Name -> (low, high), with four significant digits.

    Raises:
        CheckpointError: NNCF cannot quantize the graph.
        ValueError: there are no images.
    """
    config, preprocess = checkpoint.architecture, checkpoint.preprocess
    assert isinstance(config, GraphConfig)
    graph = read_graph(checkpoint.state[GRAPH_TENSOR])
    if graph.inputs[0].get_element_type() != ov.Type.f32:
        raise CheckpointError("int8 needs a graph in float32; export it again, and import it")
    windows = [window for image in images for window in _choose_windows(image, config, preprocess)]
    if not windows:
        raise ValueError("calibration needs at least one image")
    progress = tqdm(windows, "ranges", unit="window", disable=not sys.stderr.isatty())
    make_input = functools.partial(_make_input, config=config, preprocess=preprocess)
    try:
        with _silence():
            quantized = nncf.quantize(
                graph,
                nncf.Dataset(progress, make_input),
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(windows),
                ignored_scope=nncf.IgnoredScope(types=["MatMul"], validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    # It corrects the errors of another rounding of the weights.
                    disable_bias_correction=True,
                    backend_params={BackendParameters.COMPRESS_WEIGHTS: False},
                ),
            )
    except _FAILURES as error:
        raise CheckpointError(f"NNCF cannot quantize the graph: {first_line(error)}") from error
    return _read_ranges(quantized, graph)


def _choose_windows(
    image: AnyArray, config: GraphConfig, preprocess: PreprocessConfig
) -> list[ByteArray]:
    """Cut windows of an image for calibration, (1, h, w, C) uint8 each."""
    windows = list(cut_image(image, config, preprocess))
    places = np.linspace(0, len(windows) - 1, min(len(windows), WINDOWS_PER_IMAGE)).astype(int)
    return [windows[place] for place in places]


def _make_input(window: ByteArray, config: GraphConfig, preprocess: PreprocessConfig) -> FloatArray:
    """Normalize a window for the graph, in its layout."""
    values = normalize(torch.from_numpy(window), preprocess)
    if config.layout == "NHWC":
        values = values.permute(0, 2, 3, 1)
    return values.contiguous().numpy()


def _read_ranges(quantized: ov.Model, graph: ov.Model) -> dict[str, tuple[float, float]]:
    """Read the ranges of NNCF's quantizers, whose names contain those of operations of `graph`.

    Raises:
        CheckpointError: the name of a quantizer has another form.
    """
    operations = name_operations(graph)
    names = {each.get_friendly_name(): name for name, each in operations.items()}
    ranges = {}
    for operation in quantized.get_ordered_ops():
        if operation.get_type_name() != "FakeQuantize":
            continue
        found = _QUANTIZER.fullmatch(operation.get_friendly_name())
        if found is None or found["name"] not in names:
            raise CheckpointError(f"unknown quantizer of NNCF: {operation.get_friendly_name()!r}")
        name = names[found["name"]]
        if found["kind"] == WEIGHTS and find_kernel(operations[name]) is None:
            continue
        low, high = (operation.input_value(port).get_node().get_data() for port in (1, 2))
        port = f"{found['port']} " if found["kind"] == INPUT else ""
        values = _round_digits(float(low.min())), _round_digits(float(high.max()))
        ranges[f"{found['kind']} {port}{name}"] = values
    return ranges


def _round_digits(value: float) -> float:
    return float(f"{value:.4g}")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what NNCF prints off the output of the command."""
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
