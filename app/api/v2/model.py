"""The Open Inference Protocol's view of a model: which tensors go in, and which come out.

::

    image          UINT8 (N, H, W, C)             pixels, or
                   BYTES (N)                      encoded files; all of one size
    mask           UINT8 (N, H, W)                0 and 255, or the indices of the classes
    probabilities  FP32 (N, out_channels, H, W)   0..1

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol. Encoded
images are what OpenVINO Model Server takes as BYTES too. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.api.v2 import codec as tensors
from app.errors import ImageError, InvalidRequest
from app.inference.outputs import Options
from app.inference.registry import ServedModel
from app.inference.segmenter import Prediction, Segmenter
from model.arrays import AnyArray, Shape

IMAGE, MASK, PROBABILITIES = "image", "mask", "probabilities"
_DATATYPES = {MASK: "UINT8", PROBABILITIES: "FP32"}
_PASSED_OVER = ("sequence_id", "sequence_start", "sequence_end", "priority")
"""Parameters of other servers' extensions that change no answer of a model without a memory."""


def version(model: ServedModel) -> str:
    """The first 12 hex digits of the weights' sha256."""
    return model.id.rpartition("@")[2]


def describe(model: ServedModel) -> dict[str, Any]:
    """The model's metadata."""
    architecture = model.checkpoint.architecture
    return {
        "name": model.checkpoint.name,
        "versions": [version(model)],
        "platform": model.choices[0].backend,
        "inputs": [
            {"name": IMAGE, "datatype": "UINT8", "shape": [-1, -1, -1, architecture.in_channels]}
        ],
        "outputs": [
            {"name": MASK, "datatype": "UINT8", "shape": [-1, -1, -1]},
            {
                "name": PROBABILITIES,
                "datatype": "FP32",
                "shape": [-1, architecture.out_channels, -1, -1],
            },
        ],
    }


@dataclasses.dataclass(frozen=True)
class Inference:
    """A request that makes sense for its model.

    Attributes:
        id: to be sent back, if there is one.
        images: encoded, or (H, W, C) uint8.
        outputs: those that are asked for, or all.
        threshold: of the mask; None is the model's own.
        seconds: until the client wants its answer; infinite if it did not say.
    """

    id: str | None
    images: Sequence[bytes | AnyArray]
    outputs: Sequence[tensors.Wanted]
    threshold: float | None
    seconds: float

    @property
    def wants_probabilities(self) -> bool:
        return any(wanted.name == PROBABILITIES for wanted in self.outputs)

    def answer_takes(self, model: ServedModel, size: Shape) -> int:
        """Bytes that the answer takes at most: its arrays, and the body they are copied into."""
        channels = model.checkpoint.architecture.out_channels
        shapes = {
            MASK: (len(self.images), *size),
            PROBABILITIES: (len(self.images), channels, *size),
        }
        return sum(
            tensors.encoded_size(shapes[each.name], _DATATYPES[each.name], True)
            + tensors.encoded_size(shapes[each.name], _DATATYPES[each.name], each.binary)
            for each in self.outputs
        )


def read(model: ServedModel, request: tensors.Request) -> Inference:
    """What a request asks of the model.

    Raises:
        InvalidRequest: tensors or parameters that it does not have.
    """
    if [tensor.name for tensor in request.inputs] != [IMAGE]:
        names = ", ".join(_quoted(tensor.name) for tensor in request.inputs[:5]) or "none"
        raise InvalidRequest(f"the model has one input, {IMAGE!r}; the request has {names}")
    tensor = request.inputs[0]
    if isinstance(tensor.values, np.ndarray):
        channels = model.checkpoint.architecture.in_channels
        if tensor.shape[3] != channels:
            raise InvalidRequest(
                f"input {IMAGE!r}: shape is (N, H, W, {channels}), not {tensor.shape}"
            )
    for wanted in request.outputs:
        if wanted.name not in _DATATYPES:
            raise InvalidRequest(
                f"there is no output {_quoted(wanted.name)}; there are {', '.join(_DATATYPES)}"
            )
    threshold, seconds = _parameters(request.parameters)
    Segmenter.check(model, Options(threshold=threshold))
    everything = [tensors.Wanted(name, request.binary_output) for name in _DATATYPES]
    return Inference(
        request.id, list(tensor.values), request.outputs or everything, threshold, seconds
    )


async def size(segmenter: Segmenter, inference: Inference) -> Shape:
    """(height, width) of all of its images.

    Raises:
        ImageError: one is none, or too large.
        InvalidRequest: they differ.
    """
    sizes = []
    for index, image in enumerate(inference.images):
        try:
            sizes.append(await segmenter.size(image))
        except ImageError as error:
            raise named(error, index, inference) from error
        if sizes[-1] != sizes[0]:
            (height, width), (first, other) = sizes[-1], sizes[0]
            raise InvalidRequest(
                f"image {index} is {width} x {height} and the first is {other} x {first}; those of "
                "one request have one size, since its outputs are one tensor each"
            )
    return sizes[0]


def named(error: ImageError, index: int, inference: Inference) -> ImageError:
    """The same error, saying which image it is of."""
    return type(error)(f"image {index}: {error}") if len(inference.images) > 1 else error


def write(
    model: ServedModel, inference: Inference, predictions: Sequence[Prediction]
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of the JSON in it if binary data follows."""
    head = {"model_name": model.checkpoint.name, "model_version": version(model)}
    if inference.id is not None:
        head["id"] = inference.id
    arrays: dict[str, list[AnyArray]] = {
        MASK: [each.mask for each in predictions],
        PROBABILITIES: [
            each.probabilities for each in predictions if each.probabilities is not None
        ],
    }
    return tensors.encode(
        head,
        [tensors.Output(each.name, arrays[each.name], each.binary) for each in inference.outputs],
    )


def _parameters(given: Mapping[str, Any]) -> tuple[float | None, float]:
    """Threshold, and seconds until the client wants its answer."""
    if unknown := sorted(set(given) - {"threshold", "timeout", *_PASSED_OVER}):
        raise InvalidRequest(
            f"unknown parameter {_quoted(unknown[0])}; there are threshold, timeout and "
            "binary_data_output"
        )
    threshold = given.get("threshold")
    if threshold is not None and not (_is_number(threshold) and 0 <= threshold <= 1):
        raise InvalidRequest("parameter threshold is a number in 0..1")
    microseconds = given.get("timeout")
    if microseconds is None:
        return threshold, math.inf
    if not _is_number(microseconds) or not 0 <= microseconds < 1e15:
        raise InvalidRequest("parameter timeout is a number of microseconds")
    return threshold, microseconds / 1e6 or math.inf  # 0 is none, as Triton has it


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _quoted(text: str) -> str:
    return repr(text[:100])
