"""The base of every configuration: strict fields, no unknown keys, errors of one line.

A configuration is a frozen pydantic dataclass. Each field has a description, from which the command
line builds its help. Knows no files and no command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    AliasChoices,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic.dataclasses import dataclass

from model.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
"""A wrong type is an error, except that a number may stand where text is expected."""

# `true` is not a number, and "3" is not one either.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
PositiveInt = Annotated[int, Strict(), Field(ge=1)]
Count = Annotated[int, Strict(), Field(ge=0)]
Amount = Annotated[float, Strict(), Field(ge=0)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class ConfigBase:
    """A configuration that is valid once it is constructed.

    Raises:
        ConfigError: a field is unknown or its value is not allowed. The message is one line.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_error(cls, values: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(values)
        except ValidationError as error:
            raise ConfigError(describe_error(error, list(fields_of(cls)))) from None

    def to_json(self) -> dict[str, Any]:
        """The values by field name, nested configurations as dictionaries."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `to_json` described; missing fields have their defaults.

        Raises:
            ConfigError: see the class.
        """
        return cls(**values)


def fields_of(model: type[Any]) -> dict[str, FieldInfo]:
    """Field name -> field of a pydantic model, settings class or dataclass."""
    fields: dict[str, FieldInfo] = model.__pydantic_fields__
    return fields


def old_names(name: str, field: FieldInfo) -> list[str]:
    """The names that a field had before, which are still read."""
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else []
    return [old for old in choices if isinstance(old, str) and old != name]


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the closest known one, or "" if none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def describe_error(error: ValidationError, names: list[str]) -> str:
    """The first error as one line: the field, what is allowed, and the value.

    Args:
        names: the fields in their order; pydantic reports a positional argument by its index.
    """
    details = error.errors(include_url=False)[0]
    first, *inner = details["loc"]
    field = names[first] if isinstance(first, int) else first
    if details["type"] == "unexpected_keyword_argument":
        return f"unknown key {field!r}{suggest(field, names)}; known keys: {', '.join(names)}"
    place = field + "".join(f"[{index}]" for index in inner)
    if details["type"] == "missing":
        return f"{place} is missing"
    return f"{place} {requirement(details)}, not {details['input']!r}"


def requirement(details: ErrorDetails) -> str:
    """Pydantic's message about a value, as text that starts with "must"."""
    text = details["msg"].removeprefix("Value error, ")
    text = re.sub(r"^(Input|String|Tuple|Value) should ", "must ", text)
    text = re.sub(r"(, unable to|, got a| after validation).*", "", text)
    text = text.replace("valid boolean", "boolean (true or false)")
    return text.replace("valid tuple", "list")
