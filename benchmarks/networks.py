"""Checkpoints for measuring speed; their masks do not matter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from app.cli.bench.stages import draw_image
from model.checkpoint import Checkpoint, load_checkpoint, parameter_shapes, save_checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.convert.widen import widen_checkpoint
from model.predict import attach_golden


def write_untrained_checkpoint(path: Path, base_features: int) -> Checkpoint:
    """Write a network with random weights and the default windows."""
    architecture = UNetConfig(base_features=base_features)
    rng = np.random.default_rng(0)
    state = {
        name: (rng.normal(size=shape) * np.sqrt(2 / max(1, np.prod(shape[1:])))).astype(np.float32)
        for name, shape in parameter_shapes(architecture)
    }
    draft = Checkpoint(path.stem, architecture, PreprocessConfig(), state)
    return save_checkpoint(path, attach_golden(draft, draw_image(256, 256)))


def write_wide_checkpoint(
    path: Path, source: Path, base_features: int, window: tuple[int, int]
) -> Checkpoint:
    """Write a wider network with the function of `source`, in mode "resize" with one window."""
    wide = widen_checkpoint(load_checkpoint(source), base_features)
    resize = dataclasses.replace(wide.preprocess, mode="resize", window=(window,), overlap=0)
    draft = dataclasses.replace(wide, preprocess=resize)
    return save_checkpoint(path, attach_golden(draft, draw_image(*window)))
