"""Images for people: predictions compared with the labels, and training curves.

Knows arrays, scores and Pillow; no network, no run folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from model.arrays import AnyArray
from model.config import PreprocessConfig
from model.evaluation.evaluate import Predict, Report, Sample
from model.transforms import prepare

_HIT, _MISSED, _EXTRA = (60, 190, 90), (60, 120, 255), (240, 70, 70)
_SIDE = 256
"""The longer side of each half of a comparison, in pixels."""
_COLUMNS, _GAP, _CAPTION = 2, 8, 16
"""A contact sheet's columns, the pixels between its images, and the height of a caption."""


def draw_comparison(image: AnyArray, true: AnyArray, predicted: AnyArray) -> Image.Image:
    """Draw an image, and beside it the image with hits green, misses blue and extra pixels red.

    Args:
        image: decoded, (H, W) or (H, W, 3), uint8 or uint16.
        true: (H, W); everything that is not 0 is foreground.
        predicted: the same.

    Returns:
        Two halves side by side; the longer side of a half has 256 pixels.
    """
    shown = prepare(image, PreprocessConfig(intensity="percentile"))
    tinted = shown.astype(np.float32) * 0.5
    a, b = true > 0, predicted > 0
    for where, colour in ((a & b, _HIT), (a & ~b, _MISSED), (b & ~a, _EXTRA)):
        tinted[where] += 0.5 * np.array(colour, np.float32)
    both = Image.fromarray(np.hstack([shown, tinted.astype(np.uint8)]))
    scale = _SIDE / max(shown.shape[:2])
    return both.resize((max(1, round(both.width * scale)), max(1, round(both.height * scale))))


def make_contact_sheet(entries: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Arrange captioned images in a grid.

    Args:
        entries: caption and image, at least one.
    """
    width = max(image.width for _, image in entries)
    height = max(image.height for _, image in entries) + _CAPTION
    rows = -(-len(entries) // _COLUMNS)
    size = _COLUMNS * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP
    sheet = Image.new("RGB", size, (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    for index, (caption, image) in enumerate(entries):
        x = _GAP + index % _COLUMNS * (width + _GAP)
        y = _GAP + index // _COLUMNS * (height + _GAP)
        draw.text((x, y), caption, fill=(220, 220, 225))
        sheet.paste(image, (x, y + _CAPTION))
    return sheet


def make_worst_sheet(report: Report, predict: Predict, dataset: Sequence[Sample]) -> Image.Image:
    """Arrange comparisons of the images with the lowest Dice in a contact sheet.

    Args:
        report: of `model.evaluation.evaluate.evaluate` on `dataset`, in the same order.
        predict: decoded image -> `PredictedMasks`.
    """
    positions = {score.id: index for index, score in enumerate(report.images)}
    entries = []
    for score in report.worst():
        sample = dataset[positions[score.id]]
        image = draw_comparison(sample.image, sample.labels, predict(sample.image).mask)
        entries.append((f"{score.id}  Dice {score.dice:.3f}", image))
    return make_contact_sheet(entries)


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot training loss, validation Dice and validation IoU over the steps.

    Args:
        records: lines of a run's metrics.jsonl.
        path: of the PNG to write.

    Raises:
        ImportError: matplotlib (the extra `train`) is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    losses = [record for record in records if "loss" in record]
    scores = [record for record in records if "dice" in record]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in losses], [r["loss"] for r in losses], color="#c2410c")
    left.set(xlabel="step", ylabel="training loss (running mean)", yscale="log")
    for name, colour in (("dice", "#1d4ed8"), ("iou", "#15803d")):
        right.plot(
            [r["step"] for r in scores], [r[name] for r in scores], "o-", color=colour, label=name
        )
    right.set(xlabel="step", ylabel="validation, mean over images")
    if scores:
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
