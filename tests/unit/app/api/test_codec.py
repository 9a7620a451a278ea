"""The Open Inference Protocol's wire format: what goes in comes out, what is odd does not."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import pytest

from app.api.v2 import codec as tensors
from app.api.v2.codec import Output, Wanted, encode, encoded_size, parse, parsing_takes
from app.errors import InvalidRequest, UploadTooLarge
from tests.conftest import decode_tensors

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (2, 3, 4, 3), np.uint8)


def element(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


def asked(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def uint8(**changes: Any) -> dict[str, Any]:
    """An input in JSON, with members changed; None takes one away."""
    value = {
        "name": "image",
        "datatype": "UINT8",
        "shape": list(IMAGE.shape),
        "data": IMAGE.ravel().tolist(),
        **changes,
    }
    return {key: each for key, each in value.items() if each is not None}


def binary(size: Any, **changes: Any) -> dict[str, Any]:
    return uint8(data=None, parameters={"binary_data_size": size}, **changes)


def joined(text: bytes, data: bytes) -> tuple[bytes, int]:
    return text + data, len(text)


@pytest.mark.parametrize("values", [IMAGE.ravel().tolist(), IMAGE.tolist()], ids=["flat", "nested"])
def test_pixels_in_json(values: list[Any]) -> None:
    request = parse(asked(uint8(data=values), id="7", parameters={"threshold": 0.25}))
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("image", "UINT8", IMAGE.shape)
    assert isinstance(tensor.values, np.ndarray)
    assert np.array_equal(tensor.values, IMAGE)
    assert (request.id, request.parameters) == ("7", {"threshold": 0.25})
    assert (list(request.outputs), request.binary_output) == ([], False)


def test_pixels_in_binary() -> None:
    request = parse(*joined(asked(binary(IMAGE.size)), IMAGE.tobytes()))
    assert np.array_equal(request.inputs[0].values, IMAGE)


def test_bytes_in_json_and_in_binary() -> None:
    elements = [b"", b"\x89PNG", bytes(range(256))]
    sent = {"datatype": "BYTES", "shape": [3]}
    texts = [base64.b64encode(each).decode() for each in elements]
    assert parse(asked(uint8(data=texts, **sent))).inputs[0].values == elements
    data = b"".join(map(element, elements))
    request = parse(*joined(asked(binary(len(data), **sent)), data))
    assert request.inputs[0].values == elements


def test_several_binary_inputs_stand_in_their_order() -> None:
    inputs = [binary(6, name=name, shape=[1, 1, 2, 3]) for name in "ab"]
    request = parse(*joined(asked(*inputs), bytes(range(12))))
    assert [each.values.ravel().tolist() for each in request.inputs] == [  # type: ignore[union-attr]
        list(range(6)),
        list(range(6, 12)),
    ]


def test_each_output_may_say_how_it_comes() -> None:
    outputs = [
        {"name": "a"},
        {"name": "b", "parameters": {"binary_data": False}},
        {"name": "c", "parameters": {"binary_data": True}},
    ]
    for default in (True, False):
        request = parse(asked(uint8(), outputs=outputs, parameters={"binary_data_output": default}))
        assert request.outputs == [Wanted("a", default), Wanted("b", False), Wanted("c", True)]
        assert request.parameters == {}


def test_members_that_are_null_or_unknown_are_none() -> None:
    """Some clients send every member they know, others those of their own servers."""
    request = parse(
        asked(
            uint8(parameters={"content_type": "np"}),
            id=None,
            parameters=None,
            outputs=None,
            model_name="x",
        )
    )
    assert (request.id, request.parameters, request.outputs) == (None, {}, [])


ODD: dict[str, bytes | tuple[bytes, int | None]] = {
    "empty": b"",
    "no json": b"image",
    "no utf-8": b'{"inputs": "\xff"}',
    "utf-16": '{"inputs": []}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "no object": b"[]",
    "nan": b'{"inputs": [], "parameters": {"threshold": NaN}}',
    "infinity": b'{"inputs": [], "parameters": {"threshold": 1e999}}',
    "endless number": b'{"inputs": [' + b"9" * 10_000 + b"]}",
    "member twice": b'{"inputs": [], "inputs": []}',
    "id of a number": asked(uint8(), id=7),
    "long id": asked(uint8(), id="x" * 1001),
    "inputs of an object": b'{"inputs": {}}',
    "input of a list": asked([]),
    "no name": asked(uint8(name=None)),
    "name of a list": asked(uint8(name=["image"])),
    "no datatype": asked(uint8(datatype=None)),
    "datatype of a list": asked(uint8(datatype=["UINT8"])),
    "another datatype": asked(uint8(datatype="FP32")),
    "no shape": asked(uint8(shape=None)),
    "flat shape": asked(uint8(shape=[72])),
    "shape of a number": asked(uint8(shape=72)),
    "negative": asked(uint8(shape=[2, -3, -4, 3])),
    "nothing": asked(uint8(shape=[0, 3, 4, 3], data=[])),
    "true": asked(uint8(shape=[True, 24, 1, 3])),
    "fraction": asked(uint8(shape=[2.0, 3, 4, 3])),
    "huge": asked(uint8(shape=[1000, 2**31, 2**31, 2**31])),
    "huger": asked(uint8(shape=[1, 10**4000, 10**4000, 10**4000])),
    "too few": asked(uint8(shape=[2, 3, 4, 4])),
    "ragged": asked(uint8(data=[[[[0] * 3] * 4] * 3, [[[0] * 3] * 4] * 2])),
    "half nested": asked(uint8(data=[[0] * 36] * 2)),
    "list among numbers": asked(uint8(data=[[0], *[0] * 71])),
    "256": asked(uint8(data=[256] * 72)),
    "-1": asked(uint8(data=[-1] * 72)),
    "1.0": asked(uint8(data=[1.0] * 72)),
    "bool": asked(uint8(data=[True] * 72)),
    "texts": asked(uint8(data=["0"] * 72)),
    "data of a text": asked(uint8(data="A" * 72)),
    "neither": asked(uint8(data=None)),
    "both": asked(uint8(parameters={"binary_data_size": 72})),
    "shared memory": asked(uint8(parameters={"shared_memory_region": "x"})),
    "parameters of a list": asked(uint8(parameters=[])),
    "no base64": asked(uint8(datatype="BYTES", shape=[1], data=["*"])),
    "no ascii": asked(uint8(datatype="BYTES", shape=[1], data=["é"])),
    "surrogate": asked(uint8(datatype="BYTES", shape=[1], data=["\ud800"])),
    "bytes of numbers": asked(uint8(datatype="BYTES", shape=[1], data=[1])),
    "input twice": asked(uint8(), uint8()),
    "output twice": asked(uint8(), outputs=[{"name": "mask"}] * 2),
    "output of a text": asked(uint8(), outputs=["mask"]),
    "output without a name": asked(uint8(), outputs=[{}]),
    "classification": asked(uint8(), outputs=[{"name": "a", "parameters": {"classification": 3}}]),
    "binary_data of a text": asked(
        uint8(), outputs=[{"name": "a", "parameters": {"binary_data": "yes"}}]
    ),
    "binary_data_output of a number": asked(uint8(), parameters={"binary_data_output": 1}),
    "json longer than the body": (asked(uint8()), 10_000),
    "json cut": (asked(uint8()), 50),
    "json of nothing": (asked(uint8()), 0),
    "binary unannounced": asked(binary(72)) + bytes(72),
    "binary unannounced, alone": asked(binary(72)),
    "binary short": joined(asked(binary(72)), bytes(71)),
    "binary long": joined(asked(binary(72)), bytes(73)),
    "binary of no input": joined(asked(uint8()), bytes(1)),
    "binary of another shape": joined(asked(binary(71)), bytes(71)),
    "binary negative": joined(asked(binary(-1)), b""),
    "binary of a text": joined(asked(binary("72")), bytes(72)),
    "binary of true": joined(asked(binary(True)), bytes(1)),
    "binary huge": joined(asked(binary(10**4000)), bytes(72)),
    "element cut": joined(asked(binary(7, datatype="BYTES", shape=[1])), element(b"abcd")[:7]),
    "length cut": joined(asked(binary(3, datatype="BYTES", shape=[1])), b"\1\0\0"),
    "element too long": joined(asked(binary(5, datatype="BYTES", shape=[1])), b"\xff\xff\xff\xff0"),
    "elements too few": joined(asked(binary(5, datatype="BYTES", shape=[2])), element(b"a")),
    "elements too many": joined(
        asked(binary(10, datatype="BYTES", shape=[1])), element(b"a") + element(b"b")
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_odd_is_the_clients_fault(case: str) -> None:
    odd = ODD[case]
    body, length = odd if isinstance(odd, tuple) else (odd, None)
    with pytest.raises(InvalidRequest) as caught:
        parse(body, length)
    assert 10 < len(str(caught.value)) < 400
    str(caught.value).encode()  # a lone surrogate could not be sent


def test_what_is_too_much_is_known_before_it_is_parsed() -> None:
    body = b'{"inputs": [' + b"[]," * (tensors.MOST_VALUES // 5)
    with pytest.raises(UploadTooLarge, match="binary"):
        parsing_takes(body, None)
    with pytest.raises(UploadTooLarge, match="binary"):
        parse(body)
    assert parsing_takes(*joined(asked(binary(9)), b"," * 10**7)) < 10_000
    many = uint8(datatype="BYTES", shape=[tensors.LARGEST_BATCH + 1], data=[])
    with pytest.raises(UploadTooLarge):
        parse(asked(many))


def test_a_body_with_anything_in_it_changed_is_parsed_or_refused() -> None:
    """Whatever a byte is turned into, or wherever it ends: no other error comes out."""
    chance = random.Random(0)
    whole = [
        joined(asked(binary(72), outputs=[{"name": "mask"}]), IMAGE.tobytes()),
        joined(asked(binary(9, datatype="BYTES", shape=[2])), element(b"a") + element(b"")),
        (asked(uint8(shape=[1, 1, 2, 3], data=[1, 2, 3, 4, 5, 6]), id="a"), None),
    ]
    refused = 0
    for _ in range(3000):
        body, length = chance.choice(whole)
        changed = bytearray(body)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(len(changed))] = chance.choice(b'{}[]",:0-9eNtn\\\xff\x00')
        if length is not None:
            length = max(0, length + chance.choice((0, 0, 0, -1, 1, 50)))
        try:
            parse(bytes(changed[: chance.choice((None, -1, 20))]), length)
        except (InvalidRequest, UploadTooLarge):
            refused += 1
    assert 1000 < refused < 3000


@pytest.mark.parametrize("binary_mask", [True, False])
@pytest.mark.parametrize("binary_probabilities", [True, False])
def test_answers_come_back_exactly(binary_mask: bool, binary_probabilities: bool) -> None:
    masks = [RNG.integers(0, 256, (90, 130), np.uint8) for _ in range(2)]
    scores = [RNG.random((2, 90, 130), np.float32) ** 9 for _ in range(2)]
    scores[0][0, 0, :4] = [0, 1, np.finfo(np.float32).tiny, np.nextafter(np.float32(1), 0)]
    outputs = [Output("m", masks, binary_mask), Output("p", scores, binary_probabilities)]
    body, length = encode({"model_name": "x", "id": "\ud800"}, outputs)
    document, found = decode_tensors(body, length)
    assert (document["model_name"], document["id"]) == ("x", "\ud800")
    assert np.array_equal(found["m"], np.stack(masks))
    assert np.array_equal(found["p"], np.stack(scores))
    assert (length is None) == (not binary_mask and not binary_probabilities)
    most = sum(encoded_size(each.shape, each.datatype, each.binary) for each in outputs)
    assert len(body) <= most + 400


def test_arrays_that_lie_otherwise_in_memory_are_sent_row_by_row() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    for sent_binary in (True, False):
        _, found = decode_tensors(*encode({}, [Output("p", [array], sent_binary)]))
        assert np.array_equal(found["p"][0], array)
