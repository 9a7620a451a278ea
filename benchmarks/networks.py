"""Checkpoints made on the spot, for speed and not for their masks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from app.cli.bench.stages import drawn
from model.checkpoint import Checkpoint, load_checkpoint, parameter_shapes, save_checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.convert.widen import widen_checkpoint
from model.predict import attach_golden


def untrained(path: Path, base_features: int) -> Checkpoint:
    """Random weights, with the windows that a checkpoint has by default."""
    architecture = UNetConfig(base_features=base_features)
    rng = np.random.default_rng(0)
    state = {
        name: (rng.normal(size=shape) * np.sqrt(2 / max(1, np.prod(shape[1:])))).astype(np.float32)
        for name, shape in parameter_shapes(architecture)
    }
    draft = Checkpoint(path.stem, architecture, PreprocessConfig(), state)
    return save_checkpoint(path, attach_golden(draft, drawn(256, 256)))


def write_wide_checkpoint(
    path: Path, source: Path, base_features: int, window: tuple[int, int]
) -> Checkpoint:
    """What `source` computes, by a wider network, on the whole image resized to one window."""
    wide = widen_checkpoint(load_checkpoint(source), base_features)
    whole = dataclasses.replace(wide.preprocess, mode="resize", window=(window,), overlap=0)
    draft = dataclasses.replace(wide, preprocess=whole)
    return save_checkpoint(path, attach_golden(draft, drawn(*window)))
