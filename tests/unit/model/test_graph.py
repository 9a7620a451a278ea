"""ONNX graphs of other programs: hostile ones are rejected with one line before anything runs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from model import graph
from model.config import GraphConfig
from model.errors import CheckpointError
from model.graph import check_graph, parse_graph, read_graph_file

KERNEL = np.full((1, 3, 3, 3), 0.1, np.float32)


def make_graph(*nodes: NodeProto, opset: int = 17) -> ModelProto:
    """A convolution of an RGB image to one channel; `nodes` come after it, and make "y"."""
    if not nodes:
        nodes = (helper.make_node("Identity", ["c"], ["y"]),)
    free = ["n", 3, "h", "w"]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]), *nodes],
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, free)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, "h", "w"])],
            [numpy_helper.from_array(KERNEL, "k")],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )


def test_plain_graph_is_accepted() -> None:
    content = make_graph().SerializeToString()
    assert len(check_graph(content, GraphConfig(input="x", outputs=("y",))).graph.node) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GraphConfig(input="z", outputs=("y",)), "no input 'z'"),
        (GraphConfig(input="x", outputs=("y", "z")), "no output 'z'"),
    ],
)
def test_names_of_the_description_must_be_in_the_graph(config: GraphConfig, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_graph(make_graph().SerializeToString(), config)


def reject(model: ModelProto | bytes, message: str) -> None:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(CheckpointError, match=message) as caught:
        check_graph(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def loop(body_opset: int = 17) -> ModelProto:
    """A loop without an end: its condition is always true."""
    body = helper.make_graph(
        [helper.make_node("Identity", [a], [b]) for a, b in (("go", "go_on"), ("s", "s2"))],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s2", TensorProto.FLOAT, None),
        ],
    )
    model = make_graph(helper.make_node("Loop", ["", "true", "c"], ["y"], body=body))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    return model


def recursive_function() -> ModelProto:
    """A function that calls itself."""
    model = make_graph(helper.make_node("F", ["c"], ["y"], domain="local"))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    call = helper.make_node("F", ["a"], ["b"], domain="local")
    model.functions.append(helper.make_function("local", "F", ["a"], ["b"], [call], opsets))
    model.opset_import.append(opsets[1])
    return model


def with_tensor(change: Callable[[TensorProto], object]) -> ModelProto:
    model = make_graph()
    change(model.graph.initializer[0])
    return model


def external(location: str) -> Callable[[TensorProto], object]:
    def change(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def constant_of(shape: list[int]) -> ModelProto:
    model = make_graph(
        helper.make_node("ConstantOfShape", ["size"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
        helper.make_node("Add", ["c", "sum"], ["y"]),
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(shape), "size"))
    return model


HOSTILE: dict[str, tuple[Callable[[], ModelProto | bytes], str]] = {
    "empty": (lambda: b"", "has no nodes"),
    "another file": (lambda: b"PK\x03\x04 something else", "is not an ONNX graph"),
    "cut off": (lambda: make_graph().SerializeToString()[:-40], "is damaged"),
    "only a version": (lambda: b"\x08\x08", "has no nodes"),
    "a length past the end": (lambda: b"\x3a\xff\xff\xff\xff\x07", "is damaged"),
    "an endless integer": (lambda: b"\x08" + b"\xff" * 20, "is damaged"),
    "a group": (lambda: b"\x0b\x0c", "is damaged"),
    "deep nesting": (lambda: nest(200), "is not an ONNX graph, or is damaged"),
    "loop": (loop, "operator 'Loop' contains a graph"),
    "recursive function": (recursive_function, "contains functions"),
    "another domain": (
        lambda: make_graph(helper.make_node("Run", ["c"], ["y"], domain="com.example")),
        "operator 'Run' is of the domain 'com.example'",
    ),
    "a long name": (
        lambda: make_graph(helper.make_node("Run" * 10**5, ["c"], ["y"], domain="com.example")),
        "is of the domain",
    ),
    "unknown operator": (
        lambda: make_graph(helper.make_node("Run", ["c"], ["y"])), "is invalid: .*Run",
    ),
    "missing input": (lambda: make_graph(helper.make_node("Relu", ["no"], ["y"])), "is invalid"),
    "random numbers": (
        lambda: make_graph(helper.make_node("RandomNormalLike", ["c"], ["y"])),
        "RandomNormalLike draws random numbers",
    ),
    "old operators": (lambda: make_graph(opset=6), "has opset 6; supported: 9 to"),
    "future operators": (lambda: make_graph(opset=999), "has opset 999; supported: 9 to"),
    "weights outside": (lambda: with_tensor(external("/etc/passwd")), "'k' is in another file"),
    "too few values": (
        lambda: with_tensor(lambda tensor: tensor.dims.__setitem__(0, 10**12)),
        "'k' does not have the values",
    ),
    "negative length": (
        lambda: with_tensor(lambda tensor: tensor.dims.__setitem__(0, -1)), "negative length",
    ),
    "text": (
        lambda: with_tensor(lambda tensor: tensor.CopyFrom(
            helper.make_tensor("k", TensorProto.STRING, [1], [b"a"]))),
        "'k' contains text",
    ),
    "unknown type": (
        lambda: with_tensor(lambda tensor: setattr(tensor, "data_type", 99)), "does not have",
    ),
    "a huge constant": (lambda: constant_of([10**6, 10**6]), "would have 1,000,000,000,000 values"),
    "too many nodes": (
        lambda: make_graph(*(helper.make_node("Relu", ["c"], [f"r{i}"]) for i in range(20_000))),
        "20,001 nodes; at most 20,000",
    ),
}  # fmt: skip


def nest(depth: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on."""
    content = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, Graph.node
            content = tag + encode_varint(len(content)) + content
    return b"\x3a" + encode_varint(len(content)) + content


def encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graph_is_rejected_in_one_line(name: str) -> None:
    make, message = HOSTILE[name]
    reject(make(), message)


def test_too_many_bytes_are_rejected_before_they_are_parsed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = make_graph().SerializeToString()
    monkeypatch.setattr(graph, "MAX_GRAPH_BYTES", len(content) - 1)
    reject(content, "has more than")
    (tmp_path / "large.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"large\.onnx cannot be read: it has more than"):
        read_graph_file(tmp_path / "large.onnx")


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a\x80\x80\x01" + b"\x0a\x00" * 8192,  # empty nodes: 100 bytes each once parsed
        # a tensor of the graph with packed integers of one byte each
        b"\x3a\x8a\x80\x01\x2a\x86\x80\x01\x3a\x82\x80\x01" + b"\x01" * 16386,
    ],
)
def test_too_many_fields_are_rejected_before_they_are_parsed(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_MAX_FIELDS", 8000)
    with pytest.raises(CheckpointError, match="more than 8,000 fields"):
        parse_graph(content)


def test_fields_of_a_valid_graph_are_counted_to_its_end() -> None:
    model = make_graph()
    assert parse_graph(model.SerializeToString()) == model


@pytest.fixture
def separate(tmp_path: Path) -> Path:
    """A graph with its weights in another file, as torch.onnx.export writes it."""
    path = tmp_path / "model.onnx"
    onnx.save(
        make_graph(),
        path,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    return path


def test_weights_beside_the_graph_are_moved_into_it(separate: Path) -> None:
    model = check_graph(read_graph_file(separate))
    assert (numpy_helper.to_array(model.graph.initializer[0]) == KERNEL).all()


@pytest.mark.parametrize(
    "location", ["../model.onnx.data", "/etc/passwd", "a/b", "..", "", "a\\..\\b"]
)
def test_weights_in_another_folder_are_rejected(location: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    (tmp_path / "model.onnx.data").write_bytes(KERNEL.tobytes())
    path.write_bytes(with_tensor(external(location)).SerializeToString())
    with pytest.raises(CheckpointError, match=r"must be in the folder of the graph|cannot be read"):
        read_graph_file(path)


def test_weights_behind_a_link_or_a_pipe_are_rejected(separate: Path, tmp_path: Path) -> None:
    data = tmp_path / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_graph_file(separate)
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_graph_file(separate)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", "4096", "too short"),
        ("length", "999999", "too short"),
        ("length", "99999999999999", "more than 2,000,000,000 bytes"),
        ("offset", "-1", "'-1' is not an offset"),
        ("length", "1e3", "'1e3' is not an offset"),
        ("length", "4", "does not have the values"),
    ],
)
def test_places_of_weights_are_checked(key: str, value: str, message: str, separate: Path) -> None:
    model = onnx.load(separate, load_external_data=False)
    facts = {each.key: each.value for each in model.graph.initializer[0].external_data}
    facts[key] = value
    del model.graph.initializer[0].external_data[:]
    for name, text in facts.items():
        model.graph.initializer[0].external_data.add(key=name, value=text)
    separate.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=message):
        read_graph_file(separate)


def test_missing_weights_are_reported(separate: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").unlink()
    expected = re.escape(f"{separate} cannot be read: No such file")
    with pytest.raises(CheckpointError, match=expected):
        read_graph_file(separate)


def test_bytes_changed_at_random_never_raise_anything_else() -> None:
    content = bytearray(make_graph().SerializeToString())
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        for place in rng.integers(0, len(changed), 3):
            changed[place] = rng.integers(0, 256)
        try:
            check_graph(bytes(changed))
        except CheckpointError as error:
            assert "\n" not in str(error)
