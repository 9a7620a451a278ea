"""Command-line flags from pydantic models: one flag per field, described by the field.

The text of a flag stays text; the model parses and checks it. Knows no command.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from model.config_base import fields_of, old_names

if TYPE_CHECKING:
    # argparse does not export the type of a group.
    from argparse import _ArgumentGroup as Group

    from pydantic.fields import FieldInfo

_DEFAULTS = {"None": "auto", "()": "none", "": "none", "True": "true", "False": "false"}


def add_flags(
    parser: argparse.ArgumentParser | Group,
    model: type[Any],
    names: Collection[str] | None = None,
) -> None:
    """Add a flag for each field of a pydantic model, settings class or dataclass.

    A field's old names are flags too, but hidden.

    Args:
        names: the fields to add; None: all.
    """
    for name, field in fields_of(model).items():
        if names is not None and name not in names:
            continue
        destination = _destination(model, name)
        parser.add_argument(
            _flag(name),
            dest=destination,
            default=argparse.SUPPRESS,
            metavar=_metavar(field.annotation),
            help=_help(model, name, field),
        )
        for old in old_names(name, field):
            parser.add_argument(
                _flag(old), dest=destination, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


def explicit_flags(args: argparse.Namespace, model: type[Any]) -> dict[str, str]:
    """Field name -> text of the flags from `add_flags` that the user gave."""
    values = vars(args)
    destinations = {name: _destination(model, name) for name in fields_of(model)}
    return {name: values[dest] for name, dest in destinations.items() if dest in values}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _destination(model: type[Any], name: str) -> str:
    """Separates a field from arguments of the same name that a command defines itself."""
    return f"{model.__name__}.{name}"


def _help(model: type[Any], name: str, field: FieldInfo) -> str:
    default = _format_default(field.get_default(call_default_factory=True))
    if field.annotation == Path | None:
        default = "none"
    notes = [f"default: {default}"]
    if prefix := getattr(model, "model_config", {}).get("env_prefix"):
        notes.append(f"variable: {prefix}{name.upper()}")
    return f"{field.description} ({', '.join(notes)})".replace("%", "%%")


def _format_default(value: Any) -> str:
    text = str(value)
    if text in _DEFAULTS:
        return _DEFAULTS[text]
    return text.replace("(", "[").replace(")", "]") if isinstance(value, tuple) else text


def _metavar(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return _metavar(next(kind for kind in arguments if kind is not types.NoneType))
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT", Path: "PATH"}
    return names.get(annotation, "LIST")
