"""How long a run is, and after which steps it is validated and drawn.

Knows the numbers of a recipe; no images and no weights.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

from model.training.recipe import Recipe
from model.training.sections import OptimConfig
from model.training.trainer import Trainer

_VALIDATIONS = 10
"""Fewest validations of a run with as many steps."""
_MOST_STEPS = 400
"""Most steps between two validations, unless the recipe sets their number."""


@dataclasses.dataclass(frozen=True)
class RunLength:
    """How long to train: up to `steps`, or `seconds` of training, whichever comes first.

    Seconds count over all starts of a run, but only steps: no reading, validation or report. Both
    may be infinite.
    """

    steps: float
    seconds: float

    @classmethod
    def of(cls, optim: OptimConfig, images: int) -> Self:
        """Compute the length that a recipe asks for, with `images` training images."""
        steps = optim.steps or math.ceil(optim.epochs * images / optim.batch_size)
        return cls(steps or math.inf, 60 * optim.minutes or math.inf)

    def seconds_share(self, trainer: Trainer) -> float:
        """Return the fraction of the time limit that has passed; 0 without one."""
        return trainer.seconds / self.seconds

    def progress(self, trainer: Trainer) -> float:
        """Return the fraction of the training that is done; 1 or more at the end."""
        return self.progress_at(trainer.steps_done, trainer.seconds)

    def progress_at(self, steps: int, seconds: float) -> float:
        """Return the fraction that is done after so many steps and seconds of training."""
        return max(steps / self.steps, seconds / self.seconds)

    def describe_steps(self, trainer: Trainer) -> str:
        """Say how many steps are done, and of how many."""
        if math.isinf(self.steps):
            return f"{trainer.steps_done}"
        return f"{trainer.steps_done} of {int(self.steps)}"

    def seconds_left(self, trainer: Trainer, pace: float) -> float:
        """Estimate the remaining seconds of training at `pace` seconds per step."""
        steps = self.steps - trainer.steps_done
        return max(0.0, min(steps * pace, self.seconds - trainer.seconds))


class ValidationSchedule:
    """Says after which steps to validate.

    These are the multiples of the recipe's interval: by default a tenth of the steps, at most 400.
    A run with a time limit is also validated at every tenth of it.

    Args:
        progress: of the run so far, 0..1.
    """

    def __init__(self, recipe: Recipe, length: RunLength, progress: float) -> None:
        tenth = _MOST_STEPS if math.isinf(length.steps) else int(length.steps) // _VALIDATIONS
        self.every = recipe.run.validate_every or max(1, min(_MOST_STEPS, tenth))
        self._passed = int(progress * _VALIDATIONS)

    def is_due(self, step: int, share: float) -> bool:
        """Whether to validate after `step` steps and this share of the time limit."""
        passed = int(share * _VALIDATIONS)
        due = step % self.every == 0 or passed > self._passed
        self._passed = max(self._passed, passed)
        return due


def choose_preview_interval(recipe: Recipe, images: int) -> int:
    """Return the number of steps between previews, or 0 for none."""
    previews = recipe.run.previews_per_epoch
    steps_per_epoch = max(1, images // recipe.optim.batch_size)
    return max(1, steps_per_epoch // previews) if previews else 0
