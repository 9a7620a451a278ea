"""The outputs a client can ask for, and how each is rendered from an image's probabilities.

Knows arrays and file formats; no windows, no queue and no HTTP.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from app.imaging.png import encode_grey16, encode_labels, encode_mask, encode_rgb, encode_rgba
from app.imaging.render import cutout, overlay
from model.arrays import AnyArray, ByteArray, FloatArray, UInt16Array
from model.config import PreprocessConfig

PNG = "image/png"
GEOJSON = "application/geo+json"


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
    def needs_image(self) -> bool:
        """Whether it shows the pixels of the image."""
        return self in (Output.OVERLAY, Output.CUTOUT)

    @property
    def needs_full_probabilities(self) -> bool:
        """Whether it needs the probabilities at the size of the image."""
        return self not in (Output.MASK, Output.OVERLAY)

    @property
    def needs_instances(self) -> bool:
        """Whether it needs touching objects separated."""
        return self in (Output.INSTANCES, Output.POLYGONS)


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
        min_area: in pixels; smaller objects are removed.
        exclude_edges: remove objects that touch the edge of the image.
        pixel_size: in micrometres; None is what the file says.
        background: red, green and blue behind a cutout, 0..255; None is transparent.
        format: of the outputs that are pictures.
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

    @property
    def needs_image(self) -> bool:
        """Whether an output shows the pixels of the image."""
        return any(output.needs_image for output in self.outputs)

    @property
    def needs_full_probabilities(self) -> bool:
        """Whether an output needs the probabilities at the size of the image."""
        return any(output.needs_full_probabilities for output in self.outputs)

    @property
    def needs_instances(self) -> bool:
        """Whether an output needs touching objects separated."""
        return any(output.needs_instances for output in self.outputs)


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


@dataclasses.dataclass(frozen=True)
class Decision:
    """The model's result for one image, from which every output is made.

    Attributes:
        probabilities: (C, H, W) of the upright image if an output needs full probabilities, else
            of any size. For a binary model the first channel is enough, unless an output needs
            instances.
        mask: (H, W) uint8 and
        confidence: in it, both from `model.transforms.mask_and_confidence`.
        threshold: that the mask was made with.
        preprocess: of the model.
        image: the decoded image, if an output needs it.
    """

    probabilities: FloatArray
    mask: ByteArray
    confidence: float
    threshold: float
    preprocess: PreprocessConfig
    image: AnyArray | None = None

    @cached_property
    def foreground(self) -> FloatArray:
        """(H, W) probability of not being background."""
        first: FloatArray = self.probabilities[0]
        return first if self.preprocess.binary else 1 - first

    @cached_property
    def instances(self) -> UInt16Array:
        """(H, W) labels of the objects; binary models only."""
        from model.instances import label_instances

        return label_instances(self.probabilities, self.threshold)

    @cached_property
    def features(self) -> list[dict[str, Any]]:
        """GeoJSON features: one per object for binary models, else one per connected part of each
        class."""
        from model.polygons import label_components, to_features

        names = self.preprocess.classes
        if self.preprocess.binary:
            return to_features(self.instances, self.probabilities[0], names[1])
        return [
            feature
            for index, name in enumerate(names[1:], start=1)
            for feature in to_features(
                label_components(self.mask == index), self.probabilities[index], name
            )
        ]

    def count_objects(self) -> int:
        """The number of objects that the outputs separate."""
        return int(self.instances.max()) if self.preprocess.binary else len(self.features)


def render(decision: Decision, options: Options) -> Segmentation:
    """Render every output of `options`; `seconds` is left empty."""
    rendered = {output: render_output(decision, output) for output in options.outputs}
    mask = decision.mask
    return Segmentation(
        rendered,
        width=mask.shape[1],
        height=mask.shape[0],
        coverage=np.count_nonzero(mask) / mask.size,
        confidence=decision.confidence,
        objects=decision.count_objects() if options.needs_instances else None,
    )


def render_output(decision: Decision, output: Output) -> Rendered:
    """Render one output."""
    match output:
        case Output.MASK:
            return _render_mask(decision)
        case Output.PROBABILITY:
            return _render_probability(decision)
        case Output.INSTANCES:
            return _render_instances(decision)
        case Output.OVERLAY:
            return _render_overlay(decision)
        case Output.CUTOUT:
            return _render_cutout(decision)
        case Output.POLYGONS:
            return _render_polygons(decision)
        case _:
            raise NotImplementedError(output)


def preload_instance_modules() -> None:
    """Import the modules that separate and outline objects.

    SciPy takes a third of a second to import. A service does it once it is ready, so that neither
    its start nor its first request waits for that.
    """
    import model.instances
    import model.polygons  # noqa: F401


def _render_mask(decision: Decision) -> Rendered:
    preprocess = decision.preprocess
    if preprocess.binary:
        return Rendered(encode_mask(decision.mask), PNG, ".png")
    return Rendered(encode_labels(decision.mask, preprocess.palette), PNG, ".png")


def _render_probability(decision: Decision) -> Rendered:
    grey = np.rint(decision.foreground * 65535).astype(np.uint16)
    return Rendered(encode_grey16(grey), PNG, ".png")


def _render_instances(decision: Decision) -> Rendered:
    return Rendered(encode_grey16(decision.instances), PNG, ".png")


def _render_overlay(decision: Decision) -> Rendered:
    assert decision.image is not None
    return Rendered(encode_rgb(overlay(decision.image, decision.mask)), PNG, ".png")


def _render_cutout(decision: Decision) -> Rendered:
    assert decision.image is not None
    return Rendered(encode_rgba(cutout(decision.image, decision.foreground)), PNG, ".png")


def _render_polygons(decision: Decision) -> Rendered:
    collection = {"type": "FeatureCollection", "features": decision.features}
    return Rendered(json.dumps(collection).encode(), GEOJSON, ".geojson")
