"""The API's parameters and documents, as OpenAPI shows them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

from app.api.validation import ParametersModel
from app.inference.outputs import Output


class Problem(BaseModel):
    """The body of every error, `application/problem+json` (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="what was wrong, and what would be right")
    request_id: str
    error: str | None = Field(None, description="/v2 only: `detail` again, where clients expect it")


class SegmentQuery(ParametersModel):
    """The query of POST /segment."""

    model: str | None = Field(None, description="default: the service's default model")
    threshold: float | None = Field(
        None, ge=0, le=1, description="of the mask; default: the model's own"
    )
    output: Output = Field(Output.MASK, description="what is returned")


def _describe_problem(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    content = {"application/problem+json": {"schema": schema}}
    return {"description": description, "content": content}


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    401: _describe_problem("The API key is missing or wrong."),
    404: _describe_problem("Unknown model."),
    413: _describe_problem("Too many bytes or pixels."),
    415: _describe_problem("An image format or a Content-Encoding that is not supported."),
    422: _describe_problem("Not an image, a damaged one, no file, or an invalid parameter."),
    429: _describe_problem(
        "The queue is full, or too many wrong keys were sent. Retry-After says when to retry."
    ),
    500: _describe_problem("Internal error."),
    503: _describe_problem("Not ready, draining, or the engine is dead."),
    504: _describe_problem("The deadline passed, or cannot be met."),
    "default": _describe_problem("Any other error."),
}
"""Documentation of the errors, by status."""

UNAVAILABLE_RESPONSE: dict[int | str, dict[str, Any]] = {
    503: {
        "description": "Unhealthy; the body gives the cause.",
        "content": {"application/json": {}},
    }
}
"""Documentation of a probe's failure."""


class Application(FastAPI):
    """FastAPI that adds the schema of `Problem` to its OpenAPI document.

    Responses refer to that schema by name. FastAPI adds a model's schema only for responses in the
    media type of the route itself, and no route returns a problem document on success.
    """

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas["Problem"] = Problem.model_json_schema()
        return document
