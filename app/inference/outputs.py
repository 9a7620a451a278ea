"""What a client may ask for, and how it is made of an image's probabilities.

Knows no windows, no queue and no HTTP: arrays in, an encoded answer out.
"""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from typing import Any

import numpy as np

from app.imaging.png import encode_grey16, encode_labels, encode_mask, encode_rgb, encode_rgba
from app.imaging.render import cutout, overlay
from model.arrays import AnyArray, ByteArray, FloatArray
from model.config import PreprocessConfig


class Output(StrEnum):
    """What a client may ask for."""

    MASK = "mask"
    PROBABILITY = "probability"
    INSTANCES = "instances"
    OVERLAY = "overlay"
    CUTOUT = "cutout"
    POLYGONS = "polygons"

    @property
    def needs_image(self) -> bool:
        return self in (Output.OVERLAY, Output.CUTOUT)

    @property
    def needs_full_probabilities(self) -> bool:
        """They are needed at the size of the image."""
        return self not in (Output.MASK, Output.OVERLAY)

    @property
    def needs_instances(self) -> bool:
        return self in (Output.INSTANCES, Output.POLYGONS)


@dataclasses.dataclass(frozen=True)
class Options:
    """How the mask is made of the probabilities; None is the model's own threshold."""

    output: Output = Output.MASK
    threshold: float | None = None


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The answer for one image.

    Attributes:
        png: the encoded output, of the upright image's size; empty for polygons.
        width, height: of it, in pixels.
        coverage: fraction of the pixels that are not background.
        confidence: mean over the pixels of the probability of what was decided.
        objects: how many there are, if instances or polygons were asked for.
        polygons: the text of a GeoJSON FeatureCollection, if it was asked for.
        seconds: by stage, what went before included.
    """

    png: bytes
    width: int
    height: int
    coverage: float
    confidence: float
    objects: int | None = None
    polygons: str | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the output."""
        return len(self.png) + len(self.polygons or "")


def render(
    probabilities: FloatArray,
    mask: ByteArray,
    confidence: float,
    shown: AnyArray | None,
    preprocess: PreprocessConfig,
    options: Options,
) -> Segmentation:
    """The encoded answer.

    Args:
        probabilities: (C, H, W) of the upright image, where the output shows them. Of one class the
            first alone will do where objects are not told apart.
        mask: (H, W), made of them by `model.transforms.mask_and_confidence`.
        confidence: in the mask, by the same.
        shown: the decoded image, where the output shows it.
        preprocess: of the model.
    """

    def foreground() -> FloatArray:
        first: FloatArray = probabilities[0]
        return first if preprocess.binary else 1 - first

    threshold = preprocess.threshold if options.threshold is None else options.threshold
    objects, png, polygons = None, b"", None
    match options.output:
        case Output.MASK if preprocess.binary:
            png = encode_mask(mask)
        case Output.MASK:
            png = encode_labels(mask, preprocess.palette)
        case Output.PROBABILITY:
            png = encode_grey16(np.rint(foreground() * 65535).astype(np.uint16))
        case Output.INSTANCES:
            from model.instances import label_instances

            labels = label_instances(probabilities, threshold)
            objects = int(labels.max())
            png = encode_grey16(labels)
        case Output.OVERLAY:
            assert shown is not None
            png = encode_rgb(overlay(shown, mask))
        case Output.CUTOUT:
            assert shown is not None
            png = encode_rgba(cutout(shown, foreground()))
        case Output.POLYGONS:
            features = _outline(probabilities, mask, preprocess, threshold)
            objects = len(features)
            polygons = json.dumps({"type": "FeatureCollection", "features": features})
    return Segmentation(
        png,
        width=mask.shape[1],
        height=mask.shape[0],
        coverage=np.count_nonzero(mask) / mask.size,
        confidence=confidence,
        objects=objects,
        polygons=polygons,
    )


def preload_instance_modules() -> None:
    """Import what tells objects apart. SciPy takes a third of a second, for which no start should
    wait and no request: a service does it once it is ready."""
    import model.instances
    import model.polygons  # noqa: F401


def _outline(
    probabilities: FloatArray, mask: ByteArray, preprocess: PreprocessConfig, threshold: float
) -> list[dict[str, Any]]:
    """Binary models: an outline for each object; others: for each connected part of a class."""
    from model.instances import label_instances
    from model.polygons import label_components, to_features

    names = preprocess.classes
    if preprocess.binary:
        return to_features(label_instances(probabilities, threshold), probabilities[0], names[1])
    return [
        feature
        for index, name in enumerate(names[1:], start=1)
        for feature in to_features(label_components(mask == index), probabilities[index], name)
    ]
