"""Tensors on the wire: the Open Inference Protocol's JSON, and binary data behind it.

A request or an answer is one JSON object. Where tensors are binary, their bytes follow it in their
order, little-endian and row-major, and somebody has to say where the JSON ends. A tensor's values
in JSON are a list of them, flat or nested as its shape says.

Sources: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and
.../v2-protocol/binary-tensor-data-extension. JSON has no bytes, and neither of them says how an
element of BYTES is written in it: here, in base64.

Everything that is read was written by a client: sizes are compared before anything of that size is
made. Knows no HTTP, no images and no models.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from app.errors import InvalidRequest, UploadTooLarge
from model.arrays import AnyArray, ByteArray

MOST_VALUES = 2_000_000
"""In the JSON of a request. Parsing takes many times as long, and as much memory, as the
same tensor takes in binary, where this does not count."""
LARGEST_BATCH = 1000
"""The first side of an input."""
LONGEST_ID = 1000

_LONGEST_SIDE = 2**31
_DIMENSIONS = {"UINT8": 4, "BYTES": 1}
_LIST_COUNTS = 4
"""Values as which a list or an object counts: it takes as long, and the collector of garbage looks
at it again and again."""
_BYTES_OF_A_VALUE = 64
"""Which CPython takes for a list, a number or a short text, at most, with its place in a list."""
_TYPES = {"uint8": "UINT8", "float32": "FP32"}
_LONGEST = {"UINT8": 4, "FP32": 16}
"""Characters of a value in the JSON of an answer: 255 and a comma; nine digits, the sign, the
point, the exponent and a comma."""
_CHUNK = 8192
"""Values that are written at once, so that other threads have their turn between."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One input.

    Attributes:
        shape: as it was sent; no side is 0.
        values: UINT8: an array of that shape, to be read only; BYTES: its elements.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: ByteArray | list[bytes]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An output that is asked for."""

    name: str
    binary: bool


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asks.

    Attributes:
        id: to be sent back, if there is one.
        parameters: of the request as a whole, but for `binary_data_output`.
        outputs: none: all there are, as `binary_output` says.
    """

    id: str | None
    parameters: Mapping[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[Wanted]
    binary_output: bool


@dataclasses.dataclass(frozen=True)
class Output:
    """An output to be sent.

    Attributes:
        arrays: one an image, all of one shape; they become (N, *shape).
    """

    name: str
    arrays: Sequence[AnyArray]
    binary: bool

    @property
    def datatype(self) -> str:
        return _TYPES[self.arrays[0].dtype.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.arrays), *self.arrays[0].shape)


def parsing_takes(body: bytes, json_length: int | None) -> int:
    """Bytes that the parsed JSON takes at most, known before it is parsed.

    Raises:
        InvalidRequest: the JSON is longer than the body.
        UploadTooLarge: more values than are taken in JSON.
    """
    length = len(body) if json_length is None else json_length
    if length > len(body):
        raise InvalidRequest(
            f"the JSON is said to be {length} bytes long, and the whole body is {len(body)}"
        )
    values = sum(body.count(mark, 0, length) for mark in (b",", b":"))
    values += _LIST_COUNTS * sum(body.count(mark, 0, length) for mark in (b"[", b"{"))
    if values > MOST_VALUES:
        raise UploadTooLarge(
            f"the JSON has about {values} values (a list counts as {_LIST_COUNTS}), and "
            f"{MOST_VALUES} are taken; send larger tensors as binary data"
        )
    return values * _BYTES_OF_A_VALUE + 2 * length


def parse(body: bytes, json_length: int | None = None) -> Request:
    """The body of an inference request.

    Args:
        json_length: where the JSON ends and the binary data begins; None: all of it is JSON.

    Raises:
        InvalidRequest: it is not one; the text names the member that is wrong.
        UploadTooLarge: more values, or a larger batch, than are taken.
    """
    parsing_takes(body, json_length)
    length = len(body) if json_length is None else json_length
    document = _object("the request", _json(body[:length]))
    identifier = document.get("id")
    if identifier is not None and (not isinstance(identifier, str) or len(identifier) > LONGEST_ID):
        raise InvalidRequest(
            f"id: a text of at most {LONGEST_ID} characters, not {_shown(identifier)}"
        )
    parameters = dict(_parameters("the request", document))
    binary_output = _boolean("binary_data_output", parameters.pop("binary_data_output", False))
    binary = _Binary(memoryview(body)[length:], json_length is not None)
    inputs = [_tensor(each, binary) for each in _list("inputs", document.get("inputs"))]
    binary.end()
    outputs = [_wanted(each, binary_output) for each in _list("outputs", document.get("outputs"))]
    _all_different("inputs", [each.name for each in inputs])
    _all_different("outputs", [each.name for each in outputs])
    return Request(identifier, parameters, inputs, outputs, binary_output)


def encoded_size(shape: Sequence[int], datatype: str, binary: bool) -> int:
    """Bytes that an output takes in an answer; in JSON, at most."""
    size = np.dtype(np.uint8 if datatype == "UINT8" else np.float32).itemsize
    return math.prod(shape) * (size if binary else _LONGEST[datatype])


def encode(head: Mapping[str, Any], outputs: Sequence[Output]) -> tuple[bytes, int | None]:
    """The body of an answer.

    Args:
        head: its members but for `outputs`.

    Returns:
        The body, and the length of the JSON in it if binary data follows it.
    """
    texts = []
    for output in outputs:
        described: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": output.shape,
        }
        if output.binary:
            size = encoded_size(output.shape, output.datatype, True)
            texts.append(_text(described | {"parameters": {"binary_data_size": size}}))
        else:
            values = ",".join(itertools.chain.from_iterable(map(_written, output.arrays)))
            texts.append(f'{_text(described)[:-1]},"data":[{values}]}}')
    listed = ",".join(texts)
    opening = _text(dict(head))[:-1]
    text = f'{opening}{"," if head else ""}"outputs":[{listed}]}}'.encode()
    data = [
        np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data.cast("B")
        for output in outputs
        if output.binary
        for array in output.arrays
    ]
    return (b"".join([text, *data]), len(text)) if data else (text, None)


def _written(array: AnyArray) -> Iterator[str]:
    """The values in JSON, a piece at a time.

    Nine digits give back every float32 (IEEE 754, section 5.12.2). Written in one go, millions of
    values would keep the interpreter from everybody else.
    """
    flat = array.ravel()
    for start in range(0, flat.size, _CHUNK):
        values = flat[start : start + _CHUNK].tolist()
        if array.dtype == np.uint8:
            yield str(values)[1:-1].replace(" ", "")
        else:
            yield ",".join(map("{:.9g}".format, values))


class _Binary:
    """What stands behind the JSON, handed out in order."""

    def __init__(self, data: memoryview, announced: bool) -> None:
        self._data = data
        self._announced = announced

    def take(self, where: str, size: Any) -> memoryview:
        if not _is_integer(size) or size < 0:
            raise InvalidRequest(f"{where}: binary_data_size is a number of bytes, {_not(size)}")
        if not self._announced:
            raise InvalidRequest(f"{where}: has binary data, and nothing says where the JSON ends")
        if size > len(self._data):
            raise InvalidRequest(
                f"{where}: binary_data_size is {_shown(size)}, and {len(self._data)} bytes are left"
            )
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def end(self) -> None:
        if self._data:
            raise InvalidRequest(
                f"{len(self._data)} bytes of binary data belong to no input; each says its "
                "binary_data_size"
            )


def _json(text: bytes) -> Any:
    """JSON and nothing else: no NaN, no member twice.

    Through functions in Python, although those in C are faster: the interpreter can turn to
    other threads between them, and millions of values do not hold up the probes.
    """
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_without_repeats,
            parse_int=lambda digits: int(digits),
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the request is not JSON: {error}") from None


def _without_repeats(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) < len(members):
        raise ValueError("a member stands in it twice")
    return found


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in it")


def _tensor(value: Any, binary: _Binary) -> Tensor:
    described = _object("an input", value)
    where = f"input {_name('an input', described)}"
    datatype = described.get("datatype")
    if not isinstance(datatype, str) or datatype not in _DIMENSIONS:
        raise InvalidRequest(f"{where}: datatype is {' or '.join(_DIMENSIONS)}, {_not(datatype)}")
    shape = _shape(where, described.get("shape"), _DIMENSIONS[datatype])
    if shape[0] > LARGEST_BATCH:
        raise UploadTooLarge(f"{where}: a batch of {shape[0]}; {LARGEST_BATCH} are taken at once")
    parameters = dict(_parameters(where, described))
    size = parameters.pop("binary_data_size", None)
    _no_more(where, parameters, "binary_data_size")
    data = described.get("data")
    if (size is None) == (data is None):
        raise InvalidRequest(f"{where}: its values are either 'data' or binary data")
    values: ByteArray | list[bytes]
    if data is not None:
        flat = _flat(where, data, shape)
        values = _decoded(where, flat) if datatype == "BYTES" else _pixels(where, flat, shape)
    elif datatype == "BYTES":
        values = _split(where, binary.take(where, size), shape[0])
    else:
        taken = binary.take(where, size)
        if math.prod(shape) != len(taken):
            raise InvalidRequest(
                f"{where}: shape {_shown(list(shape))} is not that of {len(taken)} bytes"
            )
        values = np.frombuffer(taken, np.uint8).reshape(shape)
    return Tensor(described["name"], datatype, shape, values)


def _wanted(value: Any, binary: bool) -> Wanted:
    described = _object("an output", value)
    name = _name("an output", described)
    parameters = dict(_parameters(f"output {name}", described))
    own = _boolean("binary_data", parameters.pop("binary_data", binary))
    _no_more(f"output {name}", parameters, "binary_data")
    return Wanted(described["name"], own)


def _shape(where: str, value: Any, dimensions: int) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) != dimensions
        or not all(_is_integer(side) and 0 < side <= _LONGEST_SIDE for side in value)
    ):
        raise InvalidRequest(
            f"{where}: shape is a list of {dimensions} whole numbers above 0, {_not(value)}"
        )
    return tuple(value)


def _flat(where: str, data: Any, shape: tuple[int, ...]) -> list[Any]:
    """The values of nested or flat lists, none of which is shorter or longer than it should be."""
    level = [data]
    nested = isinstance(data, list) and data and isinstance(data[0], list)
    for length in shape if nested else (math.prod(shape),):
        if not all(isinstance(each, list) and len(each) == length for each in level):
            raise InvalidRequest(
                f"{where}: data is a list of {_shown(math.prod(shape))} values, flat or nested as "
                f"shape {_shown(list(shape))} says"
            )
        level = level[0] if len(level) == 1 else list(itertools.chain.from_iterable(level))
    return level


def _pixels(where: str, values: list[Any], shape: tuple[int, ...]) -> ByteArray:
    try:
        if set(map(type, values)) != {int}:
            raise ValueError
        return np.frombuffer(bytes(values), np.uint8).reshape(shape)
    except ValueError:
        raise InvalidRequest(f"{where}: a value of UINT8 is a whole number in 0..255") from None


def _decoded(where: str, values: list[Any]) -> list[bytes]:
    try:
        if set(map(type, values)) != {str}:
            raise ValueError
        return [base64.b64decode(value, validate=True) for value in values]
    except ValueError:
        raise InvalidRequest(f"{where}: an element of BYTES in JSON is base64") from None


def _split(where: str, data: memoryview, count: int) -> list[bytes]:
    """Elements, each behind its length in four bytes."""
    elements: list[bytes] = []
    while data and len(elements) < count:
        length = int.from_bytes(data[:4], "little")
        if len(data) < 4 + length:
            raise InvalidRequest(
                f"{where}: element {len(elements)} is not complete; each is its length in four "
                "bytes, little-endian, and as many bytes"
            )
        elements.append(bytes(data[4 : 4 + length]))
        data = data[4 + length :]
    if data or len(elements) < count:
        raise InvalidRequest(
            f"{where}: shape [{count}] is not that of its binary data: "
            + (f"{len(data)} bytes are left over" if data else f"it has {len(elements)} elements")
        )
    return elements


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} is a JSON object, {_not(value)}")
    return value


def _list(where: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} is a list, {_not(value)}")
    return value


def _parameters(where: str, described: dict[str, Any]) -> dict[str, Any]:
    value = described.get("parameters")
    return {} if value is None else _object(f"'parameters' of {where}", value)


def _name(where: str, described: dict[str, Any]) -> str:
    """As it may be shown; the name itself is a text then."""
    value = described.get("name")
    if not isinstance(value, str):
        raise InvalidRequest(f"the name of {where} is a text, {_not(value)}")
    return _shown(value)


def _boolean(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{where} is true or false, {_not(value)}")
    return value


def _no_more(where: str, parameters: dict[str, Any], known: str) -> None:
    """What is not known could change the answer, so it is not passed over; but for a hint that
    other servers' clients add to every tensor."""
    if unknown := sorted(set(parameters) - {"content_type"}):
        raise InvalidRequest(f"{where}: unknown parameter {_shown(unknown[0])}; there is {known}")


def _all_different(where: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise InvalidRequest(f"{where}: one name stands there twice")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _not(value: Any) -> str:
    return "and is missing" if value is None else f"not {_shown(value)}"


def _shown(value: Any) -> str:
    """A client's value in a few characters, whatever it is."""
    return reprlib.repr(value)


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
