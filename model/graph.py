"""Read ONNX graphs of other programs, and check what they ask a runtime to do.

A runtime trusts a graph: it opens the files that tensors name, allocates the memory that shapes
declare, and runs loops as long as they say. So a graph is accepted only if it has none of that, and
its parser is called only once the number of its fields is known.

Source of the format: https://github.com/onnx/onnx/blob/main/docs/IR.md. Knows no runtime.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, TensorProto, checker, defs, numpy_helper

from model.config import GraphConfig
from model.errors import CheckpointError, first_line
from model.files import read_file

MAX_GRAPH_BYTES = 2_000_000_000
"""Size of a graph with its weights. Protocol buffers end at 2 GiB."""
MAX_NODES = 20_000
MAX_TENSOR_VALUES = 1 << 30
"""Values of a tensor whose shape the graph itself determines, for an input of any size."""
_MAX_FIELDS = 4_000_000
"""Fields of a graph's messages: a field of 2 bytes can take 100 bytes once it is parsed."""
_OPSETS = range(9, defs.onnx_opset_version() + 1)

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
           "RandomUniformLike")  # fmt: skip
_VARINTS = {
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_ENUM,
}
_FIXED_BYTES = {1: 8, 5: 4}
"""Wire type -> bytes of its values."""


def read_graph_file(path: Path) -> bytes:
    """Read an ONNX file, with its weights if they are in another file of the same folder.

    Returns:
        The graph with all weights inside, checked by `check_graph`.

    Raises:
        CheckpointError: the file cannot be read, or the graph is not accepted.
    """
    try:
        content = read_file(path, MAX_GRAPH_BYTES)
        model = parse_graph(content)
        if any(_is_external(tensor) for tensor in _tensors(model)):
            _embed_weights(model, path.parent)
            content = model.SerializeToString()
        check_graph(content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return content


def check_graph(content: bytes, config: GraphConfig | None = None) -> ModelProto:
    """Check that a graph is complete, and asks for nothing but bounded arithmetic.

    Args:
        content: the ONNX file.
        config: names of the input and the outputs that are used; None checks the graph alone.

    Returns:
        The parsed graph.

    Raises:
        CheckpointError: it is not accepted; one line says why.
    """
    model = parse_graph(content)
    _check_operators(model)
    for tensor in _tensors(model):
        _check_tensor(tensor)
    try:
        checker.check_model(content)
        inferred = onnx.shape_inference.infer_shapes(content, data_prop=True)
    except (checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError,
            ValueError) as error:  # fmt: skip
        raise CheckpointError(f"the graph is invalid: {first_line(error)}") from error
    _check_sizes(inferred)
    if config is not None:
        _check_names(model, config)
    return model


def parse_graph(content: bytes) -> ModelProto:
    """Parse an ONNX file.

    Raises:
        CheckpointError: it is not one, or has too many fields.
    """
    if len(content) > MAX_GRAPH_BYTES:
        raise CheckpointError(f"the graph has more than {MAX_GRAPH_BYTES:,} bytes")
    try:
        _count_fields(memoryview(content))
        model: ModelProto = ModelProto.FromString(content)
    except (DecodeError, IndexError, RecursionError, ValueError) as error:
        raise CheckpointError("the file is not an ONNX graph, or is damaged") from error
    if not model.graph.node:
        raise CheckpointError("the file is not an ONNX graph: it has no nodes")
    return model


def find_input(model: ModelProto) -> onnx.ValueInfoProto:
    """Return the only input that is not a weight.

    Raises:
        CheckpointError: there are several, or none.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs: list[onnx.ValueInfoProto] = [
        each for each in model.graph.input if each.name not in weights
    ]
    if len(inputs) != 1:
        names = ", ".join(repr(each.name) for each in inputs[:5]) or "none"
        raise CheckpointError(f"the graph must have one input, the image; it has {names}")
    return inputs[0]


def _count_fields(content: memoryview) -> None:
    """Check the number of fields, before a parser allocates memory for them.

    Values of packed integers count as fields: each can be a byte that takes 8 in memory.
    Source of the encoding: https://protobuf.dev/programming-guides/encoding/.

    Raises:
        CheckpointError: there are more than `_MAX_FIELDS`.
        IndexError, ValueError: it is not a protocol buffer.
    """
    count = 0
    pending: list[tuple[int, int, Any]] = [(0, len(content), ModelProto.DESCRIPTOR)]
    while pending:
        position, stop, message = pending.pop()
        while position < stop:
            tag, position = _read_varint(content, position)
            field = message.fields_by_number.get(tag >> 3)
            wire_type = tag & 7
            if wire_type == 0:
                _, position = _read_varint(content, position)
            elif wire_type == 2:
                length, position = _read_varint(content, position)
                if field is not None and field.message_type is not None:
                    pending.append((position, position + length, field.message_type))
                elif field is not None and field.type in _VARINTS:
                    count += length
                position += length
            elif wire_type in _FIXED_BYTES:
                position += _FIXED_BYTES[wire_type]
            else:
                raise ValueError(f"wire type {wire_type}")
            count += 1
            if count > _MAX_FIELDS:
                raise CheckpointError(f"the graph has more than {_MAX_FIELDS:,} fields")
        if position > stop:
            raise ValueError("a field ends after its message")


def _read_varint(content: memoryview, position: int) -> tuple[int, int]:
    """Read an integer of up to 10 bytes, 7 bits each; return it and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("an integer has more than 10 bytes")


def _check_operators(model: ModelProto) -> None:
    """Check the operators and their version.

    Raises:
        CheckpointError: one is not of the standard, repeats or branches, or draws random numbers.
    """
    if model.functions:
        raise CheckpointError(
            "the graph contains functions; inline them with onnx.inliner.inline_local_functions"
        )
    if model.training_info:
        raise CheckpointError("the graph contains a training procedure; export it for inference")
    opsets = {each.domain or "ai.onnx": each.version for each in model.opset_import}
    opset = opsets.get("ai.onnx", 0)
    if opset not in _OPSETS:
        raise CheckpointError(
            f"the graph has opset {opset}; supported: {_OPSETS.start} to {_OPSETS.stop - 1}"
        )
    if len(model.graph.node) > MAX_NODES:
        raise CheckpointError(
            f"the graph has {len(model.graph.node):,} nodes; at most {MAX_NODES:,} are allowed"
        )
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise CheckpointError(
                f"operator {_quote(node.op_type)} is of the domain {_quote(node.domain)}; only "
                "operators of the ONNX standard are allowed"
            )
        if any(each.HasField("g") or each.graphs for each in node.attribute):
            raise CheckpointError(
                f"operator {_quote(node.op_type)} contains a graph; loops and branches are not "
                "allowed (export with torch.onnx.export(..., dynamo=True))"
            )
        if node.op_type in _RANDOM:
            raise CheckpointError(f"operator {node.op_type} draws random numbers")


def _check_tensor(tensor: TensorProto) -> None:
    """Check that a tensor has its values with it, as many as its shape says.

    Raises:
        CheckpointError: it does not.
    """
    name = _quote(tensor.name)
    if _is_external(tensor):
        raise CheckpointError(f"tensor {name} is in another file")
    if any(length < 0 for length in tensor.dims):
        raise CheckpointError(f"tensor {name} has a negative length")
    if tensor.data_type == TensorProto.STRING:
        raise CheckpointError(f"tensor {name} contains text")
    try:
        numpy_helper.to_array(tensor)
    except (TypeError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"tensor {name} does not have the values that its shape and type need"
        ) from error


def _check_sizes(model: ModelProto) -> None:
    """Check the tensors whose shapes do not depend on the input.

    Raises:
        CheckpointError: one is too large.
    """
    for value in (*model.graph.value_info, *model.graph.output):
        lengths = [each.dim_value for each in value.type.tensor_type.shape.dim]
        if math.prod(lengths) > MAX_TENSOR_VALUES:
            raise CheckpointError(
                f"tensor {_quote(value.name)} would have {math.prod(lengths):,} values; at most "
                f"{MAX_TENSOR_VALUES:,} are allowed"
            )


def _check_names(model: ModelProto, config: GraphConfig) -> None:
    """Check that the graph has the input and the outputs of its description.

    Raises:
        CheckpointError: it does not.
    """
    if find_input(model).name != config.input:
        raise CheckpointError(f"the graph has no input {_quote(config.input)}")
    missing = set(config.outputs) - {each.name for each in model.graph.output}
    if missing:
        raise CheckpointError(f"the graph has no output {_quote(min(missing))}")


def _embed_weights(model: ModelProto, folder: Path) -> None:
    """Move weights from files beside the graph into it.

    Raises:
        CheckpointError: a name leads to another folder, or to a file that is not regular, or the
            weights are too large.
        OSError: a file cannot be read.
    """
    total = 0
    for tensor in _tensors(model):
        if not _is_external(tensor):
            continue
        facts = {each.key: each.value for each in tensor.external_data}
        name = facts.get("location", "")
        if name != Path(name).name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(
                f"tensor {_quote(tensor.name)} is in the file {_quote(name)}; weights must be in "
                "the folder of the graph"
            )
        path = folder / name
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckpointError(f"{_quote(name)} with weights is not a regular file")
        offset = _read_count(facts.get("offset", "0"))
        length = _read_count(facts.get("length", str(max(0, path.stat().st_size - offset))))
        total += length
        if total > MAX_GRAPH_BYTES:
            raise CheckpointError(f"the graph's weights have more than {MAX_GRAPH_BYTES:,} bytes")
        with path.open("rb") as file:
            file.seek(offset)
            values = file.read(length)
        if len(values) < length:
            raise CheckpointError(f"{_quote(name)} is too short for tensor {_quote(tensor.name)}")
        tensor.raw_data = values
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT


def _read_count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise CheckpointError(f"{_quote(text)} is not an offset or a length of weights")
    return int(text)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a graph without subgraphs: its weights, and constants of its nodes.

    Raises:
        CheckpointError: the graph has sparse tensors.
    """
    yield from model.graph.initializer
    attributes = [each for node in model.graph.node for each in node.attribute]
    sparse = any(each.HasField("sparse_tensor") or each.sparse_tensors for each in attributes)
    if sparse or model.graph.sparse_initializer:
        raise CheckpointError("the graph has sparse tensors")
    for attribute in attributes:
        if attribute.type == AttributeProto.TENSOR or attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL or bool(tensor.external_data)


def _quote(text: str) -> str:
    return repr(text[:100])
