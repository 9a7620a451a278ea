"""The CPU engine: the network built of OpenVINO's own operators, straight from a checkpoint.

No torch, no export, no intermediate file: the graph is written down once more below, in the terms
of OpenVINO, with normalisation before it and the sigmoid or softmax behind it, so that bytes go in
and probabilities come out of one compiled model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as ops

from app.errors import EngineError
from model.checkpoint import Checkpoint
from model.config import PreprocessConfig, Shape, UNetConfig

_LEVELS = 4
_LOST = (88, 40, 16, 4)
"""Pixels on each side by which a skip is larger than what it joins, unpadded, from the top level
down: each level below costs 4 pixels of its own scale on the way down and 4 on the way up."""


class OpenVinoEngine:
    """See `app.engine.base.Engine`.

    Args:
        checkpoint: the model.
        threads: CPU threads to use.
        max_batch: windows at once.
        cache: folder for compiled models, which makes later starts faster; None is none.
    """

    backend = "openvino"
    device = "cpu"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int,
        max_batch: int,
        reason: str = "",
        cache: Path | None = None,
    ) -> None:
        self.precision = "fp32"
        self.reason = reason
        self.shapes: tuple[Shape, ...] = checkpoint.preprocess.window
        self.max_batch = max_batch
        self._channels = checkpoint.architecture.in_channels
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if cache is not None:
            options["CACHE_DIR"] = os.fspath(cache)
        graph = build_graph(checkpoint.architecture, checkpoint.preprocess, checkpoint.state)
        self._model = ov.Core().compile_model(graph, "CPU", options)
        self._request = self._model.create_infer_request()

    def stage(self, shape: Shape, count: int) -> npt.NDArray[np.uint8]:
        if shape not in self.shapes or not 1 <= count <= self.max_batch:
            raise ValueError(f"{count} windows of {shape} for an engine of {self.shapes}")
        return np.empty((count, *shape, self._channels), np.uint8)

    def run(self, windows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        try:
            (result,) = self._request.infer([windows], share_inputs=True).values()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO: {error}") from error
        return np.asarray(result, np.float32)

    def warm(self) -> None:
        for shape in self.shapes:
            self.run(np.zeros((1, *shape, self._channels), np.uint8))

    def close(self) -> None:
        del self._request, self._model


def build_graph(
    architecture: UNetConfig,
    preprocess: PreprocessConfig,
    state: Mapping[str, npt.NDArray[Any]],
) -> ov.Model:
    """`model.unet.UNet` between normalisation and probabilities, for any window shape.

    The input is (N, H, W, C) uint8, the output (N, out_channels, H', W') float32.
    """
    pad = [architecture.padding] * 2

    def weight(name: str) -> npt.NDArray[np.float32]:
        return state[name].astype(np.float32)

    def bias(name: str) -> npt.NDArray[np.float32]:
        return weight(f"{name}.bias").reshape(1, -1, 1, 1)

    def convolve(x: Any, name: str, padding: list[int]) -> Any:
        x = ops.convolution(x, weight(f"{name}.weight"), [1, 1], padding, padding, [1, 1])
        return ops.add(x, bias(name))

    def double(x: Any, name: str) -> Any:
        x = ops.relu(convolve(x, f"{name}.first", pad))
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
    for level in range(_LEVELS):
        x = double(x, f"down_conv.{level}")
        skips.append(x)
        x = ops.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    x = double(x, "middle_conv")
    for level in range(_LEVELS):
        x = ops.convolution_backprop_data(x, weight(f"up_sample.{level}.up.weight"), [2, 2])
        x = ops.add(x, bias(f"up_sample.{level}.up"))
        skip = crop(skips.pop(), _LEVELS - 1 - level)
        x = double(ops.concat([x, skip], axis=1), f"up_conv.{level}")
    x = convolve(x, "final_conv", [0, 0])
    x = ops.sigmoid(x) if preprocess.binary else ops.softmax(x, axis=1)
    return ov.Model([x], [image], "unet")
