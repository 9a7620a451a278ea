"""JSON bodies of responses. Knows no HTTP and no images."""

from __future__ import annotations

import io
import json
from typing import Any


def encode_json(document: Any) -> bytes:
    """Encode a document as compact JSON.

    `json.dump` writes value by value in Python, although `json.dumps` in C is faster. It lets other
    threads run in between, so that a document of millions of values does not delay the probes.
    """
    buffer = io.BytesIO()
    text = io.TextIOWrapper(buffer, "ascii")  # the default of json: other characters are escaped
    json.dump(document, text, separators=(",", ":"))
    text.flush()
    return buffer.getvalue()
