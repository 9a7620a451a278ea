"""What a checkpoint says about itself: the network's shape and how images become windows.

Frozen dataclasses that travel as JSON in a checkpoint's header. Knows no torch and no files.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from model.arrays import Colour, Shape
from model.errors import ConfigError

LEVELS = 4
"""2×2 poolings on the way down, and up-convolutions on the way up."""
DIVISOR = 1 << LEVELS
"""With `padding=1`, height and width are multiples of it."""

LOST_BORDER = 92
"""Pixels that the unpadded network (`padding=0`) loses on each side: 572 -> 388 (paper, fig. 1)."""


GOLDEN_IOU = 0.98
"""The least overlap with its golden mask that a model must show before it is served."""


_NAME = frozenset(string.ascii_letters + string.digits + " ()+-._")


def check_name(name: str) -> None:
    """
    Raises:
        ConfigError: no name for a model: it is a file's name, and goes into headers of HTTP, which
            are ASCII (RFC 9110, section 5.5).
    """
    if not name or name.strip(" .") != name or not _NAME.issuperset(name):
        raise ConfigError(
            f"{name!r} is no name for a model: letters a to z, digits, spaces within and any of "
            "()+-._ make one"
        )


def _from_json(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Build a frozen dataclass from JSON: unknown keys are named, lists become tuples."""

    def frozen(value: Any) -> Any:
        return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value

    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(
            f"{cls.__name__} has no {unknown[0]!r}; it has {', '.join(sorted(known))}"
        )
    return cls(**{name: frozen(value) for name, value in values.items()})


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The arguments of `model.unet.UNet`."""

    in_channels: int = 3
    out_channels: int = 1
    base_features: int = 64
    padding: int = 1

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "base_features"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.padding not in (0, 1):
            raise ConfigError(f"padding must be 0 (the paper's) or 1, not {self.padding}")

    @property
    def margin(self) -> int:
        """Pixels by which an input window is larger than its output, on each side."""
        return 0 if self.padding else LOST_BORDER

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return _from_json(cls, values)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """How an image becomes windows, and logits become a mask."""

    # image -> windows
    mode: Literal["native", "resize"] = "native"
    """native: cut at the image's own resolution; resize: the whole image becomes one window."""
    window: tuple[Shape, ...] = (
        (256, 256),
        (256, 368),
        (256, 544),
        (368, 256),
        (368, 368),
        (368, 544),
        (544, 256),
        (544, 368),
        (544, 544),
    )
    """The closed set of input shapes (height, width) the network ever sees: three sides, and all
    their pairs, so that rows and columns can each mix them (docs/decisions/0011)."""
    size: tuple[int, ...] = ()
    """resize: (height, width) the image becomes, then reflected to the window; () is the window."""
    overlap: int = 128
    """Pixels that neighbouring windows share at least, and over which they are blended; those of
    large images share fewer (`model.windows.plan_windows`)."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    """Filter of the one resize path (antialiased); used by mode "resize" only."""

    # values
    intensity: Literal["range", "percentile"] = "range"
    """range: the type's full range is 0..1; percentile: the image's own `percentiles` are."""
    percentiles: tuple[float, float] = (1.0, 99.8)
    """Percentiles of the image's values, all channels together, that become 0 and 1; what lies
    beyond is clipped. Objects that are dark and few ask for less than 1%."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)

    # logits -> mask
    threshold: float = 0.5
    classes: tuple[str, ...] = ("background", "foreground")
    palette: tuple[Colour, ...] = ((0, 0, 0), (255, 255, 255))

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mode", ("native", "resize")),
            ("interpolation", ("bilinear", "bicubic", "lanczos")),
            ("intensity", ("range", "percentile")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        if not self.window or any(len(shape) != 2 or min(shape) < 1 for shape in self.window):
            raise ConfigError(f"window must list (height, width) pairs, not {self.window!r}")
        if self.mode == "resize" and len(self.window) != 1:
            raise ConfigError(f"mode 'resize' takes exactly one window, not {len(self.window)}")
        if self.size and (
            self.mode != "resize"
            or len(self.size) != 2
            or not 0 < self.size[0] <= self.window[0][0]
            or not 0 < self.size[1] <= self.window[0][1]
        ):
            raise ConfigError(
                f"size {self.size} needs mode 'resize' and must fit into the window {self.window}"
            )
        if not 0 <= self.overlap < min(min(shape) for shape in self.window):
            raise ConfigError(f"overlap {self.overlap} must be smaller than every window")
        if len(self.percentiles) != 2 or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ConfigError(f"percentiles must be two of 0..100, rising, not {self.percentiles}")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ConfigError("mean and std need one value a channel, std above 0")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ConfigError(f"mean and std are finite, not {self.mean} and {self.std}")
        if not (math.isfinite(self.threshold) and 0 <= self.threshold <= 1):
            raise ConfigError(f"threshold must lie in 0..1, not {self.threshold}")
        if len(self.classes) < 2 or len(self.palette) != len(self.classes):
            raise ConfigError("classes need the background, one more, and a palette colour each")
        if len(self.classes) > 256:
            raise ConfigError(f"a mask has 8 bits, 256 classes at most, not {len(self.classes)}")

    @property
    def resized(self) -> Shape:
        """Mode "resize": (height, width) of every image in front of the network."""
        return (self.size[0], self.size[1]) if self.size else self.window[0]

    @property
    def binary(self) -> bool:
        """Two classes: one sigmoid decides. More: a softmax over one channel a class."""
        return len(self.classes) == 2

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return _from_json(cls, values)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What int8 has to know of a network's activations, and what it was measured to cost.

    Attributes:
        ranges: convolution -> (low, high) of what it gives, behind the ReLU where there is one.
        images: validation images on which the next two were measured, all that are not empty to
            both; 0: not measured.
        iou: mean IoU of the int8 masks with the fp32 masks of the same weights.
        dice_loss: fp32's mean Dice less int8's.
        golden_iou: of the int8 mask of the golden image with the golden mask.
    """

    MIN_IOU: ClassVar[float] = 0.99
    MAX_DICE_LOSS: ClassVar[float] = 0.002

    ranges: Mapping[str, tuple[float, float]]
    images: int = 0
    iou: float = 0.0
    dice_loss: float = math.inf
    golden_iou: float = 0.0

    @property
    def validated(self) -> bool:
        """Whether int8 may be chosen where nobody asked for a precision."""
        good = self.iou >= self.MIN_IOU and self.dice_loss <= self.MAX_DICE_LOSS
        return self.images > 0 and good and self.golden_iou >= GOLDEN_IOU

    def __str__(self) -> str:
        if not self.images:
            return "int8 was measured on no validation image that shows anything"
        return (
            f"int8 keeps IoU {self.iou:.4f} with fp32 and loses {self.dice_loss:.4f} Dice on "
            f"{self.images} validation images, {self.golden_iou:.4f} on the golden one"
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        known = dict(values)
        known["ranges"] = {name: tuple(pair) for name, pair in values.get("ranges", {}).items()}
        return _from_json(cls, known)  # type: ignore[no-any-return]


def check_together(architecture: UNetConfig, preprocess: PreprocessConfig) -> None:
    """Hold what neither config can hold alone.

    A binary model has one output channel (foreground) or two (foreground, and the border between
    touching objects, which separates instances). A model of n > 2 classes has n.

    Raises:
        ConfigError: the channel counts contradict each other, or a window cannot pass the network.
    """
    if len(preprocess.mean) != architecture.in_channels:
        raise ConfigError(
            f"mean has {len(preprocess.mean)} values for {architecture.in_channels} input channels"
        )
    allowed = (1, 2) if preprocess.binary else (len(preprocess.classes),)
    if architecture.out_channels not in allowed:
        raise ConfigError(
            f"{len(preprocess.classes)} classes need {' or '.join(map(str, allowed))} output "
            f"channels, not {architecture.out_channels}"
        )
    for height, width in preprocess.window:
        for size in (height, width):
            inner = size - 2 * architecture.margin
            if architecture.padding == 1 and size % DIVISOR:
                raise ConfigError(f"window {height}x{width} is not divisible by {DIVISOR}")
            if architecture.padding == 0 and (inner < DIVISOR or (size - 12) % DIVISOR):
                raise ConfigError(
                    f"window {height}x{width} does not fit an unpadded network: each side must be "
                    f"12 more than a multiple of {DIVISOR} (204, 220, ..., 572), at least 204"
                )
