"""The weights that validated best, and the score by which they are chosen.

Knows scores and snapshots; no data sets and no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from model.training.trainer import Snapshot


class BestWeights:
    """The weights that validated best so far.

    Only validations at the recipe's interval count, so that a run that is interrupted and resumed
    ends with the same ones.

    Attributes:
        step: at which they were validated; 0 before the first validation.
        score: of that validation; see `rate_scores`.
        weights: state dict of the network without batch normalization, on the CPU.
        since: number of validations since then in the second half of the run.
    """

    def __init__(self) -> None:
        self.step = 0
        self.score = -math.inf
        self.weights: dict[str, torch.Tensor] = {}
        self.since = 0

    @classmethod
    def load(cls, state: Mapping[str, Any] | None) -> Self:
        """Restore them from a saved state; earlier versions saved none."""
        best = cls()
        for name, value in ((state or {}).get("best") or {}).items():
            setattr(best, name, value)
        best.weights = {name: tensor.cpu() for name, tensor in best.weights.items()}
        return best

    def to_state(self) -> dict[str, Any]:
        """Return everything that `load` needs."""
        return dict(vars(self))

    def update(self, score: float, snapshot: Snapshot, is_late: bool = True) -> None:
        """Take the weights of a snapshot unless the score is lower. Of equal ones the later wins,
        but only a higher score counts as an improvement.

        Args:
            is_late: the snapshot is from the second half of the run. An early score may be high by
                chance, and falls before the network learns more.
        """
        self.since = self.since + 1 if is_late and score <= self.score else 0
        if score >= self.score:
            self.score, self.step = score, snapshot.step
            weights = snapshot.predictor.network.state_dict()
            self.weights = {name: each.detach().cpu().clone() for name, each in weights.items()}


def rate_scores(scores: Mapping[str, Any]) -> float:
    """Reduce the scores of a validation to the one by which weights are chosen.

    It is the mIoU of several classes, the Dice of a binary model, and the mean of Dice and F1 of
    the objects where they are separated. Each of several sources counts the same.
    """
    if "by_source" in scores:
        return float(np.mean([rate_scores(each) for each in scores["by_source"].values()]))
    if "miou" in scores:
        return float(scores["miou"])
    if "f1_50" in scores:
        return float(scores["dice"] + scores["f1_50"]) / 2
    return float(scores["dice"])
