"""JSON bodies with arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest

from app.api.json_text import encode_json


def test_document_without_arrays_is_compact_json() -> None:
    document = {"a": [1, 2.5, None, "é\n"], "b": {"c": True}}
    text = encode_json(document)
    assert json.loads(text) == document
    assert b" " not in text


def test_arrays_become_flat_lists() -> None:
    arrays = {
        "bytes": np.arange(200_000, dtype=np.int64).astype(np.uint8).reshape(2, 100, 1000),
        "floats": np.random.default_rng(0).random((3, 7), np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    read = json.loads(
        encode_json({"outputs": [{"name": key, "data": arrays[key]} for key in arrays]})
    )
    for output in read["outputs"]:
        expected = arrays[output["name"]]
        assert np.array_equal(np.array(output["data"], expected.dtype), expected.ravel())


def test_other_objects_are_an_error() -> None:
    with pytest.raises(TypeError, match="object cannot be encoded"):
        encode_json({"a": object()})
