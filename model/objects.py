"""Probabilities and a mask -> the objects of an image. Knows NumPy and SciPy; no file formats."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from model.arrays import ByteArray, FloatArray, Int32Array, Int64Array
from model.config import PreprocessConfig
from model.instances import MIN_PIXELS, find_objects, separate_parts
from model.labels import label_components, renumber, sum_by_label, touches_edge


@dataclasses.dataclass(frozen=True)
class Objects:
    """All objects of an image.

    Attributes:
        labels: (H, W), 0 is background, 1..n are the objects.
        classes: (n,) index of each object's class.
        areas: (n,) in pixels.
        scores: (n,) mean probability of that class over the object's pixels.
    """

    labels: Int32Array
    classes: ByteArray
    areas: Int64Array
    scores: FloatArray

    @property
    def count(self) -> int:
        """The number of objects."""
        return len(self.classes)


def select_objects(
    probabilities: FloatArray,
    mask: ByteArray,
    preprocess: PreprocessConfig,
    threshold: float,
    *,
    min_area: int = 0,
    exclude_edges: bool = False,
) -> tuple[Objects, ByteArray]:
    """Find the objects of an image, and remove those from its mask that are not wanted.

    Binary models: objects that touch are separated, and uncertain ones stay in the mask alone.
    Others: the connected parts of each class.

    Args:
        probabilities: (C, H, W), all channels of the model.
        mask: (H, W) of these probabilities.
        threshold: that the mask was made with; binary models only.
        min_area: in pixels; smaller objects are removed. 0 removes none from the mask, and those
            below `MIN_PIXELS` from the objects of a binary model.
        exclude_edges: remove objects that touch the edge of the image.

    Returns:
        The objects, and the mask without the parts that were removed.
    """
    if preprocess.binary:
        parts, count = separate_parts(probabilities, threshold)
        classes = np.ones(count + 1, np.uint8)
    else:
        parts, classes = _label_classes(mask, len(preprocess.classes))
        count = len(classes) - 1
    areas = sum_by_label(parts, count)
    removed = areas < min_area
    if exclude_edges:
        removed |= touches_edge(parts, count)
    removed[0] = False
    if removed.any():
        mask = np.where(removed[parts], np.uint8(0), mask)
    keep = ~removed
    if preprocess.binary:
        least = min_area or MIN_PIXELS
        keep &= find_objects(parts, count, probabilities[0], threshold, least)
    keep[0] = False
    labels, classes, areas = renumber(parts, keep), classes[keep], areas[keep]
    del parts
    # A binary model has the foreground in its first channel, the others have the background there.
    channels = classes - 1 if preprocess.binary else classes
    scores = (_sum_channels(labels, channels, probabilities) / areas).astype(np.float32)
    return Objects(labels, classes, areas, scores), mask


def _label_classes(mask: ByteArray, classes: int) -> tuple[Int32Array, ByteArray]:
    """Label the 8-connected components of each class, one class after the other.

    Returns:
        The label map, and the class of each label, with that of the background first.
    """
    labels = np.zeros(mask.shape, np.int32)
    counts = [1]
    for index in range(1, classes):
        components, count = label_components(mask == index)
        np.add(labels, components + (sum(counts) - 1), out=labels, where=components > 0)
        counts.append(count)
    return labels, np.repeat(np.arange(classes, dtype=np.uint8), counts)


def _sum_channels(
    labels: Int32Array, channels: ByteArray, probabilities: FloatArray
) -> npt.NDArray[np.float64]:
    """Sum one channel of the probabilities, which differs by object, over each object."""
    sums = np.zeros(len(channels))
    for channel in np.unique(channels):
        of_channel = channels == channel
        by_label = sum_by_label(labels, len(channels), probabilities[channel])
        sums[of_channel] = by_label[1:][of_channel]
    return sums
