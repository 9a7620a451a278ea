"""Measure the int8 calibration of a checkpoint, and the accuracy that int8 costs, on real engines.

Knows data sets and engines; no command line and no HTTP.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from app.engine.predictor import engine_predictor
from app.engine.quantize import Ranges
from app.engine.selection import build_engine, choose_engines
from model.arrays import AnyArray, ByteArray
from model.checkpoint import Checkpoint
from model.config import Calibration, GraphConfig
from model.evaluation.metrics import Overlap
from model.training.data import PairedDataset
from model.transforms import to_mask


def calibrate(
    checkpoint: Checkpoint, training: PairedDataset, validation: PairedDataset, images: int = 40
) -> Calibration:
    """Measure the ranges of activations on training images, and compare int8 with fp32.

    The comparison uses the validation images and the golden image. Images where both masks are
    empty do not count: they show no difference whatever int8 does.

    Args:
        images: number of training images, the same from each source.

    Returns:
        The ranges and, if any validation image counts, the figures of the comparison.

    Raises:
        CheckpointError: the network is an ONNX graph that cannot be quantized.
    """
    ranges = _measure_ranges(checkpoint, training.spread_sources(images))
    draft = dataclasses.replace(checkpoint, calibration=Calibration(ranges))
    predict_fp32, predict_int8 = _mask_predictor(draft, "fp32"), _mask_predictor(draft, "int8")
    ious, losses = [], []
    indices = range(len(validation))
    for index in tqdm(indices, "validation", unit="image", disable=not sys.stderr.isatty()):
        sample = validation[index]
        masks = predict_fp32(sample.image), predict_int8(sample.image)
        if not any(mask.any() for mask in masks):
            continue
        ious.append(_iou(*masks, checkpoint))
        fp32_dice, int8_dice = (_dice(mask, sample.labels, checkpoint) for mask in masks)
        losses.append(fp32_dice - int8_dice)
    if not ious:
        return Calibration(ranges)
    golden = predict_int8(checkpoint.golden.image)
    return Calibration(
        ranges,
        images=len(ious),
        iou=round(float(np.mean(ious)), 5),
        dice_loss=round(float(np.mean(losses)), 5),
        golden_iou=round(Overlap.of_classes(golden, checkpoint.golden.mask).iou, 5),
    )


def _measure_ranges(checkpoint: Checkpoint, training: PairedDataset) -> Ranges:
    if isinstance(checkpoint.architecture, GraphConfig):
        from app.engine.graph_ranges import measure_graph_ranges

        return measure_graph_ranges(checkpoint, (sample.image for sample in training))
    from model.convert.calibration import measure_ranges
    from model.predict import Predictor

    progress = tqdm(training, "ranges", unit="image", disable=not sys.stderr.isatty())
    return measure_ranges(Predictor.of(checkpoint), (sample.image for sample in progress))


def _mask_predictor(checkpoint: Checkpoint, precision: str) -> Callable[[AnyArray], ByteArray]:
    (choice,) = choose_engines(device="cpu", engine="openvino", precision=precision)
    predict = engine_predictor(build_engine(choice, checkpoint), checkpoint)
    return lambda image: to_mask(predict(image), checkpoint.preprocess)


def _iou(mask: AnyArray, other: AnyArray, checkpoint: Checkpoint) -> float:
    """Mean IoU of two masks over the classes that either of them contains."""
    values = [v for v in _foreground_values(checkpoint) if (mask == v).any() or (other == v).any()]
    return float(np.mean([Overlap.of(mask == v, other == v).iou for v in values]))


def _dice(mask: AnyArray, labels: AnyArray, checkpoint: Checkpoint) -> float:
    """Dice of a mask with the labels; for several classes the mean of all but the background."""
    if checkpoint.preprocess.binary:
        return Overlap.of(mask > 0, labels > 0).dice
    values = _foreground_values(checkpoint)
    return float(np.mean([Overlap.of(mask == v, labels == v).dice for v in values]))


def _foreground_values(checkpoint: Checkpoint) -> list[int]:
    """The values of a mask that are not background."""
    preprocess = checkpoint.preprocess
    return [255] if preprocess.binary else list(range(1, len(preprocess.classes)))
