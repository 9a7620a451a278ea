"""Initial weights from a checkpoint, for a network that may have other inputs, outputs or width.

Each change is described in a line for the log. Knows checkpoints and recipes; no training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import load_checkpoint
from model.config import PreprocessConfig
from model.convert.widen import narrow, widen
from model.predict import load_tensors
from model.training.inheritance import describe_intensity
from model.training.recipe import Recipe

_INPUT = "down_conv.0.first"
_OUTPUT = "final_conv"


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Weights with which training starts.

    Attributes:
        checkpoint: id of the checkpoint that they were made of.
        weights: state dict of the recipe's network without batch normalization.
        changes: one line for each difference from the checkpoint.
        solve_task: every output has weights of the checkpoint, so that scores before training say
            what the start is worth.
    """

    checkpoint: str
    weights: dict[str, Tensor]
    changes: tuple[str, ...]
    solve_task: bool


def load_initial_weights(path: Path, recipe: Recipe) -> InitialWeights:
    """Load the weights of a checkpoint, and adapt them to a recipe's network.

    - Other input channels: a channel's weights become the sum over the former channels, divided by
      the number of present ones. A grey image gives the same activations as before.
    - Another mean or standard deviation: the first layer is changed so that it computes the same,
      but for the outermost pixels, where the padding is 0 in another unit.
    - Other outputs: foreground and border are kept where both networks have them, and classes by
      their names. Other outputs start at 0, so that all classes are equally likely.
    - Other width: the network is widened or narrowed.

    Raises:
        CheckpointError: the checkpoint is invalid.
        ConfigError: it cannot be widened or narrowed to the recipe's network.
    """
    checkpoint = load_checkpoint(path)
    network, preprocess = recipe.network, recipe.preprocess
    before, former = checkpoint.unet, checkpoint.preprocess
    state = load_tensors(checkpoint)
    changes = []
    changes_scale = _list_scales(former) != _list_scales(preprocess)
    if before.in_channels != network.in_channels or changes_scale:
        _change_inputs(state, former, preprocess)
    if before.in_channels != network.in_channels:
        changes.append(
            f"{before.in_channels} input channels become {network.in_channels}: their weights are "
            "added up and divided by the new number"
        )
    if changes_scale:
        changes.append(
            f"mean {_format(former.mean)} and std {_format(former.std)} become "
            f"{_format(preprocess.mean)} and {_format(preprocess.std)}, for which the first layer "
            "is converted"
        )
    intensities = [describe_intensity(each) for each in (former, preprocess)]
    if intensities[0] != intensities[1]:
        changes.append(
            f"intensity {' becomes '.join(intensities)}: weights cannot be converted, and training "
            "has to adapt them"
        )
    names = _name_outputs(former, before.out_channels)
    wanted = _name_outputs(preprocess, network.out_channels)
    if names != wanted:
        _change_outputs(state, names, wanted)
        kept = [name for name in wanted if name in names]
        new = [name for name in wanted if name not in names]
        parts = [f"{text} {', '.join(each)}" for text, each in (("keeps", kept), ("adds", new))]
        changes.append("the last layer " + " and ".join(p for p in parts if not p.endswith(" ")))
    changed = dataclasses.replace(
        before, in_channels=network.in_channels, out_channels=network.out_channels
    )
    if before.base_features != network.base_features:
        changes.append(f"{before.base_features} base features become {network.base_features}")
    convert = narrow if before.base_features > network.base_features else widen
    weights = convert(state, changed, network)
    return InitialWeights(checkpoint.id, weights, tuple(changes), set(wanted) <= set(names))


def _list_scales(preprocess: PreprocessConfig) -> set[tuple[float, float]]:
    """Return mean and standard deviation of the channels, each pair once."""
    return set(zip(preprocess.mean, preprocess.std, strict=True))


def _format(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _change_inputs(
    state: dict[str, Tensor], former: PreprocessConfig, present: PreprocessConfig
) -> None:
    """Let the first layer read the present channels and scale as it read the former ones.

    It read (v - mean) / std of values v in 0..1.
    """
    mean, std = (torch.tensor(each)[:, None, None] for each in (former.mean, former.std))
    weight = state[f"{_INPUT}.weight"] / std  # of v
    bias = state[f"{_INPUT}.bias"] - (weight * mean).sum(dim=(1, 2, 3))
    if len(former.mean) != len(present.mean):
        shared = weight.sum(dim=1, keepdim=True) / len(present.mean)
        weight = shared.repeat(1, len(present.mean), 1, 1)
    mean, std = (torch.tensor(each)[:, None, None] for each in (present.mean, present.std))
    state[f"{_INPUT}.bias"] = bias + (weight * mean).sum(dim=(1, 2, 3))
    state[f"{_INPUT}.weight"] = weight * std


def _name_outputs(preprocess: PreprocessConfig, channels: int) -> list[str]:
    """Name the channels of the logits: those of a sigmoid, or the classes of a softmax."""
    if preprocess.binary:
        return ["foreground", "border"][:channels]
    return [f"class {name}" for name in preprocess.classes]


def _change_outputs(state: dict[str, Tensor], names: list[str], wanted: list[str]) -> None:
    for end in ("weight", "bias"):
        former = state[f"{_OUTPUT}.{end}"]
        changed = former.new_zeros(len(wanted), *former.shape[1:])
        for index, name in enumerate(wanted):
            if name in names:
                changed[index] = former[names.index(name)]
        state[f"{_OUTPUT}.{end}"] = changed
