"""Pictures for people: predictions beside the truth, and training curves."""

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
"""The longer one of each of the two halves of a comparison, in pixels."""
_COLUMNS, _GAP, _CAPTION = 2, 8, 16
"""Of a contact sheet: columns, and pixels around its pictures and above them."""


def compare(image: AnyArray, true: AnyArray, predicted: AnyArray) -> Image.Image:
    """The image, and over it what was hit (green), missed (blue) and too much (red).

    Args:
        image: decoded, (H, W) or (H, W, 3).
        true, predicted: (H, W), not 0 is foreground.
    """
    shown = prepare(image, PreprocessConfig(intensity="percentile"))
    tinted = shown.astype(np.float32) * 0.5
    a, b = true > 0, predicted > 0
    for where, colour in ((a & b, _HIT), (a & ~b, _MISSED), (b & ~a, _EXTRA)):
        tinted[where] += 0.5 * np.array(colour, np.float32)
    both = Image.fromarray(np.hstack([shown, tinted.astype(np.uint8)]))
    scale = _SIDE / max(shown.shape[:2])
    return both.resize((max(1, round(both.width * scale)), max(1, round(both.height * scale))))


def contact_sheet(entries: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Captioned pictures in a grid."""
    width = max(picture.width for _, picture in entries)
    height = max(picture.height for _, picture in entries) + _CAPTION
    rows = -(-len(entries) // _COLUMNS)
    size = _COLUMNS * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP
    sheet = Image.new("RGB", size, (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    for index, (caption, picture) in enumerate(entries):
        x = _GAP + index % _COLUMNS * (width + _GAP)
        y = _GAP + index // _COLUMNS * (height + _GAP)
        draw.text((x, y), caption, fill=(220, 220, 225))
        sheet.paste(picture, (x, y + _CAPTION))
    return sheet


def worst_sheet(report: Report, predict: Predict, dataset: Sequence[Sample]) -> Image.Image:
    """The images with the lowest Dice: each as it is, and with hits and misses tinted."""
    place = {score.id: index for index, score in enumerate(report.images)}
    entries = []
    for score in report.worst():
        sample = dataset[place[score.id]]
        picture = compare(sample.image, sample.labels, predict(sample.image).mask)
        entries.append((f"{score.id}  Dice {score.dice:.3f}", picture))
    return contact_sheet(entries)


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss over the steps, and the validation's Dice and IoU.

    Raises:
        ImportError: matplotlib (the extra `train`) is not installed.
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
