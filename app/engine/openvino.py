"""The CPU engine: the network built of OpenVINO's own operators, straight from a checkpoint.

No torch, no export, no intermediate file: the graph is written down once more below, in the terms
of OpenVINO, with normalisation before it and the sigmoid or softmax behind it, so that bytes go in
and probabilities come out of one compiled model.

int8 is the same graph with int8 weights, one scale an output channel (`app.engine.quantize`), and a
`FakeQuantize` on every activation; OpenVINO's own passes make 8-bit layers of all of them, from the
bytes of the image to the logits. Ranges come from the checkpoint's calibration. What is
concatenated shares one quantiser, and the up-sampled branch can be far larger than the skip beside
it; `equalised` makes both equally large first, which is exact in fp32.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from app.engine.quantize import SMALLEST, Ranges, equalised, whole
from app.errors import EngineError
from model.arrays import AnyArray, ByteArray, FloatArray, Shape
from model.checkpoint import Checkpoint
from model.config import LEVELS, PreprocessConfig, UNetConfig

_LOST = (88, 40, 16, 4)
"""Pixels on each side by which a skip is larger than what it joins, unpadded, from the top level
down: each level below costs 4 pixels of its own scale on the way down and 4 on the way up."""

_BEGUN = 0.005
"""Seconds after which a run has begun to generate its kernels, also on busy cores. If ever it has
not, the first request of that shape takes 20 ms longer."""


class OpenVinoEngine:
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
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        }
        ranges = None
        if precision == "int8":
            if checkpoint.calibration is None:
                raise EngineError(f"{checkpoint.name} has no calibration, which int8 needs")
            ranges = checkpoint.calibration.ranges
        self._graph = build_graph(
            checkpoint.architecture, checkpoint.preprocess, checkpoint.state, ranges
        )
        self._model = self._compiled()
        self._request = self._model.create_infer_request()

    def _compiled(self) -> ov.CompiledModel:
        return ov.Core().compile_model(self._graph, "CPU", self._options)

    def stage(self, shape: Shape, count: int) -> ByteArray:
        if shape not in self.shapes or not 1 <= count <= self.max_batch:
            raise ValueError(f"{count} windows of {shape} for an engine of {self.shapes}")
        return np.empty((count, *shape, self._channels), np.uint8)

    def load(self, windows: ByteArray) -> ByteArray:
        return windows  # they are where they are computed

    def run(self, windows: ByteArray) -> FloatArray:
        # One at a time: together they would be no faster, take the memory of all, and every number
        # of windows would be a new shape for OpenVINO to prepare.
        try:
            return np.concatenate([self._run(windows[i : i + 1]) for i in range(len(windows))])
        except RuntimeError as error:
            raise EngineError(f"OpenVINO: {error}") from error

    def _run(self, window: ByteArray) -> FloatArray:
        (result,) = self._request.infer([window], share_inputs=True).values()
        return np.asarray(result, np.float32)

    def warm(self) -> None:
        # The largest is computed, too: it takes all the memory that there will be.
        largest, *others = sorted(self.shapes, key=math.prod, reverse=True)
        if others:
            self._generate_kernels(others)
        self.run(np.zeros((1, *largest, self._channels), np.uint8))

    def _generate_kernels(self, shapes: Iterable[Shape]) -> None:
        """Have the kernels of these windows generated, which takes 20 ms each, and compute nothing.

        OpenVINO generates the kernels of all layers before it runs the first, and oneDNN keeps them
        for the whole process. So they are generated in the name of another compiled model, each of
        whose runs is cancelled when it has begun. That one is thrown away: after a cancelled run it
        can give a wrong result (docs/decisions/0019-kernels-without-computing.md).
        """
        request = self._compiled().create_infer_request()
        for shape in shapes:
            request.start_async([np.zeros((1, *shape, self._channels), np.uint8)])
            time.sleep(_BEGUN)
            request.cancel()
            with contextlib.suppress(RuntimeError):  # that it was cancelled
                request.wait()

    def close(self) -> None:
        del self._request, self._model, self._graph


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself (AMX, or AVX-512 BF16)."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def build_graph(
    architecture: UNetConfig,
    preprocess: PreprocessConfig,
    state: Mapping[str, AnyArray],
    ranges: Ranges | None = None,
) -> ov.Model:
    """`model.unet.UNet` between normalisation and probabilities, for any window shape.

    The input is (N, H, W, C) uint8, the output (N, out_channels, H', W') float32.

    Args:
        ranges: of the activations (`model.config.Calibration`); None: in fp32.
    """
    pad = [architecture.padding] * 2
    # In fp32 only while they are needed: all of them at once are most of what a start would take.
    tensors = state if ranges is None else equalised(state, ranges)

    def weight(name: str, axis: int = 0) -> Any:
        """The tensor; in int8 with a scale for each place of `axis`, the output channels."""
        value = tensors[f"{name}.weight"]
        if ranges is None:
            return ops.constant(value.astype(np.float32))
        number, scale = whole(value, axis)
        return ops.multiply(ops.convert(ops.constant(number), "f32"), ops.constant(scale))

    def narrow(x: Any, name: str, *, signed: bool = False) -> Any:
        """Nothing in fp32; in int8 the 256 levels of a convolution's output, one of them 0."""
        if ranges is None:
            return x
        high = np.float32(max(ranges[name][1], SMALLEST))
        low = np.float32(-high * 128 / 127 if signed else 0)
        return ops.fake_quantize(x, low, high, low, high, 256)

    def bias(name: str) -> FloatArray:
        return tensors[f"{name}.bias"].astype(np.float32).reshape(1, -1, 1, 1)

    def convolve(x: Any, name: str, padding: list[int]) -> Any:
        x = ops.convolution(x, weight(name), [1, 1], padding, padding, [1, 1])
        return ops.add(x, bias(name))

    def double(x: Any, name: str) -> Any:
        x = ops.relu(convolve(x, f"{name}.first", pad))
        x = narrow(x, f"{name}.first")
        return ops.relu(convolve(x, f"{name}.second", pad))

    def crop(skip: Any, level: int) -> Any:
        """Cut off what the unpadded convolutions below `level` lost: the same at every size."""
        if architecture.padding:
            return skip
        lost = _LOST[level]
        return ops.slice(skip, [lost, lost], [-lost, -lost], [1, 1], [2, 3])

    image = ops.parameter([-1, -1, -1, architecture.in_channels], np.uint8, name="image")
    scale = 1 / (255 * np.array(preprocess.std, np.float32))
    shift = -np.array(preprocess.mean, np.float32) / np.array(preprocess.std, np.float32)
    x = ops.transpose(ops.convert(image, "f32"), np.array([0, 3, 1, 2]))
    x = ops.add(ops.multiply(x, scale.reshape(1, -1, 1, 1)), shift.reshape(1, -1, 1, 1))
    skips = []
    for level in range(LEVELS):
        name = f"down_conv.{level}"
        # One quantiser for both uses of a skip, symmetric as its partner's: two of them cost more
        # time than the bit they win is worth.
        x = narrow(double(x, name), f"{name}.second", signed=True)
        skips.append(x)
        x = ops.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    x = narrow(double(x, "middle_conv"), "middle_conv.second")
    for level in range(LEVELS):
        partner = f"down_conv.{LEVELS - 1 - level}.second"
        x = ops.convolution_backprop_data(x, weight(f"up_sample.{level}.up", axis=1), [2, 2])
        x = narrow(ops.add(x, bias(f"up_sample.{level}.up")), partner, signed=True)
        skip = crop(skips.pop(), LEVELS - 1 - level)
        x = double(ops.concat([x, skip], axis=1), f"up_conv.{level}")
        x = narrow(x, f"up_conv.{level}.second")
    x = convolve(x, "final_conv", [0, 0])
    x = ops.sigmoid(x) if preprocess.binary else ops.softmax(x, axis=1)
    return ov.Model([x], [image], "unet")
