"""A training recipe: every value of a run, read from a TOML file, each one also a flag.

Sections are dataclasses; their field names are unique over all sections, so that a flag needs no
prefix: `[optim] learning_rate` is `--learning-rate`. Knows no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from model.config import DIVISOR, PreprocessConfig, UNetConfig, check_name, check_together
from model.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the pairs are and how they are split."""

    kind: str = "paired"
    """paired: two folders with the same file names; carvana: <car>_<view>.jpg and ..._mask.gif."""
    images: str = "data/images"
    masks: str = "data/masks"
    labels: str = "binary"
    """binary: not 0 is foreground; classes: class indices; instances: one value an object."""
    groups: str = ""
    """A CSV file with a column `id`; images of one group are never split."""
    group_column: str = "group"
    validation_list: str = ""
    """A text file with one id a line: the validation images. Else a share of the groups is."""
    validation_share: float = 0.12
    balance: float = 0.0
    """0: every image is drawn as often; 1: every group, so that rare kinds count; or in between."""
    difficulty_report: str = ""
    """What `unet evaluate --part training --json` wrote: images are drawn the more often the worse
    their Dice there, so that steps go where there is something to learn."""
    golden: str = ""
    """An image whose publication is allowed: the checkpoint carries a part of it. Else it is of
    the validation images."""
    source: str = ""
    licence: str = ""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Each value is the strength of one variation; 0 turns it off, as does (1, 1) for `zoom`."""

    crop: tuple[int, ...] = (160, 160)
    """Height and width of the random crop. (): the whole image, padded to the declared window."""
    zoom: tuple[float, ...] = (0.67, 1.5)
    """Objects appear between these times their size, evenly in the logarithm."""
    rotate: float = 180.0
    """Largest angle, in degrees."""
    flip: bool = True
    """Left-right; with rotations of 180 degrees that gives every orientation."""
    elastic: float = 6.0
    """Standard deviation of the displacements on a coarse 3×3 grid, in pixels (paper, §3.1: 10)."""
    gain: float = 0.3
    """Contrast is multiplied by exp(±gain)."""
    offset: float = 0.15
    """Brightness is moved by up to this share of the full range."""
    gamma: float = 0.4
    """Intensities are raised to the power exp(±gamma)."""
    colour: float = 0.15
    """Each channel's own gain, exp(±colour)."""
    noise: float = 0.04
    """Largest standard deviation of added noise, as a share of the full range."""
    blur: float = 0.2
    """Share of the crops that are blurred a little."""
    invert: float = 0.1
    """Share of the crops with dark and bright exchanged."""
    unresampled: float = 0.0
    """Share of the crops that keep their pixels, turned by quarters and mirrored: the others are
    interpolated, which makes them softer than the images a model will see."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised: cross-entropy + dice_weight × Dice."""

    dice_weight: float = 1.0
    border_weight: float = 10.0
    """w0 of the paper's eq. 2; needs instance labels. 0: every pixel counts the same."""
    border_sigma: float = 5.0
    """σ of eq. 2, in pixels."""
    border_reach: int = 2
    """The border channel marks pixels with two objects within this many pixels."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How the weights are moved."""

    optimiser: str = "adamw"
    """adamw or adam."""
    learning_rate: float = 4e-4
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    """cosine: down to 1% at the end; constant."""
    warmup: int = 100
    """Steps until the full learning rate."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: not clipped."""
    ema: float = 0.998
    """Decay of the moving average of the weights that is validated and shipped; 0: no average."""
    initialisation: str = "he"
    """he (He et al. 2015, eq. 10) or torch (the library's own default)."""
    init_from: str = ""
    """A checkpoint whose weights training starts from; one of fewer base_features is widened, and
    one that was widened to more may be narrowed again."""
    batch_norm: bool = False
    """Train with batch normalisation, which is folded into the convolutions that are shipped."""
    batch_size: int = 8
    epochs: float = 0.0
    """Passes over the training images, unless `steps` says how long."""
    steps: int = 0
    minutes: float = 0.0
    """Budget; the schedule ends when it is spent. Such a run does not repeat to the bit. It counts
    steps, over all starts of a run: not reading, validation, pictures and the report."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What is written down meanwhile, and on what it runs. Only `device` and `autocast` change what
    a step gives."""

    validate_every: int = 400
    """Steps between validations; the state is saved as often."""
    previews_per_epoch: int = 0
    """Pictures of predictions an epoch, beside those of each validation."""
    workers: int = 0
    """Processes that draw crops; 0: the training's own."""
    cache_mb: int = 2048
    """Prepared images kept in memory."""
    device: str = "auto"
    autocast: str = "auto"
    """auto: bf16 on CUDA, off elsewhere; or bf16, off."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All of it. `name` is the checkpoint's."""

    name: str = "model"
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
        data, optim = self.data, self.optim
        _one_of("kind", data.kind, "paired", "carvana")
        _one_of("labels", data.labels, "binary", "classes", "instances")
        _one_of("optimiser", optim.optimiser, "adamw", "adam")
        _one_of("schedule", optim.schedule, "cosine", "constant")
        _one_of("initialisation", optim.initialisation, "he", "torch")
        _one_of("autocast", self.run.autocast, "auto", "bf16", "off")
        if not 0 < data.validation_share < 1:
            raise ConfigError(f"validation_share must lie in 0..1, not {data.validation_share}")
        if optim.batch_size < 1 or self.run.validate_every < 1 or optim.learning_rate <= 0:
            raise ConfigError("batch_size, validate_every and learning_rate must be above 0")
        if not 0 <= optim.ema < 1:
            raise ConfigError(f"ema must lie in 0..1, not {optim.ema}")
        if max(optim.steps, optim.epochs, optim.minutes) <= 0:
            raise ConfigError("say how long: epochs, steps or minutes")
        if data.labels == "classes" and self.preprocess.binary:
            raise ConfigError("labels 'classes' need more than two names in classes")
        if data.labels != "classes" and not self.preprocess.binary:
            raise ConfigError(f"labels {data.labels!r} give two classes, not more")
        if data.labels != "instances" and self.network.out_channels == 2:
            raise ConfigError("a border channel (out_channels 2) needs labels 'instances'")
        self._check_numbers()
        self._check_crop()
        self._check_variations()

    def _check_numbers(self) -> None:
        for part in (self.data, self.augment, self.loss, self.optim, self.run):
            for name, value in vars(part).items():
                if isinstance(value, int | float) and not 0 <= value < math.inf:
                    raise ConfigError(f"{name} must be 0 or more, and finite, not {value}")
        if self.optim.seed >= 2**63:
            raise ConfigError(f"seed must be below 2^63, not {self.optim.seed}")
        if self.loss.border_sigma <= 0:
            raise ConfigError(f"border_sigma must be above 0, not {self.loss.border_sigma}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.run.device):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {self.run.device!r}")

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

    def _check_variations(self) -> None:
        for name in ("blur", "invert", "unresampled"):
            share = getattr(self.augment, name)
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} is a share of the crops, 0..1, not {share}")
        zoom = self.augment.zoom
        if len(zoom) != 2 or not 0 < zoom[0] <= zoom[1]:
            raise ConfigError(f"zoom must be [least, most], both above 0, not {list(zoom)}")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, path: Path, flags: Mapping[str, Any] | None = None) -> Self:
        """A recipe from a TOML file, or from the `config.json` of a run, with `flags` over it.

        Args:
            flags: field name -> value.

        Raises:
            ConfigError: neither of them, an unknown key (named, with the nearest valid one), a
                value of another type or out of range.
            OSError: the file cannot be read.
        """
        is_json = path.suffix == ".json"
        try:
            document = (json if is_json else tomllib).loads(path.read_text("utf-8-sig"))
        except ValueError as error:  # of both parsers, and of UTF-8
            raise ConfigError(f"{path} is not {'JSON' if is_json else 'TOML'}: {error}") from error
        try:
            return cls._of(document, flags or {})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, document: Mapping[str, Any], flags: Mapping[str, Any]) -> Self:
        parts: dict[str, Any] = {}
        for key, values in document.items():
            if key != "name" and key not in SECTIONS:
                raise ConfigError(f"unknown section [{key}]{_nearest(key, SECTIONS)}")
            if key in SECTIONS and not isinstance(values, dict):
                raise ConfigError(f"[{key}] is a section, not a value")
        for section, kind in SECTIONS.items():
            fields = {field.name: field for field in dataclasses.fields(kind)}
            values = rename_old_keys(section, document.get(section, {}))
            values.update({name: flags[name] for name in fields if name in flags})
            for name, value in values.items():
                if name not in fields:
                    raise ConfigError(
                        f"[{section}] has no {name!r}{_nearest(name, fields)}; it has "
                        f"{', '.join(fields)}"
                    )
                values[name] = _typed(name, value, fields[name].default)
            parts[section] = kind(**values)
        name = flags.get("name", document.get("name", cls.name))
        return cls(name=_typed("name", name, ""), **parts)


SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "network": UNetConfig,
    "preprocess": PreprocessConfig,
    "augment": AugmentConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}


OLD_KEYS: dict[str, dict[str, str]] = {
    "data": {"focus": "difficulty_report"},
    "augment": {"exact": "unresampled"},
    "optim": {"start": "init_from", "clip": "grad_clip", "batch": "batch_size"},
    "run": {"every": "validate_every", "pictures": "previews_per_epoch"},
}
"""Section -> old key -> key. Recipes, run folders and flags with old keys are still read."""


def rename_old_keys(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section under the keys of today.

    Raises:
        ConfigError: a value is given under its old and its new key.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = OLD_KEYS.get(section, {}).get(key, key)
        if name in renamed:
            raise ConfigError(f"[{section}] has {name!r} twice; its old key is {key!r}")
        renamed[name] = value
    return renamed


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field, grouped by section; what is not given is not set."""
    parser.add_argument("--name", default=argparse.SUPPRESS, help="of the checkpoint")
    old_flags = {name: old for keys in OLD_KEYS.values() for old, name in keys.items()}
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(f"[{section}]")
        for field in dataclasses.fields(kind):
            group.add_argument(
                f"--{field.name.replace('_', '-')}",
                default=argparse.SUPPRESS,
                type=str if isinstance(field.default, str) else _value,
                metavar=type(field.default).__name__.upper(),
                help=f"({str(field.default).replace('%', '%%')})",
            )
            if field.name in old_flags:
                group.add_argument(
                    f"--{old_flags[field.name]}",
                    dest=field.name,
                    default=argparse.SUPPRESS,
                    type=str if isinstance(field.default, str) else _value,
                    help=argparse.SUPPRESS,
                )


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_flags` that were given."""
    names = {"name"} | {f.name for kind in SECTIONS.values() for f in dataclasses.fields(kind)}
    return {name: value for name, value in vars(args).items() if name in names}


def _value(text: str) -> Any:
    """A flag's text as TOML (numbers, booleans, lists), or as itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _typed(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of the field's default."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, str) and isinstance(value, int | float) and type(value) is not bool:
        return str(value)  # --name 2024
    if not _is_like(value, default):
        raise ConfigError(f"{name} must be {_described(default)}, not {value!r}")
    return _frozen(value)


_TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _is_like(value: Any, default: Any) -> bool:
    """Whether it has the default's type; of a list, whether all in it are like the first there."""
    if isinstance(default, tuple):
        example = default[0] if default else 0
        return isinstance(value, list | tuple) and all(_is_like(item, example) for item in value)
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)


def _described(default: Any) -> str:
    if not isinstance(default, tuple):
        return _TYPES[type(default)]
    example = default[0] if default else 0
    return f"a list, in which each is {_described(example)}"


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _one_of(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
