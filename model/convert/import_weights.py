"""`unet import`: a foreign state dict becomes a self-describing checkpoint.

Read with `weights_only=True`, so that nothing in the file is executed. Two sources are known:

- the annotated implementation (labml.ai), whose names and arithmetic are ours;
- milesial/Pytorch-UNet with transposed convolutions (`bilinear=False`). It normalises batches,
  which at inference is a factor and an offset a channel and folds into the convolution before; it
  concatenates the skip first, which is a permutation of input channels; and its two-class softmax
  is a sigmoid of the difference. So the mapping is exact. `bilinear=True` has no counterpart here
  and is refused.

Weights keep their 32 bits unless 16 hold the same, so that the logits are the same.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.arrays import AnyArray, ByteArray
from model.checkpoint import SUFFIX, parameter_shapes
from model.config import UNetConfig
from model.errors import CheckpointError, ConfigError

State = dict[str, Tensor]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")


def read_state(path: Path) -> State:
    """The tensors of a foreign file, whatever they are wrapped in.

    Raises:
        CheckpointError: unreadable, or not a state dict.
    """
    try:
        if path.suffix == SUFFIX:
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, which is not opened here; save its state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a file of torch or safetensors: {error}") from error
    if isinstance(content, Mapping) and {"network", "average", "optimiser"} <= content.keys():
        raise CheckpointError(
            f"{path} is the state of a run: go on with it by unet train; what it writes at its end "
            "is a checkpoint already"
        )
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = {
        str(name).removeprefix("module."): tensor.float()
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} has values that are not finite")
    return state


def to_unet_state_dict(state: State) -> State:
    """The tensors under our names.

    Raises:
        CheckpointError: an architecture that cannot be mapped; the message says why.
    """
    if "inc.double_conv.0.weight" in state:
        return _convert_milesial(state)
    if "down_conv.0.first.weight" in state:
        return state
    raise CheckpointError(
        f"no architecture that is known here: its first tensor is {next(iter(state))!r}; known are "
        "the annotated implementation's ('down_conv.0.first.weight') and milesial/Pytorch-UNet's"
    )


def infer_architecture(state: State) -> UNetConfig:
    """The architecture that tensors under our names belong to (padding=1, which leaves no trace).

    Raises:
        CheckpointError: they belong to none.
    """
    try:
        base, channels = state["down_conv.0.first.weight"].shape[:2]
        config = UNetConfig(channels, state["final_conv.weight"].shape[0], base)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the state dict is incomplete: {error}") from error
    wanted = dict(parameter_shapes(config))
    for name in sorted(wanted.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "absent"
        if wanted.get(name, "absent") != found:
            raise CheckpointError(
                f"this is no U-Net of base_features={base}: {name} should be "
                f"{wanted.get(name, 'absent')}, and is {found}"
            )
    return config


def softmax_as_sigmoid(state: State) -> State:
    """Two outputs, background and foreground under a softmax, as one under a sigmoid: the softmax
    of two logits is the sigmoid of their difference."""
    weight, bias = state["final_conv.weight"], state["final_conv.bias"]
    return {
        **state,
        "final_conv.weight": weight[1:] - weight[:1],
        "final_conv.bias": bias[1:] - bias[:1],
    }


def _convert_milesial(state: State) -> State:
    if not any(name.startswith("up1.up.") for name in state):
        raise CheckpointError(
            "milesial/Pytorch-UNet with bilinear up-sampling cannot be mapped: this network "
            "up-samples by transposed convolutions; train it with bilinear=False"
        )
    ours: State = {}
    stages = ["inc", "down1.maxpool_conv.1", "down2.maxpool_conv.1", "down3.maxpool_conv.1"]
    for level, stage in enumerate(stages):
        _fold(state, f"{stage}.double_conv", ours, f"down_conv.{level}")
    _fold(state, "down4.maxpool_conv.1.double_conv", ours, "middle_conv")
    for level in range(4):
        for kind in ("weight", "bias"):
            ours[f"up_sample.{level}.up.{kind}"] = _require(state, f"up{level + 1}.up.{kind}")
        _fold(state, f"up{level + 1}.conv.double_conv", ours, f"up_conv.{level}")
        # theirs: skip first, then the up-sampled half; ours the other way round
        first = ours[f"up_conv.{level}.first.weight"]
        skip, upsampled = first.chunk(2, dim=1)
        ours[f"up_conv.{level}.first.weight"] = torch.cat([upsampled, skip], dim=1)
    for kind in ("weight", "bias"):
        ours[f"final_conv.{kind}"] = _require(state, f"outc.conv.{kind}")
    return softmax_as_sigmoid(ours) if len(ours["final_conv.bias"]) == 2 else ours


def _fold(state: State, theirs: str, ours: State, name: str) -> None:
    """Two convolutions, each with the batch normalisation after it: y = γ(x - μ)/√(σ² + ε) + β."""
    for place, which in ((0, "first"), (3, "second")):
        weight = _require(state, f"{theirs}.{place}.weight")
        bias = state.get(f"{theirs}.{place}.bias", torch.zeros(len(weight)))
        norm = f"{theirs}.{place + 1}"
        scale = (
            _require(state, f"{norm}.weight")
            / (_require(state, f"{norm}.running_var") + 1e-5).sqrt()
        )
        shift = _require(state, f"{norm}.bias") - _require(state, f"{norm}.running_mean") * scale
        ours[f"{name}.{which}.weight"] = weight * scale.view(-1, 1, 1, 1)
        ours[f"{name}.{which}.bias"] = bias * scale + shift


def _require(state: State, name: str) -> Tensor:
    try:
        return state[name]
    except KeyError:
        raise CheckpointError(f"the state dict is incomplete: {name} is missing") from None


def draw_synthetic_image(channels: int) -> ByteArray:
    """Blobs on a dark ground: a golden image needs no meaning, only what the network reacts to."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    field = np.zeros((256, 256))
    for cy, cx, radius in zip(*rng.uniform(0, 256, (2, 24)), rng.uniform(6, 28, 24), strict=True):
        field += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * radius**2))
    grey = np.clip(field * 200 + rng.normal(20, 6, field.shape), 0, 255).astype(np.uint8)
    return grey if channels == 1 else np.repeat(grey[:, :, None], 3, axis=2)


def choose_precision(state: State, half: bool) -> dict[str, AnyArray]:
    """In 16 bits where these hold the weights as they are, or if `half` asks to round them."""
    rounded = {name: tensor.half() for name, tensor in state.items()}
    if half:
        for name, tensor in rounded.items():
            if not tensor.isfinite().all():
                raise ConfigError(f"--half: {name} has values that 16 bits cannot hold")
    elif any((tensor.float() != state[name]).any() for name, tensor in rounded.items()):
        rounded = state
    return {name: tensor.numpy() for name, tensor in rounded.items()}
