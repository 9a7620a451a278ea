"""Flags from pydantic models: names, help, and which of them the user gave."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import AliasChoices, Field
from pydantic.dataclasses import dataclass
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.cli.flags import add_flags, explicit_flags


@dataclass(frozen=True)
class Oven:
    heat_c: float = Field(default=180.0, description="temperature in degrees; 100% safe")
    mode: Literal["fan", "grill"] = Field(default="fan", description="heating")
    light: bool = Field(default=True, description="light inside")
    trays: tuple[int, ...] = Field(
        default=(1, 3), validation_alias=AliasChoices("trays", "racks"), description="levels"
    )
    note: str = Field(default="", description="text")


class Kitchen(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="KITCHEN_")

    cooks: Annotated[int | None, Field(ge=1)] = Field(None, description="people")
    folder: Path = Field(Path("recipes"), description="recipes")
    keys: tuple[str, ...] = Field((), description="keys")


def parser_of(model: type[object], *names: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_flags(parser, model, names or None)
    return parser


def help_of(model: type[object], *names: str) -> str:
    return " ".join(parser_of(model, *names).format_help().split())


@pytest.mark.parametrize(
    "text",
    [
        "--heat-c X temperature in degrees; 100% safe (default: 180.0)",
        "--mode fan|grill heating (default: fan)",
        "--light true|false light inside (default: true)",
        "--trays LIST levels (default: [1, 3])",
        "--note TEXT text (default: none)",
    ],
)
def test_help_describes_each_field(text: str) -> None:
    assert text in help_of(Oven)


@pytest.mark.parametrize(
    "text",
    [
        "--cooks N people (default: auto, variable: KITCHEN_COOKS)",
        "--folder PATH recipes (default: recipes, variable: KITCHEN_FOLDER)",
        "--keys LIST keys (default: none, variable: KITCHEN_KEYS)",
    ],
)
def test_help_of_settings_names_the_variable(text: str) -> None:
    assert text in help_of(Kitchen)


def test_explicit_flags_are_the_given_ones_as_text() -> None:
    parser = parser_of(Oven)
    assert explicit_flags(parser.parse_args([]), Oven) == {}
    args = parser.parse_args(["--heat-c", "200", "--trays", "[2]"])
    assert explicit_flags(args, Oven) == {"heat_c": "200", "trays": "[2]"}


def test_old_name_is_a_hidden_flag() -> None:
    assert "--racks" not in help_of(Oven)
    args = parser_of(Oven).parse_args(["--racks", "[2]"])
    assert explicit_flags(args, Oven) == {"trays": "[2]"}


def test_only_the_named_fields_become_flags() -> None:
    text = help_of(Oven, "mode")
    assert "--mode" in text
    assert "--heat-c" not in text


def test_argument_of_the_same_name_is_not_a_flag() -> None:
    parser = parser_of(Oven, "mode")
    parser.add_argument("note")
    assert explicit_flags(parser.parse_args(["hello", "--mode", "grill"]), Oven) == {
        "mode": "grill"
    }
