"""The API's parameters and documents, as OpenAPI shows them."""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from app.api.validation import ParametersModel
from app.inference.outputs import FileFormat, Options, Output

ALL_PAGES = "all"
_MAX_NUMBER = 10**9


class Problem(BaseModel):
    """The body of every error, `application/problem+json` (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="what was wrong, and what would be right")
    request_id: str
    error: str | None = Field(None, description="/v2 only: `detail` again, where clients expect it")


def _parse_page(value: Any) -> Any:
    if value in (None, ALL_PAGES):
        return value
    if not re.fullmatch(r"[0-9]{1,9}", str(value), re.ASCII):
        raise PydanticCustomError("page", "must be the number of a page, from 0, or 'all'")
    return int(value)


def _parse_percentiles(value: Any) -> Any:
    """Two numbers with a comma between them."""
    if value is None:
        return None
    try:
        low, high = map(float, str(value).split(","))
    except ValueError:
        low = high = -1.0
    if not 0 <= low < high <= 100:
        raise PydanticCustomError(
            "percentiles", "must be LOW,HIGH with 0 <= LOW < HIGH <= 100, for example 1,99.8"
        )
    return low, high


def _parse_color(value: Any) -> Any:
    if value is None:
        return None
    match = re.fullmatch(r"#?([0-9a-f]{6})", str(value), re.IGNORECASE | re.ASCII)
    if not match:
        raise PydanticCustomError("color", "must be RRGGBB in hexadecimal, for example ffffff")
    return tuple(bytes.fromhex(match[1]))


Page = Annotated[
    int | Literal["all"] | None,
    BeforeValidator(_parse_page),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"const": ALL_PAGES}]}),
]
Percentiles = Annotated[
    tuple[float, float] | None,
    BeforeValidator(_parse_percentiles),
    WithJsonSchema({"type": "string", "examples": ["1,99.8"]}),
]
Color = Annotated[
    tuple[int, int, int] | None,
    BeforeValidator(_parse_color),
    WithJsonSchema({"type": "string", "pattern": "^#?[0-9A-Fa-f]{6}$"}),
]


class SegmentQuery(ParametersModel):
    """The query of POST /segment."""

    model: str | None = Field(None, description="default: the service's default model")
    threshold: float | None = Field(
        None, ge=0, le=1, description="of the mask; default: the model's own"
    )
    output: tuple[Output, ...] = Field(
        (Output.MASK,),  # pydantic would copy a list for each request
        min_length=1,
        max_length=len(Output),
        fail_fast=True,
        description="what is returned; repeat it for several outputs",
    )
    page: Page = Field(
        None, description="of a file with several: a number from 0, or all; default: the only one"
    )
    channel: int | None = Field(
        None,
        ge=0,
        le=_MAX_NUMBER,
        description="of an image of other than 1, 3 or 4 channels: a number from 0",
    )
    format: FileFormat = Field(
        FileFormat.PNG,
        description="of outputs that are pictures; webp: of cutout, overlay and preview only",
    )
    min_area: int = Field(
        0, ge=0, le=_MAX_NUMBER, description="smaller objects are removed, in pixels"
    )
    exclude_edges: bool = Field(False, description="remove objects that touch the image's edge")
    percentiles: Percentiles = Field(
        None,
        description="LOW,HIGH: values of the image that become black and white; default: the "
        "model's own",
    )
    pixel_size: float | None = Field(
        None, gt=0, le=1e6, description="in micrometres; default: what the file says"
    )
    background: Color = Field(None, description="RRGGBB behind a cutout; default: transparent")

    @field_validator("output")
    @classmethod
    def _check_distinct(cls, value: tuple[Output, ...]) -> tuple[Output, ...]:
        for output in value:
            if value.count(output) > 1:
                raise PydanticCustomError(
                    "repeated_output", "{output} is given twice; send it once", {"output": output}
                )
        return value

    @functools.cached_property
    def options(self) -> Options:
        """Options for each image, without the choice of all pages."""
        page = self.page if isinstance(self.page, int) else None
        fields = {name: getattr(self, name) for name in _OPTION_FIELDS}
        return Options(outputs=self.output, page=page, **fields)


_OPTION_FIELDS = (
    *("threshold", "channel", "format", "min_area", "exclude_edges", "percentiles"),
    *("pixel_size", "background"),
)
"""Parameters of a query that `Options` has under the same name."""


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
