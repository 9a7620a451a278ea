"""Measure a model on a data set, whatever computes its masks.

`evaluate(predict, dataset)` takes any function from a decoded image to a `PredictedMasks`. The same
code measures the reference network, an engine and a running service. Knows no torch, no HTTP.
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
    """An image with its labels, decoded.

    Attributes:
        id: name of the image.
        image: (H, W) or (H, W, 3), uint8 or uint16.
        labels: (H, W) int32: 0 and 1, class indices, or instances (0, then one value per object).
    """

    id: str
    image: AnyArray
    labels: Int32Array


@dataclasses.dataclass(frozen=True)
class PredictedMasks:
    """A predictor's result for an image.

    Attributes:
        mask: (H, W) uint8. Binary models: everything that is not 0 is foreground. Others: class
            indices.
        instances: (H, W), one value per object; None if objects are not separated.
    """

    mask: ByteArray
    instances: AnyArray | None = None


Predict = Callable[[AnyArray], PredictedMasks]
"""Decoded image -> prediction."""


def from_probabilities(
    function: Callable[[AnyArray], FloatArray],
    preprocess: PreprocessConfig,
    *,
    instances: bool = False,
) -> Predict:
    """Create a predictor from a function that computes probabilities.

    Args:
        function: decoded image -> probabilities (C, H, W), such as `model.predict.Predictor`.
        preprocess: of the model.
        instances: separate objects as well.
    """

    def predict(image: AnyArray) -> PredictedMasks:
        probabilities = function(image)
        labels = label_instances(probabilities, preprocess.threshold) if instances else None
        return PredictedMasks(to_mask(probabilities, preprocess), labels)

    return predict


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """The scores of one image.

    Attributes:
        id: of the sample.
        overlaps: of each class except the background.
        boundary_f1: of the foreground's contours.
        matches: of the objects, or None if they were not compared.
    """

    id: str
    overlaps: tuple[Overlap, ...]
    boundary_f1: float
    matches: Matches | None = None

    @property
    def dice(self) -> float:
        """Mean Dice of the classes."""
        return float(np.mean([overlap.dice for overlap in self.overlaps]))

    @property
    def iou(self) -> float:
        """Mean IoU of the classes."""
        return float(np.mean([overlap.iou for overlap in self.overlaps]))

    def to_json(self) -> dict[str, Any]:
        """Return all scores of the image."""
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
    """The scores of all images of a data set."""

    images: tuple[ImageScore, ...]

    def summary(self) -> dict[str, Any]:
        """Return means over the images, and pooled scores.

        Pooled scores count all pixels, or all objects, of the data set together.
        """
        pooled = [
            sum(overlaps, start=Overlap())
            for overlaps in zip(*(score.overlaps for score in self.images), strict=True)
        ]
        record: dict[str, Any] = {
            "images": len(self.images),
            "dice": _average(score.dice for score in self.images),
            "iou": _average(score.iou for score in self.images),
            "pooled_dice": _average(overlap.dice for overlap in pooled),
            "pooled_iou": _average(overlap.iou for overlap in pooled),
            "boundary_f1": _average(score.boundary_f1 for score in self.images),
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
                "mean_f1_50": _average(match.f1 for match in matches),
                "mean_ap_50": _average(match.precisions[0] for match in matches),
                "found": total.found,
                "true": total.true,
            }
        return record

    def to_json(self) -> dict[str, Any]:
        """Return the summary and the scores of each image."""
        return {"summary": self.summary(), "images": [score.to_json() for score in self.images]}

    def table(self) -> str:
        """Format the summary for a terminal, one line per score."""
        lines = []
        for name, value in self.summary().items():
            if isinstance(value, dict):
                text = "  ".join(f"{key}: {each:.3f}" for key, each in value.items())
            elif isinstance(value, list):
                text = "  ".join(f"{each:.4f}" for each in value)
            else:
                text = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(f"{name:14} {text}")
        return "\n".join(lines)

    def worst(self, count: int = 10) -> list[ImageScore]:
        """Return the images with the lowest Dice, lowest first."""
        return sorted(self.images, key=lambda score: score.dice)[:count]


def evaluate(
    predict: Predict,
    dataset: Iterable[Sample],
    *,
    classes: int = 2,
    instances: bool = False,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]] = lambda samples: samples,
) -> Report:
    """Measure a predictor on a data set.

    Args:
        predict: decoded image -> `PredictedMasks`.
        dataset: samples, read one at a time.
        classes: number of classes, including the background. 2 compares everything that is not 0.
        instances: labels have one value per object, and objects are compared too.
        progress: wraps the samples, such as a progress bar.

    Raises:
        ValueError: the data set is empty, or a mask has another size than its image.
    """
    scores = tuple(
        score_image(sample, predict(sample.image), classes=classes, instances=instances)
        for sample in progress(dataset)
    )
    if not scores:
        raise ValueError("the data set is empty")
    return Report(scores)


def score_image(
    sample: Sample, prediction: PredictedMasks, *, classes: int = 2, instances: bool = False
) -> ImageScore:
    """Compare a prediction with the labels.

    Args:
        classes: as for `evaluate`.
        instances: compare objects too, if the prediction separates them.

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


def _average(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
