"""The configuration inside a checkpoint: the network's shape, the preprocessing, the calibration.

Frozen dataclasses that are stored as JSON in a checkpoint's header. Knows no torch and no files.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from model.arrays import Shape
from model.config_base import (
    STRICT,
    Amount,
    Bool,
    ConfigBase,
    Count,
    Float,
    Int,
    PositiveInt,
    Share,
)
from model.errors import ConfigError

LEVELS = 4
"""2×2 poolings in the contracting path, and up-convolutions in the expansive path."""
DIVISOR = 1 << LEVELS
"""With `padding=1`, height and width must be multiples of it."""

GRAPH_GRID = 32
"""Windows of a graph start on multiples of at least this: the coarsest grid of most encoders."""

LOST_BORDER = 92
"""Pixels that the unpadded network (`padding=0`) loses on each side: 572 -> 388 (paper, fig. 1)."""

SKIP_MARGINS = (88, 40, 16, 4)
"""Pixels on each side by which a skip exceeds the up-sampled tensor without padding, from the top
level down. Each level below costs 4 pixels of its own scale on the way down and 4 on the way up."""

GOLDEN_IOU = 0.98
"""The lowest IoU with its golden mask at which a model is served."""

_NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + " ()+-._")


def check_name(name: str) -> None:
    """Check the name of a model, which is a file name and an HTTP header value (ASCII; RFC 9110,
    section 5.5).

    Raises:
        ConfigError: the name is empty or has other characters, or a space or dot at either end.
    """
    if not name or name.strip(" .") != name or not _NAME_CHARACTERS.issuperset(name):
        raise ConfigError(
            f"invalid model name {name!r}; allowed: letters a to z, digits, and ()+-._ and spaces "
            "between them"
        )


Activation = Literal["sigmoid", "softmax", "none"]
_Byte = Annotated[int, Field(strict=True, ge=0, le=255)]


@dataclass(frozen=True, config=STRICT)
class UNetConfig(ConfigBase):
    """The arguments of `model.unet.UNet`."""

    in_channels: PositiveInt = Field(default=3, description="channels of the input image")
    out_channels: PositiveInt = Field(default=1, description="channels of the logits")
    base_features: PositiveInt = Field(
        default=64, description="features of the first level; each level below has twice as many"
    )
    padding: Annotated[Int, Field(ge=0, le=1)] = Field(
        default=1,
        description="1: padded convolutions, the output is as large as the input; 0: the unpadded "
        "network of the paper, 572 -> 388 pixels",
    )

    @property
    def margin(self) -> int:
        """Pixels by which an input window is larger than its output, on each side."""
        return 0 if self.padding else LOST_BORDER

    @property
    def grid(self) -> int:
        """Windows of an image start on its multiples."""
        return DIVISOR

    def check_window(self, height: int, width: int) -> None:
        """Check that the network accepts windows of this shape.

        Raises:
            ConfigError: it does not.
        """
        for size in (height, width):
            inner = size - 2 * self.margin
            if self.padding == 1 and size % DIVISOR:
                raise ConfigError(f"window {height}x{width} is not divisible by {DIVISOR}")
            if self.padding == 0 and (inner < DIVISOR or (size - 12) % DIVISOR):
                raise ConfigError(
                    f"window {height}x{width} does not fit an unpadded network: each side must be "
                    f"12 more than a multiple of {DIVISOR} (204, 220, ..., 572), at least 204"
                )


@dataclass(frozen=True, config=STRICT)
class GraphConfig(ConfigBase):
    """A network that is an ONNX graph, and how its input and outputs are used."""

    kind: Literal["onnx"] = Field(default="onnx", description="distinguishes it from a UNetConfig")
    in_channels: PositiveInt = Field(default=3, description="channels of the input image")
    out_channels: PositiveInt = Field(default=1, description="channels of the probabilities")
    input: str = Field(default="input", description="name of the input")
    outputs: tuple[str, ...] = Field(
        default=("output",),
        min_length=1,
        description="names of the outputs that are used, concatenated along their channels",
    )
    layout: Literal["NCHW", "NHWC"] = Field(default="NCHW", description="axes of the input")
    output_layout: Literal["NCHW", "NHWC", "NHW"] = Field(
        default="NCHW", description="axes of the outputs"
    )
    activation: Activation = Field(
        default="none", description="what makes probabilities of the outputs; none: the graph does"
    )
    foreground_only: Bool = Field(
        default=False, description="leave out the first channel of the probabilities, background"
    )
    size: tuple[PositiveInt, ...] = Field(
        default=(), description="[height, width] of every window, if the graph accepts only one"
    )
    divisor: PositiveInt = Field(
        default=1, description="height and width of a window are multiples of it"
    )
    batch: Literal["any", "one"] = Field(default="any", description="windows in one run")
    margin: Count = Field(
        default=0,
        description="pixels by which an input window is larger than its output, on each side",
    )

    def __post_init__(self) -> None:
        if len(self.size) not in (0, 2):
            raise ConfigError(f"size must be [height, width] or empty, not {list(self.size)}")

    @property
    def grid(self) -> int:
        """Windows of an image start on its multiples: the multiple of `divisor` from 32 on."""
        return self.divisor * math.ceil(GRAPH_GRID / self.divisor)

    def check_window(self, height: int, width: int) -> None:
        """Check that the graph accepts windows of this shape, as far as its description says.

        Raises:
            ConfigError: it does not.
        """
        if self.size and (height, width) != self.size:
            raise ConfigError(
                f"window {height}x{width}: the graph accepts {self.size[0]}x{self.size[1]} alone"
            )
        if height % self.divisor or width % self.divisor:
            raise ConfigError(f"window {height}x{width} is not divisible by {self.divisor}")
        if min(height, width) - 2 * self.margin < self.grid:
            least = self.grid + 2 * self.margin
            raise ConfigError(f"window {height}x{width} must have sides of at least {least}")


Architecture = UNetConfig | GraphConfig
"""The network of a checkpoint: `model.unet.UNet`, or an ONNX graph. Windows are planned with what
both have: channels, `margin`, `grid` and `check_window`."""


def read_architecture(values: Mapping[str, Any]) -> Architecture:
    """Return the architecture that `to_json` described.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """
    kind = GraphConfig if "kind" in values else UNetConfig
    return kind.from_json(values)


@dataclass(frozen=True, config=STRICT)
class PreprocessConfig(ConfigBase):
    """How an image becomes windows, and logits become a mask."""

    # image -> windows
    mode: Literal["native", "resize"] = Field(
        default="native",
        description="native: windows at the image's own resolution; resize: the whole image is "
        "resized to one window",
    )
    # Three sides and all their pairs, so that rows and columns can each mix them: see
    # docs/decisions/0011.
    window: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        default=(
            (256, 256),
            (256, 368),
            (256, 544),
            (368, 256),
            (368, 368),
            (368, 544),
            (544, 256),
            (544, 368),
            (544, 544),
        ),
        min_length=1,
        description="shapes [height, width] in pixels that the network accepts; mode resize has "
        "one",
    )
    size: tuple[PositiveInt, ...] = Field(
        default=(),
        description="mode resize: [height, width] to which images are resized, then padded by "
        "reflection to the window; the window's shape by default",
    )
    overlap: Count = Field(
        default=128,
        description="minimum overlap of neighbouring windows in pixels, over which they are "
        "blended; large images use less",
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = Field(
        default="bilinear", description="mode resize: antialiased resampling filter"
    )

    # values
    intensity: Literal["range", "percentile"] = Field(
        default="range",
        description="range: the full range of the data type becomes 0..1; percentile: the range "
        "between two percentiles of the image does",
    )
    percentiles: tuple[Float, Float] = Field(
        default=(1.0, 99.8),
        description="intensity percentile: the percentiles of all channels together that become 0 "
        "and 1; values outside are clipped. Use less than 1 for few and dark objects",
    )
    mean: tuple[Float, ...] = Field(
        default=(0.5, 0.5, 0.5),
        min_length=1,
        description="subtracted from values in 0..1, per channel",
    )
    std: tuple[Annotated[Float, Field(gt=0)], ...] = Field(
        default=(0.25, 0.25, 0.25), description="divides the values after that, per channel"
    )

    # logits -> mask
    threshold: Share = Field(
        default=0.5, description="a pixel is foreground from this probability on (binary models)"
    )
    classes: tuple[str, ...] = Field(
        default=("background", "foreground"),
        min_length=2,
        max_length=256,  # a mask has 8 bits
        description="names of the classes, the background first",
    )
    palette: tuple[tuple[_Byte, _Byte, _Byte], ...] = Field(
        default=((0, 0, 0), (255, 255, 255)), description="color [red, green, blue] of each class"
    )

    @field_validator("percentiles")
    @classmethod
    def _check_percentiles(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 100:
            raise ValueError("must be two numbers in 0..100, the lower one first")
        return value

    def __post_init__(self) -> None:
        if self.mode == "resize" and len(self.window) != 1:
            raise ConfigError(f"mode 'resize' needs exactly one window, not {len(self.window)}")
        if self.size and (
            self.mode != "resize"
            or len(self.size) != 2
            or self.size[0] > self.window[0][0]
            or self.size[1] > self.window[0][1]
        ):
            raise ConfigError(
                f"size {self.size} needs mode 'resize' and must fit into the window {self.window}"
            )
        if self.overlap >= min(min(shape) for shape in self.window):
            raise ConfigError(f"overlap must be smaller than every window, not {self.overlap}")
        if len(self.mean) != len(self.std):
            raise ConfigError(
                f"mean and std need one value per channel, not {len(self.mean)} and {len(self.std)}"
            )
        if len(self.palette) != len(self.classes):
            raise ConfigError(
                f"palette needs one color per class, {len(self.classes)}, not {len(self.palette)}"
            )

    @property
    def resized(self) -> Shape:
        """Mode "resize": the (height, width) that the network receives."""
        return (self.size[0], self.size[1]) if self.size else self.window[0]

    @property
    def binary(self) -> bool:
        """True for two classes, which one sigmoid separates. More classes have a softmax over one
        channel per class."""
        return len(self.classes) == 2


@dataclass(frozen=True, config=STRICT)
class Calibration(ConfigBase):
    """The activation ranges that int8 needs, and the measured difference from fp32."""

    MIN_IOU: ClassVar[float] = 0.99
    MAX_DICE_LOSS: ClassVar[float] = 0.002

    ranges: Mapping[str, tuple[Float, Float]] = Field(
        description="convolution -> (low, high) of its output, after the ReLU if it has one; of an "
        "ONNX graph see app.engine.graph_quantizers"
    )
    images: Count = Field(
        default=0,
        description="validation images on which iou and dice_loss were measured: all in which "
        "either mask has foreground; 0: not measured",
    )
    iou: Amount = Field(default=0.0, description="mean IoU of the int8 masks with the fp32 masks")
    dice_loss: Annotated[float, Field(allow_inf_nan=True)] = Field(
        default=math.inf, description="mean Dice of fp32 minus mean Dice of int8"
    )
    golden_iou: Amount = Field(
        default=0.0, description="IoU of the int8 mask of the golden image with the golden mask"
    )

    @property
    def validated(self) -> bool:
        """Whether int8 may be the default."""
        similar = self.iou >= self.MIN_IOU and self.dice_loss <= self.MAX_DICE_LOSS
        return self.images > 0 and similar and self.golden_iou >= GOLDEN_IOU

    def __str__(self) -> str:
        if not self.images:
            return "int8 was measured on no validation image with foreground"
        change = "lose" if self.dice_loss >= 0 else "gain"
        return (
            f"int8 masks have IoU {self.iou:.4f} with fp32 and {change} {abs(self.dice_loss):.4f} "
            f"Dice on {self.images} validation images, IoU {self.golden_iou:.4f} on the golden "
            "image"
        )


def check_together(architecture: Architecture, preprocess: PreprocessConfig) -> None:
    """Check that the network and the preprocessing fit together.

    A binary model has one output channel (foreground) or two (foreground, and the border between
    touching objects, which separates instances). A model of n > 2 classes has n.

    Raises:
        ConfigError: the channel counts disagree, or the network does not accept a window.
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
        architecture.check_window(height, width)
