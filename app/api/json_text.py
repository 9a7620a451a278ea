"""JSON bodies of responses. Knows no HTTP and no images."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from model.arrays import AnyArray

_BLOCK = 8192
"""Values of an array that are formatted in one go."""


@dataclasses.dataclass(frozen=True)
class EncodedValue:
    """A value that is JSON already. It is neither parsed nor encoded again."""

    content: bytes


def encode_json(document: Any) -> bytes:
    """Encode a document as compact JSON. NumPy arrays in it, uint8 or float32, become flat lists.

    Arrays are formatted block by block, and other threads run in between. Millions of values in one
    call of `json.dumps` would delay the probes.
    """
    values: list[AnyArray | EncodedValue] = []
    placeholder = uuid.uuid4().hex  # a client cannot guess it

    def set_aside(value: object) -> str:
        if not isinstance(value, np.ndarray | EncodedValue):
            raise TypeError(f"{type(value).__name__} cannot be encoded as JSON")
        values.append(value)
        return placeholder

    text = json.dumps(document, separators=(",", ":"), default=set_aside)
    first, *others = text.split(f'"{placeholder}"')
    parts = [first.encode()]
    for value, other in zip(values, others, strict=True):
        if isinstance(value, EncodedValue):
            parts.append(value.content)
        else:
            parts += [b"[", ",".join(_format_blocks(value)).encode(), b"]"]
        parts.append(other.encode())
    return b"".join(parts)


def _format_blocks(array: AnyArray) -> Iterator[str]:
    """Nine digits restore every float32 (IEEE 754, section 5.12.2)."""
    format_value = str if array.dtype == np.uint8 else "{:.9g}".format
    flat = array.ravel()
    for start in range(0, flat.size, _BLOCK):
        yield ",".join(map(format_value, flat[start : start + _BLOCK].tolist()))
