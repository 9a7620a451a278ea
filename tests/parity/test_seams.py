"""Seams between windows are invisible in the probabilities of a shipped model."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from model.checkpoint import load_checkpoint
from model.config import PreprocessConfig
from model.predict import Predictor
from model.windows import AxisTiling, WindowPlan, plan_windows
from tests.conftest import ROOT, nuclei


def measure_seam_distance(plan: WindowPlan) -> npt.NDArray[np.float64]:
    """Return (H, W): the distance in pixels to the middle of the nearest overlap."""

    def along(axis: AxisTiling) -> npt.NDArray[np.float64]:
        seams = [
            (start + size + following) / 2
            for start, size, following in zip(
                axis.starts, axis.sizes, axis.starts[1:], strict=False
            )
        ]
        distances = np.abs(np.arange(axis.length)[:, None] - np.array(seams))
        return np.asarray(distances.min(axis=1), np.float64)

    return np.minimum(along(plan.rows)[:, None], along(plan.columns)[None, :])


def test_seams_are_invisible() -> None:
    """Moving all windows changes probabilities by at most 1/8 of an 8-bit grey level on average."""
    checkpoint = load_checkpoint(ROOT / "weights" / "nuclei.safetensors")
    default = PreprocessConfig()
    preprocess = dataclasses.replace(
        checkpoint.preprocess, window=default.window, overlap=default.overlap
    )
    checkpoint = dataclasses.replace(checkpoint, preprocess=preprocess)
    predict = Predictor.of(checkpoint)
    height, width, shift = 720, 1080, 160
    noise = np.random.default_rng(0).normal(0, 30, (height, width))
    image = (nuclei(height, width)[0] + noise).clip(0, 255).astype(np.uint8)
    plan = plan_windows(height, width, checkpoint.architecture, checkpoint.preprocess)
    assert plan.count > 4
    shifted = np.pad(image, ((shift, 0), (shift, 0)), mode="reflect")
    difference = np.abs(predict(image) - predict(shifted)[:, shift:, shift:])[0]
    distance = measure_seam_distance(plan)
    inner = np.zeros(distance.shape, bool)
    inner[64:-64, 64:-64] = True  # away from the edge of the image
    at, away = difference[inner & (distance < 8)].mean(), difference[inner & (distance > 32)].mean()
    assert max(at, away) < 5e-4, f"{at:.2e} at the seams, {away:.2e} away from them"
