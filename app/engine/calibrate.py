"""The int8 calibration of a checkpoint, and what int8 costs: measured with the real engines.

Knows data sets and engines; no command line and no HTTP.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from app.engine.predictor import engine_predictor
from app.engine.selection import build_engine, choose_engines
from model.arrays import AnyArray, ByteArray
from model.checkpoint import Checkpoint
from model.config import Calibration
from model.evaluation.metrics import Overlap
from model.training.data import PairedDataset
from model.transforms import to_mask


def calibrate(
    checkpoint: Checkpoint, training: PairedDataset, validation: PairedDataset, images: int = 40
) -> Calibration:
    """Ranges from training images; what int8 costs from validation images and the golden one.

    Args:
        images: of the training set, evenly spread over it.
    """
    from model.convert.calibration import activation_ranges
    from model.predict import Predictor

    chosen = np.unique(np.linspace(0, len(training) - 1, images).astype(int))
    shown = tqdm(chosen, "ranges", unit="image", disable=not sys.stderr.isatty())
    ranges = activation_ranges(Predictor.of(checkpoint), (training[int(i)].image for i in shown))
    draft = dataclasses.replace(checkpoint, calibration=Calibration(ranges))
    exact, rounded = _masks_by(draft, "fp32"), _masks_by(draft, "int8")
    ious, losses = [], []
    unseen = range(len(validation))
    for index in tqdm(unseen, "proof", unit="image", disable=not sys.stderr.isatty()):
        sample = validation[index]
        masks = exact(sample.image), rounded(sample.image)
        if not any(mask.any() for mask in masks):
            continue  # that both see nothing is no proof
        ious.append(_iou(*masks, checkpoint))
        dice, other = (_dice(mask, sample.labels, checkpoint) for mask in masks)
        losses.append(dice - other)
    if not ious:
        return Calibration(ranges)
    golden = rounded(checkpoint.golden.image)
    return Calibration(
        ranges,
        images=len(ious),
        iou=round(float(np.mean(ious)), 5),
        dice_loss=round(float(np.mean(losses)), 5),
        golden_iou=round(Overlap.of_classes(golden, checkpoint.golden.mask).iou, 5),
    )


def _masks_by(checkpoint: Checkpoint, precision: str) -> Callable[[AnyArray], ByteArray]:
    (choice,) = choose_engines(device="cpu", engine="openvino", precision=precision)
    predict = engine_predictor(build_engine(choice, checkpoint), checkpoint)
    return lambda image: to_mask(predict(image), checkpoint.preprocess)


def _iou(mask: AnyArray, other: AnyArray, checkpoint: Checkpoint) -> float:
    classes = [c for c in _classes(checkpoint) if (mask == c).any() or (other == c).any()]
    return float(np.mean([Overlap.of(mask == c, other == c).iou for c in classes]))


def _dice(mask: AnyArray, labels: AnyArray, checkpoint: Checkpoint) -> float:
    if checkpoint.preprocess.binary:
        return Overlap.of(mask > 0, labels > 0).dice
    return float(np.mean([Overlap.of(mask == c, labels == c).dice for c in _classes(checkpoint)]))


def _classes(checkpoint: Checkpoint) -> list[int]:
    """The values of a mask that are not background."""
    preprocess = checkpoint.preprocess
    return [255] if preprocess.binary else list(range(1, len(preprocess.classes)))
