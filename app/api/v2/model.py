"""The tensors of a model in the Open Inference Protocol.

::

    image          UINT8 (N, H, W, C)             pixels, or
                   BYTES (N)                      encoded files, all of one size
    mask           UINT8 (N, H, W)                0 and 255, or class indices
    probabilities  FP32 (N, out_channels, H, W)   0..1

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol. OpenVINO
Model Server accepts encoded images as BYTES in the same way. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.api.v2 import codec
from app.errors import ImageError, ImageTooLarge, InvalidRequest
from app.inference.image_group import ImageGroup
from app.inference.outputs import Options
from app.inference.registry import ServedModel
from app.inference.segmenter import Prediction, Segmenter
from model.arrays import AnyArray, Shape

IMAGE, MASK, PROBABILITIES = "image", "mask", "probabilities"
_DATATYPES = {MASK: "UINT8", PROBABILITIES: "FP32"}


@dataclasses.dataclass(frozen=True)
class Inference:
    """A request that is valid for its model.

    Attributes:
        id: to be returned with the response, if there is one.
        images: encoded, or (H, W, C) uint8.
        outputs: the requested ones, or all.
        threshold: of the mask; None is the model's own.
        timeout: seconds until the client needs the response; infinite if it did not say.
    """

    id: str | None
    images: Sequence[bytes | AnyArray]
    outputs: Sequence[codec.OutputSpec]
    threshold: float | None
    timeout: float

    @property
    def wants_probabilities(self) -> bool:
        return any(output.name == PROBABILITIES for output in self.outputs)


def model_version(model: ServedModel) -> str:
    """The first 12 hex digits of the SHA-256 of the weights."""
    return model.id.rpartition("@")[2]


def describe_tensors(model: ServedModel) -> dict[str, Any]:
    """The metadata of a model."""
    architecture = model.checkpoint.architecture
    return {
        "name": model.checkpoint.name,
        "versions": [model_version(model)],
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


def describe_config(model: ServedModel) -> dict[str, Any]:
    """The configuration of a model, as Triton's model configuration extension has it.

    Source: https://github.com/triton-inference-server/server, docs/protocol.
    """
    tensors = describe_tensors(model)

    def describe(tensor: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": tensor["name"],
            "data_type": f"TYPE_{tensor['datatype']}",
            "dims": tensor["shape"],
        }

    return {
        "name": tensors["name"],
        "platform": tensors["platform"],
        "backend": tensors["platform"],
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,  # `dims` include the dimension of the batch
        "input": [describe(tensor) for tensor in tensors["inputs"]],
        "output": [describe(tensor) for tensor in tensors["outputs"]],
    }


def describe_statistics(model: ServedModel) -> dict[str, Any]:
    """The statistics of a model since it was loaded, as Triton's statistics extension has them.

    An image counts as an inference, and as an execution too: its windows share batches with those
    of other images, and no batch belongs to one request.
    """
    done = model.statistics

    def duration(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": round(seconds * 1e9)}

    def stages(*names: str) -> dict[str, int]:
        return duration(done.images, sum(done.stage_seconds[name] for name in names))

    return {
        "name": model.checkpoint.name,
        "version": model_version(model),
        "last_inference": round(done.last * 1000),
        "inference_count": done.images,
        "execution_count": done.images,
        "inference_stats": {
            "success": duration(done.images, done.seconds),
            "fail": duration(done.failures, done.failure_seconds),
            "queue": stages("queue"),
            "compute_input": stages("decode"),
            "compute_infer": stages("infer"),
            "compute_output": stages("stitch", "encode"),
            "cache_hit": duration(0, 0),
            "cache_miss": duration(0, 0),
        },
        "batch_stats": [],
    }


def read_inference(model: ServedModel, request: codec.InferenceRequest) -> Inference:
    """Check a request against its model.

    Raises:
        InvalidRequest: tensors or parameters that the model does not have.
    """
    if [tensor.name for tensor in request.inputs] != [IMAGE]:
        names = ", ".join(_quote(tensor.name) for tensor in request.inputs[:5]) or "none"
        raise InvalidRequest(f"the model has one input, {IMAGE!r}; the request has {names}")
    tensor = request.inputs[0]
    if isinstance(tensor.values, np.ndarray):
        channels = model.checkpoint.architecture.in_channels
        if tensor.shape[3] != channels:
            raise InvalidRequest(
                f"input {IMAGE!r}: shape must be (N, H, W, {channels}), not {tensor.shape}"
            )
    for output in request.outputs:
        if output.name not in _DATATYPES:
            available = ", ".join(_DATATYPES)
            raise InvalidRequest(f"unknown output {_quote(output.name)}; available: {available}")
    parameters = request.parameters
    Segmenter.check(model, Options(threshold=parameters.threshold))
    everything = [codec.OutputSpec(name, parameters.binary_data_output) for name in _DATATYPES]
    return Inference(
        request.id,
        list(tensor.values),
        request.outputs or everything,
        parameters.threshold,
        # Triton defines 0 as no timeout.
        parameters.timeout / 1e6 if parameters.timeout else math.inf,
    )


async def common_size(segmenter: Segmenter, inference: Inference, group: ImageGroup) -> Shape:
    """(height, width) of all images of a request.

    Args:
        group: runs the images.

    Raises:
        ImageError, ImageTooLarge: one is not an image, or is too large.
        InvalidRequest: they differ in size.
    """

    async def read_size(index: int) -> Shape:
        try:
            return await segmenter.reader.size(inference.images[index])
        except (ImageError, ImageTooLarge) as error:
            raise name_image(error, index, inference) from error

    sizes = await group.run(range(len(inference.images)), read_size)
    first_height, first_width = sizes[0]
    for index, (height, width) in enumerate(sizes):
        if (height, width) != sizes[0]:
            raise InvalidRequest(
                f"image {index} is {width} x {height}, the first is {first_width} x "
                f"{first_height}; the images of a request must have one size, because each output "
                "is one tensor"
            )
    return sizes[0]


def name_image(
    error: ImageError | ImageTooLarge, index: int, inference: Inference
) -> ImageError | ImageTooLarge:
    """The same error, with the index of its image if there are several."""
    return type(error)(f"image {index}: {error}") if len(inference.images) > 1 else error


def estimate_response_bytes(model: ServedModel, inference: Inference, size: Shape) -> int:
    """The memory that a response takes at most, in bytes: its arrays, and the encoded body."""
    channels = model.checkpoint.architecture.out_channels
    shapes = {
        MASK: (len(inference.images), *size),
        PROBABILITIES: (len(inference.images), channels, *size),
    }
    total = 0
    for output in inference.outputs:
        shape, datatype = shapes[output.name], _DATATYPES[output.name]
        total += codec.array_bytes(shape, datatype)
        total += codec.estimate_encode_bytes(shape, datatype, output.binary)
    return total


def write_response(
    model: ServedModel, inference: Inference, predictions: Sequence[Prediction]
) -> tuple[bytes, int | None]:
    """The body of the response, and the length of the JSON in it if binary data follows."""
    head = {"model_name": model.checkpoint.name, "model_version": model_version(model)}
    if inference.id is not None:
        head["id"] = inference.id
    arrays: dict[str, list[AnyArray]] = {
        MASK: [each.mask for each in predictions],
        PROBABILITIES: [
            each.probabilities for each in predictions if each.probabilities is not None
        ],
    }
    outputs = [
        codec.OutputTensor(output.name, arrays[output.name], output.binary)
        for output in inference.outputs
    ]
    return codec.encode(head, outputs)


def _quote(text: str) -> str:
    return repr(text[:100])
