"""The sections of a training recipe: every value, with its default and its description.

Field names are unique over all sections, so that flags need no prefix: `[optim] learning_rate` is
`--learning-rate`. Knows no files.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, field_validator
from pydantic.dataclasses import dataclass

from model.config_base import (
    STRICT,
    Amount,
    Bool,
    ConfigBase,
    Count,
    Int,
    PositiveInt,
    Share,
    fields_of,
)
from model.errors import ConfigError

_Byte = Annotated[int, Field(strict=True, ge=0, le=255)]
_Positive = Annotated[float, Field(strict=True, gt=0)]


@dataclass(frozen=True, config=STRICT)
class ImagesConfig(ConfigBase):
    """Where images and masks are, and how they are split."""

    kind: Literal["paired", "named", "carvana"] = Field(
        default="paired",
        description="paired: two folders with equal file names; named: masks are found by words "
        "in their names (a.png and a_mask.png, img_1 and label_1), in folders of folders or in "
        "one; carvana: CAR_VIEW.jpg and CAR_VIEW_mask.gif",
    )
    images: str = Field(default="data/images", description="folder of the images")
    masks: str = Field(default="data/masks", description="folder of the masks")
    pattern: str = Field(
        default="*", description="only images whose names without suffix match, such as tnbc-*"
    )
    labels: Literal["binary", "classes", "instances"] = Field(
        default="binary",
        description="values in the masks. binary: every value but 0 is foreground; classes: class "
        "indices; instances: one value per object",
    )
    ignore: Annotated[Int, Field(ge=-1)] = Field(
        default=-1,
        description="value of pixels without a label, often 255: they count neither in the loss "
        "nor in the scores; -1: all pixels have one",
    )
    colors: tuple[tuple[_Byte, _Byte, _Byte], ...] = Field(
        default=(),
        validation_alias=AliasChoices("colors", "colours"),
        description="color [red, green, blue] of each class in the masks; []: masks have indices. "
        "With ignore set, pixels of other colors have no label",
    )
    groups: str = Field(
        default="",
        description="CSV file with a column `id`; images of one group stay on one side of the "
        "split",
    )
    group_by: Literal["file", "prefix"] = Field(
        default="file",
        description="groups without such a file. prefix: images whose names are equal up to the "
        "last _ form a group; file: each image is a group",
    )
    group_column: str = Field(default="group", description="column of the groups in that file")
    validation_list: str = Field(
        default="",
        description="text file with the ids of the validation images, one per line; without it, "
        "validation_share applies",
    )
    validation_share: Annotated[_Positive, Field(lt=1)] = Field(
        default=0.12, description="share of the groups that is held out for validation"
    )
    balance: Amount = Field(
        default=0.0,
        description="0: images are drawn equally often; 1: groups are; values between interpolate",
    )
    difficulty_report: str = Field(
        default="",
        validation_alias=AliasChoices("difficulty_report", "focus"),
        description="JSON from `unet evaluate --part training --json`; images with a lower Dice "
        "are drawn more often",
    )


@dataclass(frozen=True, config=STRICT)
class SourceConfig(ImagesConfig):
    """One of several sources of images. Its name is part of the names of its images."""

    name: str = Field(
        default="", description="name of the source, in scores and in names of images"
    )
    share: Amount = Field(
        default=0.0,
        description="share of the crops, relative to the other sources; 0 for all sources: in "
        "proportion to their images",
    )

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise ConfigError(
                f"each source needs a name of letters, digits, '_', '.' or '-', not {self.name!r}"
            )


@dataclass(frozen=True, config=STRICT)
class DataConfig(ImagesConfig):
    """Where the images and masks are, and how they are split."""

    sources: tuple[SourceConfig, ...] = Field(
        default=(),
        description="several sources, [[data.sources]], each with a name, the keys above and a "
        "share; they replace the keys above",
    )
    golden: str = Field(
        default="",
        description="image for the golden pair, which the checkpoint contains; by default a "
        "validation image",
    )
    source: str = Field(default="", description="origin of the data, for the model card")
    licence: str = Field(default="", description="licence of weights and data, for the model card")

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"sources need different names, not {names}")
        shares = [source.share for source in self.sources]
        if any(shares) and not all(shares):
            raise ConfigError(f"share must be set for all sources or for none, not {shares}")
        own = {name for name in fields_of(ImagesConfig) if self.sources and self._is_set(name)}
        if own:
            raise ConfigError(f"with sources, {min(own)} must be set in each of them")

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != fields_of(ImagesConfig)[name].default)

    @property
    def parts(self) -> tuple[ImagesConfig, ...]:
        """The sources, or the only one, which is described by the section itself."""
        return self.sources or (self,)

    @property
    def has_instances(self) -> bool:
        """Whether the labels of a source have one value per object."""
        return any(part.labels == "instances" for part in self.parts)

    @property
    def has_void(self) -> bool:
        """Whether a source has pixels without a label."""
        return any(part.ignore >= 0 for part in self.parts)


@dataclass(frozen=True, config=STRICT)
class AugmentConfig(ConfigBase):
    """Strengths of the random variations; 0 turns one off."""

    crop: tuple[Count, ...] = Field(
        default=(160, 160),
        description="[height, width] of the random crop in pixels; []: the whole image, padded to "
        "the window",
    )
    zoom: tuple[_Positive, _Positive] = Field(
        default=(0.67, 1.5),
        description="[smallest, largest] magnification, uniform in the logarithm; [1, 1]: off",
    )
    rotate: Amount = Field(default=180.0, description="largest rotation, in degrees")
    flip: Bool = Field(default=True, description="mirror left and right in half of the crops")
    elastic: Amount = Field(
        default=6.0,
        description="standard deviation of the displacements on a coarse 3x3 grid, in pixels "
        "(paper, section 3.1: 10)",
    )
    gain: Amount = Field(default=0.3, description="contrast is multiplied by up to exp(±gain)")
    offset: Amount = Field(
        default=0.15, description="largest change of brightness, as a share of the full range"
    )
    gamma: Amount = Field(
        default=0.4, description="intensities are raised to up to the power exp(±gamma)"
    )
    color: Amount = Field(
        default=0.15,
        validation_alias=AliasChoices("color", "colour"),
        description="each channel is multiplied by up to exp(±color)",
    )
    hue: Annotated[Amount, Field(le=180)] = Field(
        default=0.0, description="colors are turned by up to this angle, in degrees"
    )
    saturation: Amount = Field(
        default=0.0, description="saturation is multiplied by up to exp(±saturation)"
    )
    grey: Share = Field(default=0.0, description="share of the crops without color")
    stain: Annotated[Amount, Field(le=0.5)] = Field(
        default=0.0,
        description="the amounts of hematoxylin, eosin and DAB are multiplied by up to exp(±stain)",
    )
    noise: Amount = Field(
        default=0.04,
        description="largest standard deviation of added noise, as a share of the full range",
    )
    blur: Share = Field(default=0.2, description="share of the crops that are slightly blurred")
    invert: Share = Field(default=0.1, description="share of the crops with inverted intensities")
    unresampled: Share = Field(
        default=0.0,
        validation_alias=AliasChoices("unresampled", "exact"),
        description="share of the crops that are cut without interpolation, which blurs: only "
        "mirrored and rotated by multiples of 90 degrees",
    )

    @field_validator("zoom")
    @classmethod
    def _check_zoom(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("must be [smallest, largest]")
        return value


@dataclass(frozen=True, config=STRICT)
class LossConfig(ConfigBase):
    """The loss: cross-entropy + dice_weight × Dice loss."""

    dice_weight: Amount = Field(default=1.0, description="weight of the Dice loss")
    border_weight: Amount = Field(
        default=10.0,
        description="w0 of eq. 2 in the paper, which needs instance labels; 0: all pixels count "
        "the same",
    )
    class_weights: tuple[Amount, ...] = Field(
        default=(),
        description="weight of each class in the cross-entropy, the background first; []: all 1",
    )
    border_sigma: _Positive = Field(default=5.0, description="sigma of eq. 2, in pixels")
    border_reach: Count = Field(
        default=2,
        description="the border channel marks pixels that have two objects within this distance, "
        "in pixels",
    )


@dataclass(frozen=True, config=STRICT)
class OptimConfig(ConfigBase):
    """How the weights are trained, and for how long."""

    optimiser: Literal["adamw", "adam"] = Field(default="adamw", description="optimizer")
    learning_rate: _Positive = Field(default=4e-4, description="highest learning rate")
    weight_decay: Amount = Field(default=1e-4, description="decay of the weights (adamw)")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="learning rate over time; cosine: down to 1% at the end"
    )
    warmup: Count = Field(
        default=100, description="steps until the learning rate reaches its value"
    )
    grad_clip: Amount = Field(
        default=1.0,
        validation_alias=AliasChoices("grad_clip", "clip"),
        description="largest norm of the gradient; 0: no limit",
    )
    ema: Annotated[Amount, Field(lt=1)] = Field(
        default=0.998,
        description="decay of the moving average of the weights, which is validated and saved; 0: "
        "no average",
    )
    initialisation: Literal["he", "torch"] = Field(
        default="he",
        description="initial weights. he: He et al. 2015, eq. 10; torch: the library's default",
    )
    init_from: str = Field(
        default="",
        validation_alias=AliasChoices("init_from", "start"),
        description="checkpoint with the initial weights. Its inputs and outputs may differ; one "
        "with fewer base_features is widened, and a widened one can be narrowed",
    )
    batch_norm: Bool = Field(
        default=False,
        description="train with batch normalization, which is folded into the convolutions of the "
        "checkpoint",
    )
    batch_size: PositiveInt = Field(
        default=8,
        validation_alias=AliasChoices("batch_size", "batch"),
        description="crops per step",
    )
    epochs: Amount = Field(
        default=0.0,
        description="length of training in passes over the training images, unless steps is set",
    )
    steps: Count = Field(
        default=0, description="length of training in steps; 0: use epochs or minutes"
    )
    minutes: Amount = Field(
        default=0.0,
        description="time limit, at which the schedule ends; 0: none. Only steps count, over all "
        "starts of a run. Such a run is not reproducible bit by bit",
    )
    stop_after: Count = Field(
        default=0,
        description="validations without a better score after which training stops; only those in "
        "the second half of a run count; 0: never",
    )
    seed: Annotated[Count, Field(lt=2**63)] = Field(
        default=0, description="seed of all random numbers"
    )


@dataclass(frozen=True, config=STRICT)
class RunConfig(ConfigBase):
    """Records and hardware.

    Of these, only device, autocast, augment_on and compile change the result of a step.
    """

    validate_every: Count = Field(
        default=0,
        validation_alias=AliasChoices("validate_every", "every"),
        description="steps between validations, at which the state is saved too; 0: a tenth of "
        "the run, at most 400",
    )
    validate_images: Count = Field(
        default=0,
        description="most images of a validation during the run, evenly spread; 0: all. The "
        "final scores use all",
    )
    previews_per_epoch: Count = Field(
        default=0,
        validation_alias=AliasChoices("previews_per_epoch", "pictures"),
        description="extra images of predictions per epoch; each validation writes some anyway",
    )
    workers: Count = Field(
        default=0, description="processes that prepare crops; 0: the training process does"
    )
    cache_mb: Count = Field(default=2048, description="memory for prepared images, in 10^6 bytes")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    autocast: Literal["auto", "bf16", "off"] = Field(
        default="auto",
        description="mixed precision; auto: bf16 on CUDA devices that have it, otherwise off",
    )
    augment_on: Literal["auto", "host", "device"] = Field(
        default="auto",
        description="where crops are made. device: in batches on the device, which then holds all "
        "training images; auto: there on CUDA if they fit, otherwise on the host",
    )
    compile: Bool = Field(
        default=False,
        description="compile the network with torch.compile, which takes a minute or more at "
        "each start",
    )

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return value
