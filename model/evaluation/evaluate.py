"""How good a model is on a data set, whoever computes the masks.

`evaluate(predict, dataset)` takes any function from a decoded image to a `Prediction`, so the same
code measures the network, an engine, and a running service. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from model.arrays import AnyArray, ByteArray, FloatArray, Int32Array
from model.config import PreprocessConfig
from model.evaluation.boundary import boundary_f1
from model.evaluation.metrics import THRESHOLDS, Matches, Overlap
from model.instances import label_instances
from model.transforms import to_mask


@dataclasses.dataclass(frozen=True)
class Sample:
    """A decoded pair.

    Attributes:
        image: (H, W) or (H, W, 3), uint8 or uint16.
        labels: (H, W) int32: 0 and 1, class indices, or instance labels (0, then one an object).
    """

    id: str
    image: AnyArray
    labels: Int32Array


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a predictor says of one image.

    Attributes:
        mask: (H, W) uint8; binary: not 0 is foreground; else class indices.
        instances: (H, W) labels, one an object; None if it does not tell objects apart.
    """

    mask: ByteArray
    instances: AnyArray | None = None


Predict = Callable[[AnyArray], Prediction]


def from_probabilities(
    function: Callable[[AnyArray], FloatArray],
    preprocess: PreprocessConfig,
    *,
    instances: bool = False,
) -> Predict:
    """A predictor from what gives (C, H, W) probabilities, `model.predict.Predictor` for one."""

    def predict(image: AnyArray) -> Prediction:
        probabilities = function(image)
        labels = label_instances(probabilities, preprocess.threshold) if instances else None
        return Prediction(to_mask(probabilities, preprocess), labels)

    return predict


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """One image: the overlap of each class but the background, contours, objects."""

    id: str
    overlaps: tuple[Overlap, ...]
    boundary_f1: float
    matches: Matches | None = None

    @property
    def dice(self) -> float:
        """The mean over the classes."""
        return float(np.mean([overlap.dice for overlap in self.overlaps]))

    @property
    def iou(self) -> float:
        return float(np.mean([overlap.iou for overlap in self.overlaps]))

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "id": self.id,
            "dice": self.dice,
            "iou": self.iou,
            "boundary_f1": self.boundary_f1,
        }
        if self.matches is not None:
            record |= {
                "f1_50": self.matches.f1,
                "ap_50": self.matches.precisions[0],
                "ap": self.matches.average_precision,
                "found": self.matches.found,
                "true": self.matches.true,
            }
        return record


@dataclasses.dataclass(frozen=True)
class Report:
    """All images of a data set."""

    images: tuple[ImageScore, ...]

    def summary(self) -> dict[str, Any]:
        """Means over the images, and pooled figures (all pixels, all objects, in one count)."""
        pooled = [
            sum(overlaps, start=Overlap())
            for overlaps in zip(*(score.overlaps for score in self.images), strict=True)
        ]
        record: dict[str, Any] = {
            "images": len(self.images),
            "dice": _mean(score.dice for score in self.images),
            "iou": _mean(score.iou for score in self.images),
            "pooled_dice": _mean(overlap.dice for overlap in pooled),
            "pooled_iou": _mean(overlap.iou for overlap in pooled),
            "boundary_f1": _mean(score.boundary_f1 for score in self.images),
        }
        if len(pooled) > 1:
            record["dice_by_class"] = [overlap.dice for overlap in pooled]
        matches = [score.matches for score in self.images if score.matches is not None]
        if matches:
            total = sum(matches, start=Matches())
            record |= {
                "f1_50": total.f1,
                "ap_50": total.precisions[0],
                "ap": total.average_precision,
                "ap_by_iou": dict(zip(map(str, THRESHOLDS), total.precisions, strict=True)),
                "mean_f1_50": _mean(match.f1 for match in matches),
                "mean_ap_50": _mean(match.precisions[0] for match in matches),
                "found": total.found,
                "true": total.true,
            }
        return record

    def to_json(self) -> dict[str, Any]:
        return {"summary": self.summary(), "images": [score.to_json() for score in self.images]}

    def table(self) -> str:
        """For a terminal: the summary, a line each."""
        lines = []
        for name, value in self.summary().items():
            if isinstance(value, dict):
                shown = "  ".join(f"{key}: {each:.3f}" for key, each in value.items())
            elif isinstance(value, list):
                shown = "  ".join(f"{each:.4f}" for each in value)
            else:
                shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(f"{name:14} {shown}")
        return "\n".join(lines)

    def worst(self, count: int = 10) -> list[ImageScore]:
        return sorted(self.images, key=lambda score: score.dice)[:count]


def evaluate(
    predict: Predict,
    dataset: Iterable[Sample],
    *,
    classes: int = 2,
    instances: bool = False,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]] = lambda samples: samples,
) -> Report:
    """Measure a predictor.

    Args:
        predict: decoded image -> `Prediction`.
        dataset: samples with their true labels.
        classes: with the background; 2 compares what is not 0.
        instances: the labels are one value an object, and objects are compared as well.
        progress: wraps the samples, a progress bar for one.

    Raises:
        ValueError: nothing to measure, or a mask of another size than its image.
    """
    scores = tuple(
        score_image(sample, predict(sample.image), classes=classes, instances=instances)
        for sample in progress(dataset)
    )
    if not scores:
        raise ValueError("the data set is empty")
    return Report(scores)


def score_image(
    sample: Sample, prediction: Prediction, *, classes: int = 2, instances: bool = False
) -> ImageScore:
    """One image measured; of its objects only if the prediction tells them apart.

    Args:
        classes, instances: as for `evaluate`.

    Raises:
        ValueError: the mask has another size than the image.
    """
    mask, true = prediction.mask, sample.labels
    if classes == 2:
        overlaps = [Overlap.of(mask > 0, true > 0)]
    else:
        overlaps = [Overlap.of(mask == index, true == index) for index in range(1, classes)]
    matches = None
    if instances and prediction.instances is not None:
        matches = Matches.of(prediction.instances, true)
    return ImageScore(sample.id, tuple(overlaps), boundary_f1(mask > 0, true > 0), matches)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
