"""The CPU engine: the network in OpenVINO operators, built directly from a checkpoint.

It needs neither torch nor an exported file. `build_graph` writes the network down again,
with normalization before it and the sigmoid or softmax after it, so that one compiled model takes
bytes and returns probabilities.

int8 is the same graph with int8 weights, one scale per output channel (`app.engine.quantize`), and
a `FakeQuantize` on every activation. OpenVINO turns these into 8-bit layers, from the bytes of the
image to the logits. The ranges come from the checkpoint's calibration. Tensors that are
concatenated share one quantizer, but the up-sampled branch can have a far larger range than the
skip; `equalize_branches` gives both the same range first, which is exact in fp32.
`app.engine.graph_quantizers` does the same with an ONNX graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from app.engine.base import Engine, check_batch, check_finite
from app.engine.cpus import count_cpus
from app.engine.graph_quantizers import insert_quantizers
from app.engine.openvino_core import shared_core
from app.engine.openvino_graph import normalize_windows, read_graph, set_shape, wrap_graph
from app.engine.quantize import MIN_RANGE, Ranges, equalize_branches, quantize_weights
from app.errors import EngineError
from model.arrays import AnyArray, ByteArray, FloatArray, Shape
from model.checkpoint import GRAPH_TENSOR, Checkpoint
from model.config import LEVELS, SKIP_MARGINS, GraphConfig, PreprocessConfig, UNetConfig

_KERNELS_STARTED_S = 0.005
"""Seconds after which a run has started to generate its kernels, also on busy cores. If it has not,
the first request of that shape takes 20 ms longer."""


class OpenVinoEngine(Engine):
    """See `app.engine.base.Engine`.

    Args:
        checkpoint: the model; int8 needs its calibration.
        precision: "fp32", "int8", or "bf16" where `has_bf16`.
        threads: CPU threads to use.
        max_batch: windows at once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int,
        max_batch: int,
        precision: str = "fp32",
    ) -> None:
        self.shapes: tuple[Shape, ...] = checkpoint.preprocess.window
        self.max_batch = max_batch
        self._channels = checkpoint.architecture.in_channels
        self._options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # OpenVINO binds threads to CPUs from the first one on. Where this process has fewer
            # threads than CPUs, others have theirs, and would be bound to the same ones.
            "ENABLE_CPU_PINNING": threads >= count_cpus(),
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        }
        ranges = None
        if precision == "int8":
            if checkpoint.calibration is None:
                raise EngineError(f"{checkpoint.name} has no calibration; int8 needs one")
            ranges = checkpoint.calibration.ranges
        self._graph = _build(checkpoint, ranges)
        self._is_foreign = isinstance(checkpoint.architecture, GraphConfig)
        # OpenVINO computes other values where a quantized graph has free sizes, so each window gets
        # a model of its own (docs/decisions/0049-int8-of-onnx-graphs.md).
        if self._is_foreign and ranges is not None:
            self._requests = {shape: self._compile(shape) for shape in self.shapes}
        else:
            self._requests = dict.fromkeys(self.shapes, self._compile())

    def _compile(self, shape: Shape | None = None) -> ov.InferRequest:
        """Compile the graph, for windows of one shape or of any, and return what runs it."""
        graph = self._graph
        if shape is not None:
            graph = graph.clone()
            set_shape(graph, [1, *shape, self._channels])
        return shared_core().compile_model(graph, "CPU", self._options).create_infer_request()

    def stage(self, shape: Shape, count: int) -> ByteArray:
        check_batch(self, shape, count)
        return np.empty((count, *shape, self._channels), np.uint8)

    def submit(self, windows: ByteArray) -> ByteArray:
        return windows  # `collect` computes: a CPU does nothing else meanwhile

    def collect(self, submitted: ByteArray) -> FloatArray:
        # One at a time: a batch would be no faster, would need the memory of all its windows, and
        # each batch size would be a new shape for OpenVINO to prepare.
        try:
            windows = [self._infer(submitted[i : i + 1]) for i in range(len(submitted))]
        except RuntimeError as error:
            raise EngineError(f"OpenVINO: {error}") from error
        return check_finite(windows[0] if len(windows) == 1 else np.concatenate(windows))

    def _infer(self, window: ByteArray) -> FloatArray:
        request = self._requests[window.shape[1], window.shape[2]]
        (result,) = request.infer([window], share_inputs=True).values()
        return np.asarray(result, np.float32)

    def warm_steps(self) -> Iterator[Callable[[], None]]:
        # The largest window is computed too, so that all memory is allocated before ready.
        largest, *others = sorted(self.shapes, key=math.prod, reverse=True)
        if self._is_foreign:  # it is not known when a run has generated its kernels
            for shape in others:
                yield functools.partial(self._compute_black, shape)
        elif others:
            yield functools.partial(self._generate_kernels, others)
        yield functools.partial(self._compute_black, largest)

    def _compute_black(self, shape: Shape) -> None:
        self.collect(self.submit(np.zeros((1, *shape, self._channels), np.uint8)))

    def _generate_kernels(self, shapes: Iterable[Shape]) -> None:
        """Generate the kernels for these windows, 20 ms each, without computing anything.

        OpenVINO generates the kernels of all layers before it runs the first layer, and oneDNN
        caches them for the whole process. So another compiled model starts a run per shape, which
        is cancelled at once. That model is discarded: after a cancelled run it can return wrong
        results (docs/decisions/0019-kernels-without-computing.md).
        """
        request = self._compile()
        for shape in shapes:
            request.start_async([np.zeros((1, *shape, self._channels), np.uint8)])
            time.sleep(_KERNELS_STARTED_S)
            request.cancel()
            with contextlib.suppress(RuntimeError):  # raised because it was cancelled
                request.wait()

    def layers(self) -> list[tuple[str, str]]:
        """List the type and the precision of every layer as OpenVINO executes it."""
        model = self._requests[self.shapes[0]].get_compiled_model()
        operations = model.get_runtime_model().get_ordered_ops()
        facts = [operation.get_rt_info() for operation in operations]
        return [(each["layerType"].value, each["runtimePrecision"].value) for each in facts]

    def close(self) -> None:
        del self._requests, self._graph


def has_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AMX or AVX-512 BF16)."""
    return "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _build(checkpoint: Checkpoint, ranges: Ranges | None) -> ov.Model:
    """Build the graph of a checkpoint, from bytes to probabilities."""
    architecture, preprocess = checkpoint.architecture, checkpoint.preprocess
    if isinstance(architecture, UNetConfig):
        return build_graph(architecture, preprocess, checkpoint.state, ranges)
    graph = read_graph(checkpoint.state[GRAPH_TENSOR])
    if ranges is not None:
        insert_quantizers(graph, ranges)
    graph = wrap_graph(graph, architecture, preprocess)
    for shape in preprocess.window:
        set_shape(graph.clone(), [1, *shape, architecture.in_channels])
    return graph


def build_graph(
    architecture: UNetConfig,
    preprocess: PreprocessConfig,
    state: Mapping[str, AnyArray],
    ranges: Ranges | None = None,
) -> ov.Model:
    """Build `model.unet.UNet` between normalization and probabilities, for any window shape.

    Args:
        architecture: of the network.
        preprocess: normalization, and whether probabilities are a sigmoid or a softmax.
        state: tensors by state-dict name.
        ranges: activations of every layer, for int8; None for fp32.

    Returns:
        A model from (N, H, W, C) uint8 to (N, out_channels, H', W') float32.
    """
    pad = [architecture.padding] * 2
    # Converted to fp32 one by one: all at once would be most of the memory that a start takes.
    tensors = state if ranges is None else equalize_branches(state, ranges)

    def weight(name: str, axis: int = 0) -> Any:
        """Return a weight tensor; in int8 with one scale per output channel, along `axis`."""
        value = tensors[f"{name}.weight"]
        if ranges is None:
            return ops.constant(value.astype(np.float32))
        quantized, scale = quantize_weights(value, axis)
        return ops.multiply(ops.convert(ops.constant(quantized), "f32"), ops.constant(scale))

    def fake_quantize(x: Any, name: str, *, signed: bool = False) -> Any:
        """In int8, quantize an activation to 256 levels, one of them 0; in fp32, do nothing."""
        if ranges is None:
            return x
        high = np.float32(max(ranges[name][1], MIN_RANGE))
        low = np.float32(-high * 128 / 127 if signed else 0)
        return ops.fake_quantize(x, low, high, low, high, 256)

    def bias(name: str) -> FloatArray:
        return tensors[f"{name}.bias"].astype(np.float32).reshape(1, -1, 1, 1)

    def convolve(x: Any, name: str, padding: list[int]) -> Any:
        x = ops.convolution(x, weight(name), [1, 1], padding, padding, [1, 1])
        return ops.add(x, bias(name))

    def double_convolve(x: Any, name: str) -> Any:
        x = ops.relu(convolve(x, f"{name}.first", pad))
        x = fake_quantize(x, f"{name}.first")
        return ops.relu(convolve(x, f"{name}.second", pad))

    def crop(skip: Any, level: int) -> Any:
        """Crop a skip to the up-sampled tensor of its level: by the same margin at every size."""
        if architecture.padding:
            return skip
        margin = SKIP_MARGINS[level]
        return ops.slice(skip, [margin, margin], [-margin, -margin], [1, 1], [2, 3])

    image = ops.parameter([-1, -1, -1, architecture.in_channels], np.uint8, name="image")
    x = normalize_windows(image, preprocess)
    skips = []
    for level in range(LEVELS):
        name = f"down_conv.{level}"
        # One quantizer for both uses of a skip, symmetric like that of its partner: a second one
        # would cost more time than its additional bit is worth.
        x = fake_quantize(double_convolve(x, name), f"{name}.second", signed=True)
        skips.append(x)
        x = ops.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    x = fake_quantize(double_convolve(x, "middle_conv"), "middle_conv.second")
    for level in range(LEVELS):
        partner = f"down_conv.{LEVELS - 1 - level}.second"
        x = ops.convolution_backprop_data(x, weight(f"up_sample.{level}.up", axis=1), [2, 2])
        x = fake_quantize(ops.add(x, bias(f"up_sample.{level}.up")), partner, signed=True)
        skip = crop(skips.pop(), LEVELS - 1 - level)
        x = double_convolve(ops.concat([x, skip], axis=1), f"up_conv.{level}")
        x = fake_quantize(x, f"up_conv.{level}.second")
    x = convolve(x, "final_conv", [0, 0])
    x = ops.sigmoid(x) if preprocess.binary else ops.softmax(x, axis=1)
    return ov.Model([x], [image], "unet")
