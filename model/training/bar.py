"""The progress of training: a bar on a terminal, lines without one.

Knows what a trainer has done; measures nothing itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

from tqdm import tqdm

from model.training.length import RunLength
from model.training.progress import LineClock, has_terminal
from model.training.trainer import Trainer

_SMOOTHING = 0.98
"""Decay of the running means of loss and seconds per step."""


class ProgressBar:
    """A progress bar on a terminal, lines without one, and the running means that they show.

    Attributes:
        loss: running mean of the loss.
        speed: images per second in the last steps.
    """

    def __init__(self, trainer: Trainer, length: RunLength) -> None:
        self.trainer = trainer
        self.length = length
        self.loss = math.nan
        self.speed = math.nan
        self._pace = math.nan
        self._clock = LineClock()
        self._bar = tqdm(
            total=None if math.isinf(length.steps) else length.steps,
            initial=trainer.steps_done,
            unit="step",
            dynamic_ncols=True,
            disable=not has_terminal(),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, losses: Sequence[float], images: int, seconds: float) -> None:
        """Show steps that are done.

        Args:
            losses: of these steps.
            images: in all of them.
            seconds: that they took together.
        """
        for loss in losses:
            self.loss = _smooth(self.loss, loss)
            self._pace = _smooth(self._pace, seconds / len(losses))
        self.speed = images / seconds
        left = tqdm.format_interval(self.length.seconds_left(self.trainer, self._pace))
        self._bar.update(len(losses))
        text = (
            f"loss {self.loss:.3f}, lr {self.trainer.learning_rate:.1e}, "
            f"{self.speed:.1f} images/s, {left} left"
        )
        self._bar.set_postfix_str(text)
        steps = self.length.describe_steps(self.trainer)
        self._clock.print(lambda: f"step {steps}: {text}")

    def show_scores(self, step: int, scores: dict[str, Any], note: str = "") -> None:
        """Print a validation's scores above the bar, followed by a note."""
        self._bar.write(f"step {step}: validation {describe_scores(scores)}{note}")
        sys.stdout.flush()


def describe_scores(scores: Mapping[str, Any]) -> str:
    """Name the most important scores of a validation."""
    if "miou" in scores:
        return f"mIoU {scores['miou']:.4f}, Dice {scores['dice']:.4f}"
    objects = f", F1 of objects {scores['f1_50']:.4f}" if "f1_50" in scores else ""
    sources = "".join(
        f", {name} {each['dice']:.4f}" for name, each in scores.get("by_source", {}).items()
    )
    return f"Dice {scores['dice']:.4f}, IoU {scores['iou']:.4f}{objects}{sources}"


def _smooth(mean: float, value: float) -> float:
    """Update a running mean, which is NaN before the first value."""
    return value if math.isnan(mean) else _SMOOTHING * mean + (1 - _SMOOTHING) * value
