"""The weights that validated best, and the score by which they are chosen.

Knows scores, snapshots and initial weights; no data sets and no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from model.training.initial import InitialWeights
from model.training.trainer import Snapshot


class BestWeights:
    """The weights that validated best so far.

    Only validations at the recipe's interval count, so that a run that is interrupted and resumed
    ends with the same ones. Weights of a checkpoint that the run starts from count too, if they
    were validated.

    Attributes:
        step: at which they were validated; 0 for the start, and before the first validation.
        score: of that validation; see `rate_scores`.
        weights: state dict of the network without batch normalization, on the CPU.
        trained_score: highest score of weights that the run trained.
        since: number of validations since that one in the second half of the run.
        start: id of the checkpoint whose weights were validated before the first step, or "".
        start_score: of that validation.
        start_weights: as `weights`; they are kept, because the final scores are of more images.
    """

    def __init__(self) -> None:
        self.step = 0
        self.score = -math.inf
        self.weights: dict[str, torch.Tensor] = {}
        self.trained_score = -math.inf
        self.since = 0
        self.start = ""
        self.start_score = -math.inf
        self.start_weights: dict[str, torch.Tensor] = {}

    @classmethod
    def load(cls, state: Mapping[str, Any] | None) -> Self:
        """Restore them from a saved state; earlier versions saved none, or not all values."""
        best = cls()
        values = (state or {}).get("best") or {}
        best.trained_score = values.get("score", -math.inf)  # of a state without a start
        for name, value in values.items():
            setattr(best, name, value)
        best.weights = {name: tensor.cpu() for name, tensor in best.weights.items()}
        best.start_weights = {name: tensor.cpu() for name, tensor in best.start_weights.items()}
        return best

    def to_state(self) -> dict[str, Any]:
        """Return everything that `load` needs."""
        return dict(vars(self))

    def take_start(self, score: float, initial: InitialWeights) -> None:
        """Take the weights that the run starts from, before its first step."""
        self.start, self.start_score = initial.checkpoint, score
        self.start_weights = {name: each.cpu() for name, each in initial.weights.items()}
        self.score, self.weights = score, self.start_weights

    def update(self, score: float, snapshot: Snapshot, is_late: bool = True) -> None:
        """Take the weights of a snapshot unless the score is lower. Of equal ones the later wins,
        but only a higher score counts as an improvement.

        Args:
            is_late: the snapshot is from the second half of the run. An early score may be high by
                chance, and falls before the network learns more.
        """
        # Weights that are worse than the start may still improve, so it does not end the run.
        self.since = self.since + 1 if is_late and score <= self.trained_score else 0
        self.trained_score = max(self.trained_score, score)
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
