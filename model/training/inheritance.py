"""Choose what a recipe takes over from the checkpoint that its training starts from.

Weights work best on images that are prepared like those they were trained on. Knows checkpoints and
the names of values; no data sets, no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from model.checkpoint import Checkpoint
from model.config import PreprocessConfig

_WINDOWS = {"mode", "window", "size", "overlap", "interpolation"}
_CHANNELS = {"in_channels", "mean", "std"}


@dataclasses.dataclass(frozen=True)
class Inheritance:
    """Values of a recipe that belong to the weights of a checkpoint.

    Attributes:
        checkpoint: its id.
        network, preprocess: values of these sections, by field name.
        findings: what they are, for the log.
    """

    checkpoint: str
    network: dict[str, Any]
    preprocess: dict[str, Any]
    findings: tuple[str, ...]


def choose_inheritance(
    start: Checkpoint, given: Collection[str], is_color: bool, is_binary: bool
) -> Inheritance:
    """Choose the values that training takes over from a checkpoint.

    Values that must fit together are taken over together: those that make windows of an image, and
    the channels with their mean and standard deviation.

    Args:
        start: the checkpoint.
        given: names of the values that the user sets; they are not taken over.
        is_color: the images have colors. A network for grey images then gets three channels.
        is_binary: the masks have two classes.

    Raises:
        CheckpointError: the network is an ONNX graph.
    """
    network, preprocess = start.unet, start.preprocess
    inherited: dict[str, Any] = {}
    names: set[str] = set()
    findings = []
    if "base_features" not in given:
        inherited["base_features"] = network.base_features
        findings.append(f"{network.base_features} base features")
    channels = (3,) if is_color else (1, 3)
    if not _CHANNELS & set(given) and network.in_channels in channels:
        inherited["in_channels"] = network.in_channels
        names |= {"mean", "std"}
        findings.append("1 channel" if network.in_channels == 1 else "3 channels")
    if values := {"intensity", "percentiles"} - set(given):
        names |= values
        both = f"intensity {describe_intensity(preprocess)}"
        findings.append(both if len(values) == 2 else min(values))
    if is_binary and preprocess.binary and "threshold" not in given:
        names.add("threshold")
        findings.append(f"threshold {preprocess.threshold:g}")
    if not (_WINDOWS | {"padding"}) & set(given) and network.padding == 1:
        names |= _WINDOWS
        findings.append(_describe_windows(preprocess))
    kept = {name: value for name, value in preprocess.to_json().items() if name in names}
    return Inheritance(start.id, inherited, kept, tuple(findings))


def describe_intensity(preprocess: PreprocessConfig) -> str:
    """Describe how intensities are scaled to 0..1."""
    if preprocess.intensity == "percentile":
        low, high = preprocess.percentiles
        return f"percentiles {low:g} to {high:g}"
    return preprocess.intensity


def _describe_windows(preprocess: PreprocessConfig) -> str:
    if preprocess.mode == "native":
        return "windows"
    height, width = preprocess.resized
    return f"images resized to {width}x{height}"
