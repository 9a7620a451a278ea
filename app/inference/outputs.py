"""The outputs a client can ask for, and the result for one image.

Knows neither arrays nor HTTP; `app.inference.rendering` makes the outputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property

from app.errors import InvalidRequest
from model.config import PreprocessConfig


class FileFormat(StrEnum):
    """A file format of pictures."""

    PNG = "png"
    TIFF = "tiff"
    WEBP = "webp"


class Output(StrEnum):
    """A kind of output."""

    MASK = "mask"
    PROBABILITY = "probability"
    INSTANCES = "instances"
    OVERLAY = "overlay"
    CUTOUT = "cutout"
    POLYGONS = "polygons"
    COCO = "coco"
    ROIS = "rois"
    MEASUREMENTS = "measurements"
    PREVIEW = "preview"

    @property
    def is_picture(self) -> bool:
        """Whether it is an image file, whose format can be chosen."""
        return self not in _DOCUMENT_TYPES

    @property
    def needs_image(self) -> bool:
        """Whether it shows or measures the pixels of the image."""
        return self in (
            Output.OVERLAY,
            Output.CUTOUT,
            Output.PREVIEW,
            Output.MEASUREMENTS,
            Output.POLYGONS,
        )

    @property
    def needs_full_probabilities(self) -> bool:
        """Whether it needs the probabilities at the size of the image."""
        return self not in (Output.MASK, Output.OVERLAY, Output.PREVIEW)

    @property
    def needs_objects(self) -> bool:
        """Whether it needs touching objects separated."""
        return self in (
            Output.INSTANCES,
            Output.POLYGONS,
            Output.COCO,
            Output.ROIS,
            Output.MEASUREMENTS,
        )


_PICTURE_TYPES = {
    FileFormat.PNG: ("image/png", ".png"),
    FileFormat.TIFF: ("image/tiff", ".tiff"),
    FileFormat.WEBP: ("image/webp", ".webp"),
}
_DOCUMENT_TYPES = {
    Output.POLYGONS: ("application/geo+json", ".geojson"),
    Output.COCO: ("application/json", ".json"),
    Output.ROIS: ("application/zip", ".zip"),
    Output.MEASUREMENTS: ("text/csv", ".csv"),
}
"""Media type, and suffix of a file's name."""
_LOSSY = (Output.OVERLAY, Output.CUTOUT, Output.PREVIEW)
"""Pictures for people, which may be WebP. The values of the others must stay as they are."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The outputs that a client asks for. All of them come from one inference.

    Attributes:
        outputs: at least one.
        threshold: of the mask, 0..1; None is the model's own.
        page: of a file with several, from 0; None is the only one.
        channel: of an image that is neither grey nor color, from 0; None is all of a usual image.
        percentiles: (low, high) of the image's values that become 0 and 1, 0..100; None is the
            model's own.
        min_area: in pixels; smaller objects are removed from every output that shows objects, the
            mask included. 0 removes none from the mask.
        exclude_edges: remove objects that touch the edge of the image in the same way.
        pixel_size: in micrometres; None is what the file says.
        background: red, green and blue behind a cutout, 0..255; None is transparent.
        format: of the outputs that are pictures.
        name: of the image's file, if `needs_name`. Other options are those of many images, and
            what is known about them is kept.
    """

    outputs: tuple[Output, ...] = (Output.MASK,)
    threshold: float | None = None
    page: int | None = None
    channel: int | None = None
    percentiles: tuple[float, float] | None = None
    min_area: int = 0
    exclude_edges: bool = False
    pixel_size: float | None = None
    background: tuple[int, int, int] | None = None
    format: FileFormat = FileFormat.PNG
    name: str = ""

    @cached_property
    def needs_image(self) -> bool:
        """Whether an output shows or measures the pixels of the image."""
        return any(output.needs_image for output in self.outputs)

    @cached_property
    def needs_full_probabilities(self) -> bool:
        """Whether an output needs the probabilities at the size of the image."""
        needed = any(output.needs_full_probabilities for output in self.outputs)
        return needed or self.needs_objects

    @cached_property
    def needs_objects(self) -> bool:
        """Whether touching objects have to be separated."""
        return self.removes_objects or any(output.needs_objects for output in self.outputs)

    @property
    def needs_name(self) -> bool:
        """Whether an output states the name of the file."""
        return Output.COCO in self.outputs

    @property
    def removes_objects(self) -> bool:
        """Whether objects may have to be removed from the mask."""
        return self.min_area > 0 or self.exclude_edges

    def file_type(self, output: Output) -> tuple[str, str]:
        """Return the media type of an output's file, and the suffix of its name."""
        return _DOCUMENT_TYPES.get(output) or _PICTURE_TYPES[self.format]

    def file_endings(self) -> dict[Output, str]:
        """Return how the names of the files of one image end: see `distinguish_files`."""
        return distinguish_files({output: self.file_type(output)[1] for output in self.outputs})

    def check(self, preprocess: PreprocessConfig) -> None:
        """Check that a model can do what is asked for.

        Raises:
            InvalidRequest: a value is out of range, options do not fit together, or the model does
                not have such an output or does not use a threshold or percentiles.
        """
        self.check_values()
        self._check_model(preprocess)

    def check_values(self) -> None:
        """Check what does not depend on the model.

        Raises:
            InvalidRequest: a value is out of range, or options do not fit together.
        """
        self._check_ranges()
        self._check_format()

    def _check_ranges(self) -> None:
        if self.min_area < 0:
            raise InvalidRequest(f"min_area={self.min_area} must be at least 0 pixels")
        size = self.pixel_size
        if size is not None and not (math.isfinite(size) and size > 0):
            raise InvalidRequest(f"pixel_size={size:g} must be more than 0 micrometres")
        if self.percentiles is not None:
            low, high = self.percentiles
            if not 0 <= low < high <= 100:
                raise InvalidRequest(
                    f"percentiles={low:g},{high:g} must be LOW,HIGH with 0 <= LOW < HIGH <= 100"
                )
        if self.background is not None and Output.CUTOUT not in self.outputs:
            color = bytes(self.background).hex()
            raise InvalidRequest(f"background={color} is only available with output=cutout")

    def _check_format(self) -> None:
        lossless = [output for output in self.outputs if output.is_picture and output not in _LOSSY]
        if self.format is FileFormat.WEBP and lossless:
            raise InvalidRequest(
                f"format=webp is only available for {', '.join(_LOSSY)}, not for "
                f"{', '.join(lossless)}; use format=png or format=tiff"
            )
        if self.format is not FileFormat.PNG and not any(each.is_picture for each in self.outputs):
            raise InvalidRequest(
                f"format={self.format} is only available for pictures, not for "
                f"{', '.join(self.outputs)}"
            )

    def _check_model(self, preprocess: PreprocessConfig) -> None:
        if self.percentiles is not None and preprocess.intensity != "percentile":
            low, high = self.percentiles
            raise InvalidRequest(
                f"percentiles={low:g},{high:g} is only available for models that spread an image's "
                "contrast; this model uses the full range of values"
            )
        if preprocess.binary:
            return
        classes = len(preprocess.classes)
        if Output.INSTANCES in self.outputs:
            raise InvalidRequest(
                f"output=instances is only available for binary models; this model has {classes} "
                "classes"
            )
        if self.threshold is not None:
            raise InvalidRequest(
                f"threshold={self.threshold:g} is only available for binary models; this model has "
                f"{classes} classes and picks the most probable one"
            )


def distinguish_files(suffixes: Mapping[Output, str]) -> dict[Output, str]:
    """Return how the names of the files of one image end.

    Args:
        suffixes: of each output's file.

    Returns:
        The suffix, with the name of the output before it where several have the same.
    """
    counts = Counter(suffixes.values())
    return {
        output: suffix if counts[suffix] == 1 else f"-{output}{suffix}"
        for output, suffix in suffixes.items()
    }


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One output of one image, as the bytes of a file.

    Attributes:
        content: of the file.
        media_type: of the content, for example `image/png`.
        suffix: of the file's name, for example `.png`.
    """

    content: bytes
    media_type: str
    suffix: str


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The result for one image.

    Attributes:
        rendered: every output that was asked for.
        width, height: of the upright image, in pixels.
        coverage: fraction of the pixels that are not background.
        confidence: mean over the pixels of the probability of the class in the mask.
        objects: number of objects, if an output separates them.
        pages: of the file, or frames of the animation, that the image is from.
        seconds: by stage.
    """

    rendered: Mapping[Output, Rendered]
    width: int
    height: int
    coverage: float
    confidence: float
    objects: int | None = None
    pages: int = 1
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all outputs."""
        return sum(len(each.content) for each in self.rendered.values())
