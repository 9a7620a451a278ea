"""Tensors on the wire: the JSON of the Open Inference Protocol, and binary data after it.

A request or a response is one JSON object. The bytes of binary tensors follow it in the order of
the tensors, little-endian and row-major; the length of the JSON must then be known. In JSON, the
values of a tensor are a list, flat or nested as its shape.

Sources: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and
.../v2-protocol/binary-tensor-data-extension. Neither says how an element of BYTES is written in
JSON, which has no bytes. Here it is base64.

Requests come from clients: sizes are checked before anything of that size is allocated. Knows no
HTTP, no images and no models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from app.api.json_text import encode_json
from app.api.validation import ParametersModel, describe_validation_error, shorten
from app.errors import InvalidRequest, RequestTooLarge
from model.arrays import AnyArray, ByteArray

MAX_JSON_VALUES = 500_000
"""Values in the JSON of a request. Parsing JSON takes many times the time and memory of the same
tensor as binary data, which this limit does not affect."""
MAX_JSON_BYTES = 16_000_000
"""Length of the JSON of a request. Parsing it holds Python's lock, for up to 3 ms per MB (measured
on one core), and every probe waits."""
MAX_BATCH = 1000
"""The first dimension of an input."""

_MAX_ID = 1000
_MAX_TENSORS = 100
_MAX_DIMENSION = 2**31
_VALUES_PER_MEMBER = 4
"""Values that a list, an object or a name counts for: it takes as much time and memory."""
_BYTES_PER_PARSED_VALUE = 128
"""Memory that pydantic, Python and NumPy together use for a value in JSON, at most (measured)."""
_ITEM_BYTES = {"UINT8": 1, "FP32": 4}
_BYTES_PER_WRITTEN_VALUE = {"UINT8": 1 + 4 * 4, "FP32": 4 + 4 * 16}
"""Memory for a value in the JSON of a response: a copy of it, and its characters (255 and a comma;
nine digits, sign, point, exponent and a comma) in blocks, joined twice, and encoded."""


@dataclasses.dataclass(frozen=True)
class InputTensor:
    """One input.

    Attributes:
        shape: as it was sent; no dimension is 0.
        values: for UINT8 a read-only array of that shape, for BYTES the elements.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: ByteArray | list[bytes]


@dataclasses.dataclass(frozen=True)
class OutputSpec:
    """An output that the client asks for."""

    name: str
    binary: bool


class RequestParameters(ParametersModel):
    """Parameters of a whole request. Those of other servers' extensions, which do not change the
    result of a model without state, are accepted and ignored."""

    model_config = ConfigDict(strict=True)

    threshold: float | None = Field(default=None, ge=0, le=1)
    timeout: float | None = Field(default=None, ge=0, le=1e15)  # microseconds
    binary_data_output: bool = False
    sequence_id: Any = None
    sequence_start: Any = None
    sequence_end: Any = None
    priority: Any = None


@dataclasses.dataclass(frozen=True)
class InferenceRequest:
    """An inference request, as the client sent it.

    Attributes:
        id: to be returned with the response, if there is one.
        outputs: none means all, as `parameters.binary_data_output` says.
    """

    id: str | None
    parameters: RequestParameters
    inputs: Sequence[InputTensor]
    outputs: Sequence[OutputSpec]


@dataclasses.dataclass(frozen=True)
class OutputTensor:
    """An output to send.

    Attributes:
        arrays: one per image, all of one shape, uint8 or float32; sent as (N, *shape).
    """

    name: str
    arrays: Sequence[AnyArray]
    binary: bool

    @property
    def datatype(self) -> str:
        return {"uint8": "UINT8", "float32": "FP32"}[self.arrays[0].dtype.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.arrays), *self.arrays[0].shape)


# The JSON of a request.


class _IndexRequest(ParametersModel):
    model_config = ConfigDict(strict=True)

    ready: bool = False


class _InputParameters(ParametersModel):
    model_config = ConfigDict(strict=True)

    binary_data_size: int | None = Field(None, ge=0)
    content_type: Any = None  # a hint that some clients add to every tensor


class _OutputParameters(ParametersModel):
    model_config = ConfigDict(strict=True)

    binary_data: bool | None = None
    content_type: Any = None


_Dimension = Annotated[int, Field(gt=0, le=_MAX_DIMENSION)]
_Byte = Annotated[int, Field(ge=0, le=255)]
_Bytes = Annotated[list[_Byte], Field(fail_fast=True)]
_Columns = Annotated[list[_Bytes], Field(fail_fast=True)]
_Rows = Annotated[list[_Columns], Field(fail_fast=True)]
_Images = Annotated[list[_Rows], Field(fail_fast=True)]


def _choose_layout(data: Any) -> str:
    return "nested" if isinstance(data, list) and data and isinstance(data[0], list) else "flat"


_Pixels = Annotated[
    Annotated[_Bytes, Tag("flat")] | Annotated[_Images, Tag("nested")],
    Discriminator(_choose_layout),
]


class _PixelsJson(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    datatype: Literal["UINT8"]
    shape: list[_Dimension] = Field(min_length=4, max_length=4)
    parameters: _InputParameters | None = None
    data: _Pixels | None = None


class _FilesJson(BaseModel):
    model_config = ConfigDict(strict=True, val_json_bytes="base64")

    name: str
    datatype: Literal["BYTES"]
    shape: list[_Dimension] = Field(min_length=1, max_length=1)
    parameters: _InputParameters | None = None
    data: list[bytes] | None = Field(None, fail_fast=True)


_InputJson = Annotated[_PixelsJson | _FilesJson, Field(discriminator="datatype")]


class _OutputJson(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    parameters: _OutputParameters | None = None


class _RequestJson(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str | None = Field(None, max_length=_MAX_ID)
    parameters: RequestParameters | None = None
    inputs: list[_InputJson] | None = Field(None, max_length=_MAX_TENSORS, fail_fast=True)
    outputs: list[_OutputJson] | None = Field(None, max_length=_MAX_TENSORS, fail_fast=True)


def estimate_parse_bytes(body: bytes, json_length: int | None) -> int:
    """The memory that parsing takes at most, in bytes. It is known before anything is parsed.

    Raises:
        InvalidRequest: the JSON is longer than the body.
        RequestTooLarge: more than `MAX_JSON_BYTES` of JSON, or `MAX_JSON_VALUES` values in it.
    """
    length = len(body) if json_length is None else json_length
    if length > len(body):
        raise InvalidRequest(f"the JSON is declared as {length} bytes, the body has {len(body)}")
    if length > MAX_JSON_BYTES:
        raise RequestTooLarge(
            f"the JSON has {length / 1e6:.1f} MB, {MAX_JSON_BYTES / 1e6:g} are allowed; send "
            "larger tensors as binary data"
        )
    members = sum(body.count(mark, 0, length) for mark in (b"[", b"{", b":"))
    values = body.count(b",", 0, length) + _VALUES_PER_MEMBER * members
    if values > MAX_JSON_VALUES:
        raise RequestTooLarge(
            f"the JSON has about {values} values (a list counts as {_VALUES_PER_MEMBER}), at most "
            f"{MAX_JSON_VALUES} are allowed; send larger tensors as binary data"
        )
    return values * _BYTES_PER_PARSED_VALUE + 2 * length


def array_bytes(shape: Sequence[int], datatype: str) -> int:
    """The size of a tensor's array, and of its binary data, in bytes."""
    return math.prod(shape) * _ITEM_BYTES[datatype]


def estimate_encode_bytes(shape: Sequence[int], datatype: str, binary: bool) -> int:
    """The memory that encoding a tensor takes at most, besides its array, in bytes."""
    if binary:
        return array_bytes(shape, datatype)
    return math.prod(shape) * _BYTES_PER_WRITTEN_VALUE[datatype]


def parse_index_request(body: bytes) -> bool:
    """Whether a request for the index of models asks for those alone that are ready.

    Raises:
        InvalidRequest: not JSON, or not such a request.
    """
    if not body.strip():
        return False
    try:
        return _IndexRequest.model_validate_json(body).ready
    except ValidationError as error:
        raise InvalidRequest(describe_validation_error(error.errors()[0])) from None


def parse(body: bytes, json_length: int | None = None) -> InferenceRequest:
    """Parse the body of an inference request.

    Args:
        json_length: where the JSON ends and the binary data begins; None if all of it is JSON.

    Raises:
        InvalidRequest: the message names the member that is wrong.
        RequestTooLarge: more values, or a larger batch, than allowed.
    """
    estimate_parse_bytes(body, json_length)
    length = len(body) if json_length is None else json_length
    try:
        document = _RequestJson.model_validate_json(body[:length])
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)[0]
        raise InvalidRequest(describe_validation_error(details)) from None
    parameters = document.parameters or RequestParameters()
    binary = _BinaryData(memoryview(body)[length:], json_length is not None)
    inputs = [_read_tensor(each, binary) for each in document.inputs or ()]
    binary.check_end()
    outputs = [_read_output(each, parameters.binary_data_output) for each in document.outputs or ()]
    _check_unique("inputs", [each.name for each in inputs])
    _check_unique("outputs", [each.name for each in outputs])
    return InferenceRequest(document.id, parameters, inputs, outputs)


def encode(head: Mapping[str, Any], outputs: Sequence[OutputTensor]) -> tuple[bytes, int | None]:
    """Encode the body of a response.

    Args:
        head: its members except `outputs`.

    Returns:
        The body, and the length of the JSON in it if binary data follows.
    """
    text = encode_json({**head, "outputs": [_describe_output(output) for output in outputs]})
    data = [
        np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data.cast("B")
        for output in outputs
        if output.binary
        for array in output.arrays
    ]
    return (b"".join([text, *data]), len(text)) if data else (text, None)


def _describe_output(output: OutputTensor) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": output.name,
        "datatype": output.datatype,
        "shape": output.shape,
    }
    if output.binary:
        size = array_bytes(output.shape, output.datatype)
        return described | {"parameters": {"binary_data_size": size}}
    return described | {"data": np.stack(output.arrays)}


class _BinaryData:
    """The bytes after the JSON, read in order.

    Args:
        announced: the request says where its JSON ends.
    """

    def __init__(self, data: memoryview, announced: bool) -> None:
        self._data = data
        self._announced = announced

    def take(self, where: str, size: int) -> memoryview:
        """The next `size` bytes.

        Raises:
            InvalidRequest: fewer remain.
        """
        if not self._announced:
            raise InvalidRequest(f"{where}: has binary data, but the length of the JSON is unknown")
        if size > len(self._data):
            raise InvalidRequest(
                f"{where}: binary_data_size is {shorten(size)}, but {len(self._data)} bytes remain"
            )
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def check_end(self) -> None:
        """Check that all bytes were taken.

        Raises:
            InvalidRequest: some remain.
        """
        if self._data:
            raise InvalidRequest(
                f"{len(self._data)} bytes of binary data belong to no input; set binary_data_size"
            )


def _read_tensor(described: _PixelsJson | _FilesJson, binary: _BinaryData) -> InputTensor:
    where = f"input {shorten(described.name)}"
    shape = tuple(described.shape)
    if shape[0] > MAX_BATCH:
        raise RequestTooLarge(f"{where}: a batch of {shape[0]}; at most {MAX_BATCH} are allowed")
    size = described.parameters.binary_data_size if described.parameters else None
    if (size is None) == (described.data is None):
        raise InvalidRequest(f"{where}: send either 'data' or binary data")
    values: ByteArray | list[bytes]
    if isinstance(described, _PixelsJson):
        if size is None:
            assert described.data is not None
            values = _pixels_from_json(where, described.data, shape)
        else:
            values = _pixels_from_binary(where, binary.take(where, size), shape)
    elif size is None:
        assert described.data is not None
        values = described.data
        if len(values) != shape[0]:
            raise InvalidRequest(f"{where}: shape is {list(shape)}, data has {len(values)} values")
    else:
        values = _split_elements(where, binary.take(where, size), shape[0])
    return InputTensor(described.name, described.datatype, shape, values)


def _read_output(described: _OutputJson, binary_default: bool) -> OutputSpec:
    binary = described.parameters.binary_data if described.parameters else None
    return OutputSpec(described.name, binary_default if binary is None else binary)


def _pixels_from_json(where: str, data: list[Any], shape: tuple[int, ...]) -> ByteArray:
    try:
        values = np.array(data, np.uint8)
    except ValueError:  # lists of different lengths
        values = np.empty(0, np.uint8)
    if values.shape not in (shape, (math.prod(shape),)):
        raise InvalidRequest(
            f"{where}: data must have {math.prod(shape)} values, in a flat list or nested as shape "
            f"{list(shape)}"
        )
    return values.reshape(shape)


def _pixels_from_binary(where: str, data: memoryview, shape: tuple[int, ...]) -> ByteArray:
    if math.prod(shape) != len(data):
        raise InvalidRequest(
            f"{where}: shape {list(shape)} needs {math.prod(shape)} bytes, binary_data_size is "
            f"{len(data)}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _split_elements(where: str, data: memoryview, count: int) -> list[bytes]:
    """Split binary data of BYTES: each element is preceded by its length in four bytes."""
    elements: list[bytes] = []
    while data and len(elements) < count:
        length = int.from_bytes(data[:4], "little")
        if len(data) < 4 + length:
            raise InvalidRequest(
                f"{where}: element {len(elements)} is truncated; each is its length in four bytes, "
                "little-endian, and that many bytes"
            )
        elements.append(bytes(data[4 : 4 + length]))
        data = data[4 + length :]
    if data:
        raise InvalidRequest(f"{where}: {len(data)} bytes remain after {count} elements")
    if len(elements) < count:
        raise InvalidRequest(f"{where}: shape is [{count}], found {len(elements)} elements")
    return elements


def _check_unique(where: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise InvalidRequest(f"{where}: a name is given twice")
