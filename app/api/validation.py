"""Validation of what clients send, with pydantic. Knows no HTTP, no images and no models."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

_MAX_LOCATION = 100


class ParametersModel(BaseModel):
    """Base of models that hold parameters by name. An unknown name is an error that lists the
    known ones: a misspelt parameter that was ignored would change the result silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_params(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        for name in values:
            if name not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown_parameter",
                    "unknown parameter {name}; available: {available}",
                    {"name": shorten(name), "available": ", ".join(cls.model_fields)},
                )
        return values


def describe_validation_error(details: Mapping[str, Any]) -> str:
    """One line from the details of a pydantic error: the place, the fault, and the value."""
    location = ".".join(str(part) for part in details["loc"])[:_MAX_LOCATION]
    text = f"{location}: {details['msg']}" if location else str(details["msg"])
    given = details.get("input")
    if isinstance(given, str | int | float) and details["type"] != "json_invalid":
        text += f", not {shorten(given)}"
    return text


def shorten(value: Any) -> str:
    """The repr of a client's value in a few characters, however long the value is."""
    return reprlib.repr(value)
