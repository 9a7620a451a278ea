"""Images for people: predictions compared with the labels, and training curves.

Knows arrays, scores and Pillow; no network, no run folders.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from model.arrays import AnyArray, ByteArray
from model.config import PreprocessConfig
from model.evaluation.evaluate import Predict, Report, Sample
from model.transforms import prepare

_HIT, _MISSED, _EXTRA = (60, 190, 90), (60, 120, 255), (240, 70, 70)
_VOID = (255, 255, 255)
_BACKGROUND, _TEXT = (24, 24, 28), (220, 220, 225)
_SIDE = 256
"""The longer side of each half of a comparison, in pixels."""
_COLUMNS, _GAP, _CAPTION = 2, 8, 16
"""A contact sheet's columns, the pixels between its images, and the height of a caption."""

Palette = Sequence[tuple[int, int, int]]
"""Color of each class."""


def draw_comparison(
    image: AnyArray, true: AnyArray, predicted: AnyArray, palette: Palette = ()
) -> Image.Image:
    """Draw an image, and beside it how the prediction compares with the labels.

    Two classes: hits are green, misses blue and extra pixels red. More classes: the labels and the
    prediction in the colors of the classes. Pixels without a label are white in the labels.

    Args:
        image: decoded, (H, W) or (H, W, 3), uint8 or uint16.
        true: (H, W). Two classes: everything above 0 is foreground.
        predicted: the same.
        palette: color of each class, if there are more than two.

    Returns:
        Two or three parts side by side; the longer side of a part has 256 pixels.
    """
    shown = prepare(image, PreprocessConfig(intensity="percentile"))
    if len(palette) > 2:
        parts = [shown, _tint_classes(shown, true, palette)]
        parts.append(_tint_classes(shown, predicted, palette))
    else:
        parts = [shown, _tint_hits(shown, true, predicted)]
    both = Image.fromarray(np.hstack(parts))
    scale = _SIDE / max(shown.shape[:2])
    return both.resize((max(1, round(both.width * scale)), max(1, round(both.height * scale))))


def _tint_hits(shown: ByteArray, true: AnyArray, predicted: AnyArray) -> ByteArray:
    tinted = shown.astype(np.float32) * 0.5
    a, b, valid = true > 0, predicted > 0, true >= 0
    for where, color in ((a & b, _HIT), (a & ~b, _MISSED), (b & ~a & valid, _EXTRA)):
        tinted[where] += 0.5 * np.array(color, np.float32)
    return tinted.astype(np.uint8)


def _tint_classes(shown: ByteArray, classes: AnyArray, palette: Palette) -> ByteArray:
    colors = np.array([*palette, _VOID], np.float32)
    known = (classes >= 0) & (classes < len(palette))
    index = np.where(known, classes, len(palette))
    tinted: ByteArray = (0.25 * shown + 0.75 * colors[index]).astype(np.uint8)
    return tinted


def draw_legend(classes: Sequence[str], palette: Palette) -> Image.Image:
    """Draw the color and the name of each class, one below the other."""
    row = _CAPTION + 2
    picture = Image.new("RGB", (_SIDE, row * len(classes) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for index, (name, color) in enumerate(zip(classes, palette, strict=True)):
        y = index * row + _GAP // 2
        draw.rectangle((_GAP, y, _GAP + row, y + _CAPTION), fill=tuple(color), outline=_TEXT)
        draw.text((2 * _GAP + row, y + 2), name, fill=_TEXT)
    return picture


def make_contact_sheet(entries: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Arrange captioned images in a grid.

    Args:
        entries: caption and image, at least one.
    """
    width = max(image.width for _, image in entries)
    height = max(image.height for _, image in entries) + _CAPTION
    rows = -(-len(entries) // _COLUMNS)
    size = _COLUMNS * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, (caption, image) in enumerate(entries):
        x = _GAP + index % _COLUMNS * (width + _GAP)
        y = _GAP + index // _COLUMNS * (height + _GAP)
        draw.text((x, y), caption, fill=_TEXT)
        sheet.paste(image, (x, y + _CAPTION))
    return sheet


def make_worst_sheet(
    report: Report, predict: Predict, dataset: Sequence[Sample], palette: Palette = ()
) -> Image.Image:
    """Arrange comparisons of the images with the lowest Dice in a contact sheet.

    Args:
        report: of `model.evaluation.evaluate.evaluate` on `dataset`, in the same order.
        predict: decoded image -> `PredictedMasks`.
        palette: as for `draw_comparison`; with more than two classes a legend is added.
    """
    positions = {score.id: index for index, score in enumerate(report.images)}
    entries = []
    for score in report.worst():
        sample = dataset[positions[score.id]]
        mask = predict(sample.image).mask
        image = draw_comparison(sample.image, sample.labels, mask, palette)
        entries.append((f"{score.id}  Dice {score.dice:.3f}", image))
    if len(palette) > 2:
        entries.append(("classes", draw_legend(report.classes, palette)))
    return make_contact_sheet(entries)


def draw_confusion(confusion: AnyArray, classes: Sequence[str], path: Path) -> None:
    """Plot a confusion matrix; each row shows where the pixels of a true class went, in percent.

    Args:
        confusion: (C, C) pixels, true classes in rows.
        path: of the PNG to write.

    Raises:
        ImportError: matplotlib (the extra `train`) is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.45 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true", title="percent of the true pixels")
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            color = "white" if value > 50 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    figure.savefig(path, dpi=110)


def format_confusion(confusion: AnyArray, classes: Sequence[str]) -> str:
    """Format a confusion matrix as CSV: pixels, true classes in rows, predicted ones in columns."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["true \\ predicted", *classes])
    for name, counts in zip(classes, confusion.tolist(), strict=True):
        writer.writerow([name, *counts])
    return file.getvalue()


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot training loss, validation Dice and validation IoU (or mIoU) over the steps.

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
    iou = "miou" if scores and "miou" in scores[0] else "iou"
    for name, color in (("dice", "#1d4ed8"), (iou, "#15803d")):
        right.plot(
            [r["step"] for r in scores], [r[name] for r in scores], "o-", color=color, label=name
        )
    right.set(xlabel="step", ylabel="validation, mean over images")
    if scores:
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
