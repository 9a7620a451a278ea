"""A training recipe: its sections together, read from a TOML file and the flags of `unet train`.

Knows no torch.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_origin

from pydantic import Field
from pydantic.dataclasses import dataclass

from model.config import DIVISOR, PreprocessConfig, UNetConfig, check_name, check_together
from model.config_base import STRICT, ConfigBase, fields_of, old_names, suggest
from model.errors import ConfigError
from model.files import MAX_TEXT_BYTES, read_file
from model.training.sections import AugmentConfig, DataConfig, LossConfig, OptimConfig, RunConfig

SECTIONS: dict[str, type[ConfigBase]] = {
    "data": DataConfig,
    "network": UNetConfig,
    "preprocess": PreprocessConfig,
    "augment": AugmentConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}


@dataclass(frozen=True, config=STRICT)
class Recipe(ConfigBase):
    """All sections. They are valid together."""

    name: str = Field(default="model", description="name of the checkpoint")
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    network: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    preprocess: PreprocessConfig = dataclasses.field(default_factory=PreprocessConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_together(self.network, self.preprocess)
        if max(self.optim.steps, self.optim.epochs, self.optim.minutes) <= 0:
            raise ConfigError("set steps, epochs or minutes")
        self._check_labels()
        self._check_crop()

    def _check_labels(self) -> None:
        binary, classes = self.preprocess.binary, len(self.preprocess.classes)
        weights = self.loss.class_weights
        if weights and len(weights) != classes:
            raise ConfigError(f"class_weights needs {classes} values, not {len(weights)}")
        for part in self.data.parts:
            labels, colors = part.labels, part.colors
            if labels == "classes" and binary:
                raise ConfigError("labels 'classes' needs more than two names in classes")
            if labels != "classes" and not binary:
                raise ConfigError(f"labels {labels!r} has two classes, not {classes}")
            if colors and (len(colors) != classes or labels == "instances"):
                raise ConfigError(
                    f"colors needs one color per class, {classes}, not {len(colors)}; instances "
                    "have none"
                )
        if not self.data.has_instances and self.network.out_channels == 2:
            raise ConfigError("a border channel (out_channels 2) needs labels 'instances'")

    def _check_crop(self) -> None:
        crop, margin = self.augment.crop, self.network.margin
        if not crop:
            if self.preprocess.mode != "resize":
                raise ConfigError("crop [] (whole images) needs mode 'resize'")
            return
        rest = 12 if margin else 0  # see config.check_together
        if len(crop) != 2 or any(
            side <= 2 * margin or (side - rest) % DIVISOR or side < DIVISOR for side in crop
        ):
            raise ConfigError(
                f"crop must be [height, width], multiples of {DIVISOR}"
                f"{' plus 12' if margin else ''}, not {list(crop)}"
            )

    @classmethod
    def read(cls, path: Path, flags: Mapping[str, str] | None = None) -> Self:
        """A recipe from a TOML file, or from the `config.json` of a run.

        Args:
            flags: field name -> the text of its flag. They override the file.

        Raises:
            ConfigError: the file cannot be read, a key is unknown, or a value is not allowed. The
                message is one line.
        """
        flags = flags or {}
        try:
            return cls.merge(_read_document(path), flags)
        except ConfigError as error:
            source = f"{path} with the flags" if flags else path
            raise ConfigError(f"{source}: {error}") from error

    @classmethod
    def merge(cls, document: Mapping[str, Any], flags: Mapping[str, str]) -> Self:
        """Make a recipe of the content of a TOML file, overridden by flags.

        Args:
            flags: as for `read`.

        Raises:
            ConfigError: a key is unknown, or a value is not allowed.
        """
        for key, values in document.items():
            if key != "name" and key not in SECTIONS:
                raise ConfigError(f"unknown section [{key}]{suggest(key, SECTIONS)}")
            if key in SECTIONS and not isinstance(values, dict):
                raise ConfigError(f"{key} must be a section, [{key}], not {values!r}")
        sections: dict[str, Any] = {}
        for section, kind in SECTIONS.items():
            values = rename_old_keys(section, document.get(section, {}))
            for name, field in fields_of(kind).items():
                if name in flags:
                    values[name] = _parse_flag(flags[name], field.annotation)
            try:
                sections[section] = kind.from_json(values)
            except ConfigError as error:
                raise ConfigError(f"[{section}] {error}") from None
        name = flags.get("name", document.get("name", "model"))
        return cls(name=name, **sections)


def rename_old_keys(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section, with each old key replaced by its present name.

    Raises:
        ConfigError: a value is given under its old and its present name.
    """
    present = {
        old: name
        for name, field in fields_of(SECTIONS[section]).items()
        for old in old_names(name, field)
    }
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = present.get(key, key)
        if name in renamed:
            raise ConfigError(f"[{section}] has {name!r} twice; its old name is also read")
        renamed[name] = value
    return renamed


def _read_document(path: Path) -> dict[str, Any]:
    is_json = path.suffix == ".json"
    try:
        text = read_file(path, MAX_TEXT_BYTES).decode("utf-8-sig")
        document = json.loads(text) if is_json else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except RecursionError:
        raise ConfigError("is nested too deeply") from None
    except ValueError as error:  # from either parser, or from UTF-8
        raise ConfigError(f"is not {'JSON' if is_json else 'TOML'}: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"must be a JSON object, not {type(document).__name__}")
    return document


def _parse_flag(text: str, annotation: Any) -> Any:
    """A flag's text as it is if the field is text, otherwise as a TOML value."""
    if annotation is str or get_origin(annotation) is Literal:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
