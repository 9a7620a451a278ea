"""The wire format of the Open Inference Protocol: tensors round-trip, malformed requests fail."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from app.api.v2.codec import (
    MAX_BATCH,
    MAX_JSON_BYTES,
    MAX_JSON_VALUES,
    OutputSpec,
    OutputTensor,
    RequestParameters,
    encode,
    estimate_encode_bytes,
    estimate_parse_bytes,
    parse,
)
from app.errors import InvalidRequest, RequestTooLarge
from tests.conftest import ROOT, decode_tensors

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (2, 3, 4, 3), np.uint8)


def element(data: bytes) -> bytes:
    """An element of BYTES in binary data."""
    return len(data).to_bytes(4, "little") + data


def request_json(*inputs: Any, **more: Any) -> bytes:
    """The JSON of a request."""
    return json.dumps({"inputs": list(inputs), **more}).encode()


def uint8(**changes: Any) -> dict[str, Any]:
    """An input in JSON with some members changed; None removes a member."""
    value = {
        "name": "image",
        "datatype": "UINT8",
        "shape": list(IMAGE.shape),
        "data": IMAGE.ravel().tolist(),
        **changes,
    }
    return {key: each for key, each in value.items() if each is not None}


def binary(size: Any, **changes: Any) -> dict[str, Any]:
    """An input whose values follow as binary data."""
    return uint8(data=None, parameters={"binary_data_size": size}, **changes)


def joined(text: bytes, data: bytes) -> tuple[bytes, int]:
    """A body, and the length of its JSON."""
    return text + data, len(text)


@pytest.mark.parametrize("values", [IMAGE.ravel().tolist(), IMAGE.tolist()], ids=["flat", "nested"])
def test_pixels_in_json_may_be_flat_or_nested(values: list[Any]) -> None:
    request = parse(request_json(uint8(data=values), id="7", parameters={"threshold": 0.25}))
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("image", "UINT8", IMAGE.shape)
    assert isinstance(tensor.values, np.ndarray)
    assert np.array_equal(tensor.values, IMAGE)
    assert (request.id, request.parameters.threshold) == ("7", 0.25)
    assert (list(request.outputs), request.parameters.binary_data_output) == ([], False)


def test_pixels_in_binary_data() -> None:
    request = parse(*joined(request_json(binary(IMAGE.size)), IMAGE.tobytes()))
    assert np.array_equal(request.inputs[0].values, IMAGE)


def test_bytes_in_json_and_in_binary_data() -> None:
    elements = [b"", b"\x89PNG", bytes(range(256))]
    sent = {"datatype": "BYTES", "shape": [3]}
    texts = [base64.b64encode(each).decode() for each in elements]
    assert parse(request_json(uint8(data=texts, **sent))).inputs[0].values == elements
    data = b"".join(map(element, elements))
    request = parse(*joined(request_json(binary(len(data), **sent)), data))
    assert request.inputs[0].values == elements


def test_binary_inputs_follow_in_order() -> None:
    inputs = [binary(6, name=name, shape=[1, 1, 2, 3]) for name in "ab"]
    request = parse(*joined(request_json(*inputs), bytes(range(12))))
    assert [each.values.ravel().tolist() for each in request.inputs] == [  # type: ignore[union-attr]
        list(range(6)),
        list(range(6, 12)),
    ]


def test_output_overrides_binary_data_output() -> None:
    outputs = [
        {"name": "a"},
        {"name": "b", "parameters": {"binary_data": False}},
        {"name": "c", "parameters": {"binary_data": True}},
    ]
    for default in (True, False):
        request = parse(
            request_json(uint8(), outputs=outputs, parameters={"binary_data_output": default})
        )
        assert request.outputs == [
            OutputSpec("a", default),
            OutputSpec("b", False),
            OutputSpec("c", True),
        ]
        assert request.parameters == RequestParameters(binary_data_output=default)


def test_null_and_unknown_members_are_ignored() -> None:
    """Some clients send every member they know, others send members of their own servers."""
    request = parse(
        request_json(
            uint8(parameters={"content_type": "np"}),
            id=None,
            parameters=None,
            outputs=None,
            model_name="x",
        )
    )
    assert (request.id, request.parameters, request.outputs) == (None, RequestParameters(), [])
    ignored = {"sequence_id": 1, "sequence_start": True, "sequence_end": True, "priority": "high"}
    assert parse(request_json(uint8(), parameters=ignored)).inputs


MALFORMED: dict[str, bytes | tuple[bytes, int | None]] = {
    "empty": b"",
    "not json": b"image",
    "not utf-8": b'{"inputs": "\xff"}',
    "utf-16": '{"inputs": []}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "not an object": b"[]",
    "nan": b'{"inputs": [], "parameters": {"threshold": NaN}}',
    "infinity": b'{"inputs": [], "parameters": {"threshold": 1e999}}',
    "threshold of 2": request_json(uint8(), parameters={"threshold": 2}),
    "threshold of a text": request_json(uint8(), parameters={"threshold": "1"}),
    "threshold of true": request_json(uint8(), parameters={"threshold": True}),
    "negative timeout": request_json(uint8(), parameters={"timeout": -1}),
    "unknown parameter": request_json(uint8(), parameters={"treshold": 1}),
    "endless number": b'{"inputs": [' + b"9" * 10_000 + b"]}",
    "id of a number": request_json(uint8(), id=7),
    "long id": request_json(uint8(), id="x" * 1001),
    "inputs of an object": b'{"inputs": {}}',
    "input of a list": request_json([]),
    "too many inputs": request_json(*[uint8(name=str(n)) for n in range(101)]),
    "no name": request_json(uint8(name=None)),
    "name of a list": request_json(uint8(name=["image"])),
    "no datatype": request_json(uint8(datatype=None)),
    "datatype of a list": request_json(uint8(datatype=["UINT8"])),
    "another datatype": request_json(uint8(datatype="FP32")),
    "no shape": request_json(uint8(shape=None)),
    "flat shape": request_json(uint8(shape=[72])),
    "shape of a number": request_json(uint8(shape=72)),
    "negative": request_json(uint8(shape=[2, -3, -4, 3])),
    "nothing": request_json(uint8(shape=[0, 3, 4, 3], data=[])),
    "true": request_json(uint8(shape=[True, 24, 1, 3])),
    "fraction": request_json(uint8(shape=[2.0, 3, 4, 3])),
    "huge": request_json(uint8(shape=[1000, 2**31, 2**31, 2**31])),
    "huger": request_json(uint8(shape=[1, 10**4000, 10**4000, 10**4000])),
    "too few": request_json(uint8(shape=[2, 3, 4, 4])),
    "ragged": request_json(uint8(data=[[[[0] * 3] * 4] * 3, [[[0] * 3] * 4] * 2])),
    "half nested": request_json(uint8(data=[[0] * 36] * 2)),
    "list among numbers": request_json(uint8(data=[[0], *[0] * 71])),
    "256": request_json(uint8(data=[256] * 72)),
    "-1": request_json(uint8(data=[-1] * 72)),
    "1.0": request_json(uint8(data=[1.0] * 72)),
    "bool": request_json(uint8(data=[True] * 72)),
    "strings": request_json(uint8(data=["0"] * 72)),
    "data of a text": request_json(uint8(data="A" * 72)),
    "neither": request_json(uint8(data=None)),
    "both": request_json(uint8(parameters={"binary_data_size": 72})),
    "shared memory": request_json(uint8(parameters={"shared_memory_region": "x"})),
    "parameters of a list": request_json(uint8(parameters=[])),
    "not base64": request_json(uint8(datatype="BYTES", shape=[1], data=["*"])),
    "not ascii": request_json(uint8(datatype="BYTES", shape=[1], data=["é"])),
    "surrogate": request_json(uint8(datatype="BYTES", shape=[1], data=["\ud800"])),
    "bytes of numbers": request_json(uint8(datatype="BYTES", shape=[1], data=[1])),
    "input twice": request_json(uint8(), uint8()),
    "output twice": request_json(uint8(), outputs=[{"name": "mask"}] * 2),
    "output of a text": request_json(uint8(), outputs=["mask"]),
    "output without a name": request_json(uint8(), outputs=[{}]),
    "classification": request_json(
        uint8(), outputs=[{"name": "a", "parameters": {"classification": 3}}]
    ),
    "binary_data of a text": request_json(
        uint8(), outputs=[{"name": "a", "parameters": {"binary_data": "yes"}}]
    ),
    "binary_data_output of a number": request_json(uint8(), parameters={"binary_data_output": 1}),
    "json longer than the body": (request_json(uint8()), 10_000),
    "json cut": (request_json(uint8()), 50),
    "json of nothing": (request_json(uint8()), 0),
    "binary unannounced": request_json(binary(72)) + bytes(72),
    "binary unannounced, alone": request_json(binary(72)),
    "binary short": joined(request_json(binary(72)), bytes(71)),
    "binary long": joined(request_json(binary(72)), bytes(73)),
    "binary of no input": joined(request_json(uint8()), bytes(1)),
    "binary of another shape": joined(request_json(binary(71)), bytes(71)),
    "binary negative": joined(request_json(binary(-1)), b""),
    "binary of a text": joined(request_json(binary("72")), bytes(72)),
    "binary of true": joined(request_json(binary(True)), bytes(1)),
    "binary huge": joined(request_json(binary(10**4000)), bytes(72)),
    "element cut": joined(
        request_json(binary(7, datatype="BYTES", shape=[1])), element(b"abcd")[:7]
    ),
    "length cut": joined(request_json(binary(3, datatype="BYTES", shape=[1])), b"\1\0\0"),
    "element too long": joined(
        request_json(binary(5, datatype="BYTES", shape=[1])), b"\xff\xff\xff\xff0"
    ),
    "elements too few": joined(request_json(binary(5, datatype="BYTES", shape=[2])), element(b"a")),
    "elements too many": joined(
        request_json(binary(10, datatype="BYTES", shape=[1])), element(b"a") + element(b"b")
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_request_is_invalid(case: str) -> None:
    malformed = MALFORMED[case]
    body, length = malformed if isinstance(malformed, tuple) else (malformed, None)
    with pytest.raises(InvalidRequest) as caught:
        parse(body, length)
    assert 10 < len(str(caught.value)) < 400
    str(caught.value).encode()  # a lone surrogate could not be sent


def test_unknown_parameter_error_lists_known_ones() -> None:
    body = request_json(uint8(), outputs=[{"name": "a", "parameters": {"clasification": 3}}])
    with pytest.raises(InvalidRequest, match="'clasification'; available: binary_data"):
        parse(body)


def test_value_error_names_its_place() -> None:
    with pytest.raises(InvalidRequest, match=r"data.*\.1: .* 255, not 256"):
        parse(request_json(uint8(data=[0, 256, *[0] * 70])))


def test_json_that_is_too_long_fails_before_parsing() -> None:
    body = b'{"id": "' + b"a" * MAX_JSON_BYTES + b'"}'
    with pytest.raises(RequestTooLarge, match="16 are allowed"):
        estimate_parse_bytes(body, None)
    assert estimate_parse_bytes(body, 8) < 10_000  # the rest is binary data


def test_too_many_values_fail_before_parsing() -> None:
    body = b'{"inputs": [' + b"[]," * (MAX_JSON_VALUES // 5)
    with pytest.raises(RequestTooLarge, match="binary"):
        estimate_parse_bytes(body, None)
    with pytest.raises(RequestTooLarge, match="binary"):
        parse(body)
    assert estimate_parse_bytes(*joined(request_json(binary(9)), b"," * 10**7)) < 10_000
    many = uint8(datatype="BYTES", shape=[MAX_BATCH + 1], data=[])
    with pytest.raises(RequestTooLarge, match="batch"):
        parse(request_json(many))


@pytest.mark.parametrize(
    "values",
    [
        [200] * 480_000,
        [str(number) for number in range(480_000)],
        [[[[1, 2, 3]] * 1000] * 69],
        [{"a": 1}] * 50_000,
    ],
    ids=["numbers", "strings", "nested", "objects"],
)
def test_parsing_stays_within_its_estimate(values: list[Any]) -> None:
    code = """
from app.api.v2.codec import estimate_parse_bytes, parse
from app.errors import InvalidRequest
body = sys.stdin.buffer.read()
estimate = estimate_parse_bytes(body, None)
with measured(estimate), contextlib.suppress(InvalidRequest):
    parse(body)
"""
    body = json.dumps({"inputs": [uint8(shape=[1, 480, 1000, 1], data=values)]}).encode()
    run_measured(code, body)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", ["uint8", "float32"])
def test_encoding_stays_within_its_estimate(datatype: str, binary: bool) -> None:
    code = f"""
import numpy as np
from app.api.v2.codec import OutputTensor, encode, estimate_encode_bytes
noise = np.random.default_rng(0).random((2, 700, 700)) * 255
output = OutputTensor("x", list(noise.astype("{datatype}")), {binary})
del noise
with measured(estimate_encode_bytes(output.shape, output.datatype, {binary})):
    encode({{}}, [output])
"""
    run_measured(code, b"")


def run_measured(code: str, stdin: bytes) -> None:
    """Run code with `measured(limit)`, a context manager that checks the growth of the process: the
    memory of pydantic's parser is not Python's."""
    prelude = """
import contextlib, resource, sys
@contextlib.contextmanager
def measured(limit):
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak starts again from now
    def read(key):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
    before = read("VmRSS")
    yield
    grown = read("VmHWM") - before
    assert 0 < grown < limit + 2**17, (grown, limit)  # pages of other things
"""
    subprocess.run([sys.executable, "-c", prelude + code], input=stdin, cwd=ROOT, check=True)


def test_changed_body_is_parsed_or_invalid() -> None:
    """Whichever bytes change, and wherever the body ends: no other error is raised."""
    chance = random.Random(0)
    whole = [
        joined(request_json(binary(72), outputs=[{"name": "mask"}]), IMAGE.tobytes()),
        joined(request_json(binary(9, datatype="BYTES", shape=[2])), element(b"a") + element(b"")),
        (request_json(uint8(shape=[1, 1, 2, 3], data=[1, 2, 3, 4, 5, 6]), id="a"), None),
    ]
    invalid = 0
    for _ in range(3000):
        body, length = chance.choice(whole)
        changed = bytearray(body)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(len(changed))] = chance.choice(b'{}[]",:0-9eNtn\\\xff\x00')
        if length is not None:
            length = max(0, length + chance.choice((0, 0, 0, -1, 1, 50)))
        try:
            parse(bytes(changed[: chance.choice((None, -1, 20))]), length)
        except (InvalidRequest, RequestTooLarge):
            invalid += 1
    assert 1000 < invalid < 3000


@pytest.mark.parametrize("binary_mask", [True, False])
@pytest.mark.parametrize("binary_probabilities", [True, False])
def test_response_tensors_are_exact(binary_mask: bool, binary_probabilities: bool) -> None:
    masks = [RNG.integers(0, 256, (90, 130), np.uint8) for _ in range(2)]
    scores = [RNG.random((2, 90, 130), np.float32) ** 9 for _ in range(2)]
    scores[0][0, 0, :4] = [0, 1, np.finfo(np.float32).tiny, np.nextafter(np.float32(1), 0)]
    outputs = [
        OutputTensor("m", masks, binary_mask),
        OutputTensor("p", scores, binary_probabilities),
    ]
    body, length = encode({"model_name": "x", "id": "é\n"}, outputs)
    document, found = decode_tensors(body, length)
    assert (document["model_name"], document["id"]) == ("x", "é\n")
    assert np.array_equal(found["m"], np.stack(masks))
    assert np.array_equal(found["p"], np.stack(scores))
    assert (length is None) == (not binary_mask and not binary_probabilities)
    most = sum(estimate_encode_bytes(each.shape, each.datatype, each.binary) for each in outputs)
    assert len(body) <= most + 400


def test_arrays_are_sent_row_by_row_whatever_their_layout() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    for sent_binary in (True, False):
        _, found = decode_tensors(*encode({}, [OutputTensor("p", [array], sent_binary)]))
        assert np.array_equal(found["p"][0], array)
