"""Measure a model on a data set, whatever computes its masks.

`evaluate(predict, dataset)` takes any function from a decoded image to a `PredictedMasks`. The same
code measures the reference network, an engine and a running service. Knows no torch, no HTTP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from model.arrays import AnyArray, BoolArray, ByteArray, FloatArray, Int32Array, Int64Array
from model.config import PreprocessConfig
from model.evaluation.boundary import boundary_f1
from model.evaluation.metrics import (
    THRESHOLDS,
    Matches,
    Overlap,
    count_classes,
    overlaps_of,
)
from model.instances import label_instances
from model.transforms import to_mask

BINARY = ("background", "foreground")
"""Names of the classes of a binary model."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image with its labels, decoded.

    Attributes:
        id: name of the image.
        image: (H, W) or (H, W, 3), uint8 or uint16.
        labels: (H, W) int32: 0 and 1, class indices, or instances (0, then one value per object);
            `VOID` where a pixel has no label.
        source: name of its source, if the data set has several.
        has_objects: the labels have one value per object, if those of the data set do.
    """

    id: str
    image: AnyArray
    labels: Int32Array
    source: str = ""
    has_objects: bool = True


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
        overlaps: of the foreground alone, or of each of several classes, the background included.
        boundaries: F1 of the contours of each of them; None where a class does not occur.
        matches: of the objects, or None if they were not compared.
        confusion: of several classes; see `count_classes`.
        source: of the sample.
    """

    id: str
    overlaps: tuple[Overlap, ...]
    boundaries: tuple[float | None, ...]
    matches: Matches | None = None
    confusion: Int64Array | None = dataclasses.field(default=None, compare=False)
    source: str = ""

    @property
    def dice(self) -> float:
        """Mean Dice of the classes that occur."""
        return _average(overlap.dice for overlap in _select_scored(self.overlaps))

    @property
    def iou(self) -> float:
        """Mean IoU of the classes that occur."""
        return _average(overlap.iou for overlap in _select_scored(self.overlaps))

    @property
    def boundary_f1(self) -> float:
        """Mean F1 of the contours of the classes that occur."""
        return _average(value for value in self.boundaries if value is not None)

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
    """The scores of all images of a data set.

    Attributes:
        images: of each.
        classes: names of the classes, the background included.
    """

    images: tuple[ImageScore, ...]
    classes: tuple[str, ...] = BINARY

    @property
    def confusion(self) -> Int64Array:
        """The confusion matrix of several classes: pixels, true classes in rows.

        Raises:
            ValueError: the model is binary.
        """
        counts = [score.confusion for score in self.images if score.confusion is not None]
        if not counts:
            raise ValueError("a binary model has no confusion matrix")
        total: Int64Array = np.sum(counts, axis=0)[:, : len(self.classes)]
        return total

    def summary(self) -> dict[str, Any]:
        """Return means over the images, and pooled scores.

        Pooled scores count all pixels, or all objects, of the data set together. A class that
        occurs neither in the labels nor in the masks has no score and is in no mean. If the images
        come from several sources, `by_source` has the same scores of each.
        """
        record = self._summarize_images()
        if len(sources := {score.source: None for score in self.images}) > 1:
            record["by_source"] = {
                name: self._select_source(name)._summarize_images() for name in sources
            }
        return record

    def _select_source(self, name: str) -> Report:
        return Report(tuple(s for s in self.images if s.source == name), self.classes)

    def _summarize_images(self) -> dict[str, Any]:
        pooled = [
            sum(overlaps, start=Overlap())
            for overlaps in zip(*(score.overlaps for score in self.images), strict=True)
        ]
        scored = _select_scored(pooled)
        record: dict[str, Any] = {"images": len(self.images)}
        if len(pooled) > 1:
            record["miou"] = _average(overlap.iou for overlap in scored)
            correct = sum(overlap.shared for overlap in pooled)
            record["pixel_accuracy"] = correct / max(1, sum(overlap.true for overlap in pooled))
        record |= {
            "dice": _average(score.dice for score in self.images),
            "iou": _average(score.iou for score in self.images),
            "pooled_dice": _average(overlap.dice for overlap in scored),
            "pooled_iou": _average(overlap.iou for overlap in scored),
            "boundary_f1": _average(score.boundary_f1 for score in self.images),
        }
        if len(pooled) > 1:
            record["by_class"] = {
                name: self._score_class(index, overlap)
                for index, (name, overlap) in enumerate(zip(self.classes, pooled, strict=True))
            }
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

    def _score_class(self, index: int, overlap: Overlap) -> dict[str, Any]:
        """Return the scores of a class over all images; None where it does not occur."""
        contours = [score.boundaries[index] for score in self.images]
        found = [value for value in contours if value is not None]
        return {
            "iou": overlap.iou if overlap.occurs else None,
            "dice": overlap.dice if overlap.occurs else None,
            "precision": overlap.shared / overlap.predicted if overlap.predicted else None,
            "recall": overlap.shared / overlap.true if overlap.true else None,
            "boundary_f1": _average(found) if found else None,
            "pixels": overlap.true,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the summary and the scores of each image."""
        return {"summary": self.summary(), "images": [score.to_json() for score in self.images]}

    def table(self) -> str:
        """Format the summary for a terminal, one line per score."""
        lines = []
        summary = self.summary()
        by_class, by_source = summary.pop("by_class", {}), summary.pop("by_source", {})
        for name, value in summary.items():
            if isinstance(value, dict):
                text = "  ".join(f"{key}: {each:.3f}" for key, each in value.items())
            else:
                text = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(f"{name:14} {text}")
        if by_class:
            lines += ["", *format_classes(by_class)]
        if by_source:
            lines += ["", *format_sources(by_source)]
        return "\n".join(lines)

    def worst(self, count: int = 10) -> list[ImageScore]:
        """Return the images with the lowest Dice, lowest first."""
        return sorted(self.images, key=lambda score: score.dice)[:count]


def evaluate(
    predict: Predict,
    dataset: Iterable[Sample],
    *,
    classes: Sequence[str] = BINARY,
    instances: bool = False,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]] = lambda samples: samples,
) -> Report:
    """Measure a predictor on a data set.

    Args:
        predict: decoded image -> `PredictedMasks`.
        dataset: samples, read one at a time.
        classes: names of the classes, including the background. Two names compare everything that
            is not 0.
        instances: labels have one value per object, and objects are compared too.
        progress: wraps the samples, such as a progress bar.

    Raises:
        ValueError: the data set is empty, or a mask has another size than its image.
    """
    scores = tuple(
        score_image(sample, predict(sample.image), classes=len(classes), instances=instances)
        for sample in progress(dataset)
    )
    if not scores:
        raise ValueError("the data set is empty")
    return Report(scores, tuple(classes))


def score_image(
    sample: Sample, prediction: PredictedMasks, *, classes: int = 2, instances: bool = False
) -> ImageScore:
    """Compare a prediction with the labels.

    Args:
        classes: their number, including the background.
        instances: compare objects too, if the prediction separates them.

    Raises:
        ValueError: the mask has another size than the image.
    """
    mask, true = prediction.mask, sample.labels
    valid = true >= 0
    every = None if valid.all() else valid
    matches = None
    if instances and sample.has_objects and prediction.instances is not None:
        matches = Matches.of(_clear(prediction.instances, every), _clear(true, every))
    if classes == 2:
        found, wanted = _clear(mask > 0, every), true > 0
        overlap = Overlap.of(found, wanted)
        boundaries = (boundary_f1(mask > 0, wanted, valid=every),)
        return ImageScore(sample.id, (overlap,), boundaries, matches, source=sample.source)
    confusion = count_classes(mask, true, classes)
    overlaps = overlaps_of(confusion)
    contours = tuple(
        boundary_f1(mask == index, true == index, valid=every) if overlap.occurs else None
        for index, overlap in enumerate(overlaps)
    )
    return ImageScore(sample.id, overlaps, contours, matches, confusion, sample.source)


def format_classes(by_class: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the scores of classes for a terminal, one line per class; absent ones have dashes."""
    width = max(len("class"), *map(len, by_class))
    columns = ("iou", "dice", "precision", "recall", "boundary_f1")
    lines = [f"{'class':{width}}" + "".join(f" {name:>11}" for name in (*columns, "pixels"))]
    for name, scores in by_class.items():
        values = [scores[column] for column in columns]
        texts = ["-" if value is None else f"{value:.4f}" for value in values]
        texts.append(str(scores["pixels"]))
        lines.append(f"{name:{width}}" + "".join(f" {text:>11}" for text in texts))
    return lines


def format_sources(by_source: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the scores of sources for a terminal, one line per source."""
    width = max(len("source"), *map(len, by_source))
    columns = ("dice", "iou", "pooled_dice", "boundary_f1", "f1_50", "ap_50")
    lines = [f"{'source':{width}} images" + "".join(f" {name:>11}" for name in columns)]
    for name, scores in by_source.items():
        texts = [f"{scores[key]:.4f}" if key in scores else "-" for key in columns]
        lines.append(
            f"{name:{width}} {scores['images']:6}" + "".join(f" {text:>11}" for text in texts)
        )
    return lines


def _select_scored(overlaps: Sequence[Overlap]) -> Sequence[Overlap]:
    """Leave out classes that do not occur; a single mask counts 1 if it is rightly empty."""
    if len(overlaps) == 1:
        return overlaps
    return [overlap for overlap in overlaps if overlap.occurs]


def _clear(labels: AnyArray, valid: BoolArray | None) -> AnyArray:
    """Set pixels without a label to background."""
    return labels if valid is None else np.where(valid, labels, 0)


def _average(values: Iterable[float]) -> float:
    """Return the mean; 1 without values, as for an image of which no pixel has a label."""
    found = list(values)
    return float(np.mean(found)) if found else 1.0
