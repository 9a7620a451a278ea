"""Query parameters and documents of the API, as OpenAPI shows them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from fastapi import Header, Query, Request
from pydantic import BaseModel, Field

from app.errors import InvalidRequest
from app.inference.outputs import Output


class Problem(BaseModel):
    """Every error's body, `application/problem+json` (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="what was wrong, and what would be right")
    request_id: str
    error: str | None = Field(None, description="/v2 only: the detail again, where clients look")


PROBLEM: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
        },
    }
    for status, text in {
        401: "The API key is missing or wrong.",
        404: "Unknown model.",
        413: "Too many bytes or pixels.",
        415: "An image format, or a Content-Encoding, that is not accepted.",
        422: "Not an image, a damaged one, no file, or a parameter that makes no sense.",
        429: "The queue is full; Retry-After says when to come back.",
        500: "Our own fault.",
        503: "Not ready, draining, or the engine is dead.",
        504: "The deadline passed, or cannot be met.",
    }.items()
}


NO: dict[int | str, dict[str, Any]] = {
    503: {"description": "No, and the cause.", "content": {"application/json": {}}}
}
"""The other answer of a probe."""

Timeout = Annotated[
    str | None,
    Header(
        alias="X-Request-Timeout",
        description="seconds this may take, as `2.5`; default and most: the service's",
    ),
]
"""For the documentation; a route reads it by `app.api.dependencies.deadline_of`."""


@dataclasses.dataclass(frozen=True)
class SegmentQuery:
    """The query of POST /segment."""

    model: str | None
    threshold: float | None
    output: Output


async def segment_query(
    request: Request,
    model: Annotated[str | None, Query(description="default: the service's default model")] = None,
    threshold: Annotated[
        float | None, Query(ge=0, le=1, description="default: the model's")
    ] = None,
    output: Annotated[Output, Query(description="what comes back")] = Output.MASK,
    _timeout: Timeout = None,
) -> SegmentQuery:
    """The parsed query; a parameter that does not exist is an error, not a silent nothing."""
    known = {field.name for field in dataclasses.fields(SegmentQuery)}
    if unknown := sorted(set(request.query_params) - known):
        raise InvalidRequest(
            f"unknown parameter {unknown[0]!r}; there are {', '.join(sorted(known))}"
        )
    for name in known:
        if len(given := request.query_params.getlist(name)) > 1:
            raise InvalidRequest(f"{name} is given {len(given)} times; send it once")
    if "_" in request.query_params.get("threshold", ""):  # to Python 0_5 is a number: five
        raise InvalidRequest("threshold is a number from 0 to 1, without underscores")
    return SegmentQuery(model, threshold, output)
