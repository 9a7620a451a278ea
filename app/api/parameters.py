"""Parameters of requests that compute: read from the query and a header, and described for OpenAPI.

FastAPI can do both, by dependencies. Solving those took a sixth of the event loop's time for a
small image, so these routes take the request alone.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, TypeVar, cast

from fastapi import Request
from pydantic import Field, TypeAdapter, ValidationError
from starlette.datastructures import QueryParams

from app.api.validation import ParametersModel, describe_validation_error
from app.batching.deadline import Deadline
from app.errors import InvalidRequest
from app.settings import Settings

QueryT = TypeVar("QueryT", bound=ParametersModel)

_TIMEOUT = "X-Request-Timeout"
_SECONDS = TypeAdapter(Annotated[float, Field(gt=0, allow_inf_nan=False)])
_REPEATABLE = ("output",)
_MAX_REMEMBERED, _MAX_REMEMBERED_BYTES = 256, 256
"""Queries that are parsed once, and most bytes of one."""

TIMEOUT_PARAMETER: dict[str, Any] = {
    "name": _TIMEOUT,
    "in": "header",
    "required": False,
    "schema": _SECONDS.json_schema(),
    "description": "seconds this request may take, up to the service's limit; the service has a "
    "default for requests without it",
}
"""Documentation of the header that `read_deadline` reads."""


def read_query(request: Request, model: type[QueryT]) -> QueryT:
    """Read the query of a request. Most requests of a client have the same one.

    Raises:
        InvalidRequest: names a parameter that is unknown, invalid, or given twice. `output` may be
            repeated, because several outputs can be asked for.
    """
    query: bytes = request.scope["query_string"]
    if len(query) > _MAX_REMEMBERED_BYTES:
        return _parse_query(query, model)
    return cast("QueryT", _parse_remembered_query(query, model))


def _parse_query(query: bytes, model: type[QueryT]) -> QueryT:
    given: dict[str, list[str]] = {}
    for name, value in QueryParams(query).multi_items():
        given.setdefault(name, []).append(value)
    values: dict[str, str | list[str]] = {}
    for name, each in given.items():
        if name in _REPEATABLE:
            values[name] = each
        elif len(each) == 1:
            values[name] = each[0]
        else:
            raise InvalidRequest(f"{name[:100]} is given {len(each)} times; send it once")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, "query") from None


_parse_remembered_query = functools.lru_cache(_MAX_REMEMBERED)(_parse_query)


def read_deadline(request: Request, settings: Settings) -> Deadline:
    """When the response is due: X-Request-Timeout, up to the service's limit, from now.

    Raises:
        InvalidRequest: the header is not a positive number.
    """
    given = request.headers.get(_TIMEOUT)
    if given is None:
        return Deadline.after(settings.default_timeout_s)
    try:
        seconds = _SECONDS.validate_python(given)
    except ValidationError as error:
        raise _invalid(error, "header", _TIMEOUT) from None
    return Deadline.after(min(seconds, settings.longest_timeout_s))


def describe_parameters(model: type[ParametersModel]) -> list[dict[str, Any]]:
    """The parameters of a request for OpenAPI: those of its query, and X-Request-Timeout."""
    document = model.model_json_schema()
    described = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": _inline(schema, document.get("$defs", {})),
            "description": schema["description"],
        }
        for name, schema in document["properties"].items()
    ]
    return [*described, TIMEOUT_PARAMETER]


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema with definitions in place of the references to them."""
    if isinstance(schema, list):
        return [_inline(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inlined = {key: _inline(value, definitions) for key, value in schema.items() if key != "$ref"}
    if "$ref" in schema:
        inlined = definitions[schema["$ref"].rpartition("/")[2]] | inlined
    return inlined


def _invalid(error: ValidationError, *place: str) -> InvalidRequest:
    """The first error, with the place of the parameter."""
    details = error.errors(include_url=False)[0]
    return InvalidRequest(describe_validation_error({**details, "loc": (*place, *details["loc"])}))
