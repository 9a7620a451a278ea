"""Convert a state dict from elsewhere into the state dict of `model.unet.UNet`.

Files are read with `weights_only=True`, so no code in them is executed. Two architectures are
recognised:

- the annotated implementation (labml.ai), which has the same names and arithmetic;
- milesial/Pytorch-UNet with transposed convolutions (`bilinear=False`). Its batch normalization is
  a factor and an offset per channel at inference, and is folded into the preceding convolution. It
  concatenates the skip first, so input channels are permuted. A softmax over two classes equals a
  sigmoid of the difference. The conversion is therefore exact. `bilinear=True` has no equivalent
  here and is rejected.

Knows files and tensors; no command line.
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
from model.files import check_regular

State = dict[str, Tensor]
"""Tensors by state-dict name."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Keys under which training scripts save a state dict beside other things."""
_RUN_STATE_KEYS = ({"network", "ema", "optimizer"}, {"network", "average", "optimiser"})
"""Keys of the state.pt of a training run, present and old."""


def read_state(path: Path) -> State:
    """Read the tensors of a file, in fp32.

    Args:
        path: of torch (.pth, .pt) or safetensors; the state dict may be wrapped in a dictionary.

    Returns:
        Tensors by name, without the prefix `module.` of `DataParallel`.

    Raises:
        CheckpointError: the file cannot be read, contains pickled objects or no state dict, or a
            value is not finite.
    """
    content = _load_file(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, not a state dict")
    if any(keys <= content.keys() for keys in _RUN_STATE_KEYS):
        raise CheckpointError(
            f"{path} is the state of a training run; resume the run with unet train, which writes "
            "a checkpoint"
        )
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    state = {
        str(name).removeprefix("module."): tensor.float()
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }
    if not state:
        raise CheckpointError(f"{path} contains no tensors")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} has values that are not finite")
    return state


def _load_file(path: Path) -> Any:
    """Load a file of torch or safetensors without executing anything in it.

    Raises:
        CheckpointError: the file cannot be read, contains pickled objects, or has another format.
    """
    try:
        check_regular(path)
        if path.suffix == SUFFIX:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} contains pickled objects, which are never loaded; save only its state_dict()"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a torch or safetensors file: {error}") from error


def to_unet_state_dict(state: State) -> State:
    """Rename and convert tensors to the state dict of `model.unet.UNet`.

    Raises:
        CheckpointError: the architecture is not recognised or has no equivalent.
    """
    if "inc.double_conv.0.weight" in state:
        return _convert_milesial(state)
    if "down_conv.0.first.weight" in state:
        return state
    raise CheckpointError(
        f"unrecognised architecture: the first tensor is {next(iter(state))!r}; recognised are the "
        "annotated implementation ('down_conv.0.first.weight') and milesial/Pytorch-UNet "
        "('inc.double_conv.0.weight')"
    )


def infer_architecture(state: State) -> UNetConfig:
    """Infer the architecture from a state dict of `model.unet.UNet`.

    The padding leaves no trace in the tensors; it is assumed to be 1.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape.
    """
    try:
        base, channels = state["down_conv.0.first.weight"].shape[:2]
        config = UNetConfig(channels, state["final_conv.weight"].shape[0], base)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the state dict is incomplete: {error}") from error
    expected = dict(parameter_shapes(config))
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "absent"
        if expected.get(name, "absent") != found:
            raise CheckpointError(
                f"not a U-Net with base_features={base}: {name} should be "
                f"{expected.get(name, 'absent')}, but is {found}"
            )
    return config


def softmax_as_sigmoid(state: State) -> State:
    """Replace a softmax over background and foreground by an equal sigmoid of one output.

    The softmax of two logits is the sigmoid of their difference.
    """
    weight, bias = state["final_conv.weight"], state["final_conv.bias"]
    return {
        **state,
        "final_conv.weight": weight[1:] - weight[:1],
        "final_conv.bias": bias[1:] - bias[:1],
    }


def _convert_milesial(state: State) -> State:
    """Convert the state dict of milesial/Pytorch-UNet.

    Raises:
        CheckpointError: it up-samples bilinearly, or a tensor is missing.
    """
    if not any(name.startswith("up1.up.") for name in state):
        raise CheckpointError(
            "milesial/Pytorch-UNet with bilinear up-sampling cannot be converted: this network "
            "up-samples by transposed convolutions; train it with bilinear=False"
        )
    converted: State = {}
    stages = ["inc", "down1.maxpool_conv.1", "down2.maxpool_conv.1", "down3.maxpool_conv.1"]
    for level, stage in enumerate(stages):
        converted |= _convert_double_conv(state, f"{stage}.double_conv", f"down_conv.{level}")
    converted |= _convert_double_conv(state, "down4.maxpool_conv.1.double_conv", "middle_conv")
    for level in range(4):
        for kind in ("weight", "bias"):
            name = f"up_sample.{level}.up.{kind}"
            converted[name] = _get_tensor(state, f"up{level + 1}.up.{kind}")
        source = f"up{level + 1}.conv.double_conv"
        converted |= _convert_double_conv(state, source, f"up_conv.{level}")
        # milesial concatenates the skip first, `UNet` the up-sampled half
        first = f"up_conv.{level}.first.weight"
        skip, upsampled = converted[first].chunk(2, dim=1)
        converted[first] = torch.cat([upsampled, skip], dim=1)
    for kind in ("weight", "bias"):
        converted[f"final_conv.{kind}"] = _get_tensor(state, f"outc.conv.{kind}")
    is_softmax = len(converted["final_conv.bias"]) == 2
    return softmax_as_sigmoid(converted) if is_softmax else converted


def _convert_double_conv(state: State, source: str, target: str) -> State:
    """Convert two convolutions, and fold the batch normalization after each into it.

    y = γ(x - μ)/√(σ² + ε) + β, with torch's default ε.

    Args:
        source, target: prefixes of the names in `state` and in the result.
    """
    converted: State = {}
    for index, layer in ((0, "first"), (3, "second")):
        weight = _get_tensor(state, f"{source}.{index}.weight")
        bias = state.get(f"{source}.{index}.bias", torch.zeros(len(weight)))
        norm = f"{source}.{index + 1}"
        scale = (
            _get_tensor(state, f"{norm}.weight")
            / (_get_tensor(state, f"{norm}.running_var") + 1e-5).sqrt()
        )
        mean = _get_tensor(state, f"{norm}.running_mean")
        shift = _get_tensor(state, f"{norm}.bias") - mean * scale
        converted[f"{target}.{layer}.weight"] = weight * scale.view(-1, 1, 1, 1)
        converted[f"{target}.{layer}.bias"] = bias * scale + shift
    return converted


def _get_tensor(state: State, name: str) -> Tensor:
    try:
        return state[name]
    except KeyError:
        raise CheckpointError(f"the state dict is incomplete: {name} is missing") from None


def draw_synthetic_image(channels: int) -> ByteArray:
    """Draw bright blobs on a dark background, for a golden pair without an image.

    Args:
        channels: 1 for grey; otherwise RGB.

    Returns:
        (256, 256) or (256, 256, 3) uint8, always the same.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    field = np.zeros((256, 256))
    for cy, cx, radius in zip(*rng.uniform(0, 256, (2, 24)), rng.uniform(6, 28, 24), strict=True):
        field += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * radius**2))
    grey = np.clip(field * 200 + rng.normal(20, 6, field.shape), 0, 255).astype(np.uint8)
    return grey if channels == 1 else np.repeat(grey[:, :, None], 3, axis=2)


def choose_precision(state: State, half: bool) -> dict[str, AnyArray]:
    """Convert weights to fp16 if that loses nothing or `half` asks for it; otherwise to fp32.

    Raises:
        ConfigError: `half` is set and a value is too large for fp16.
    """
    rounded = {name: tensor.half() for name, tensor in state.items()}
    if half:
        for name, tensor in rounded.items():
            if not tensor.isfinite().all():
                raise ConfigError(f"--half: {name} has values that are too large for fp16")
    elif any((tensor.float() != state[name]).any() for name, tensor in rounded.items()):
        rounded = state
    return {name: tensor.numpy() for name, tensor in rounded.items()}
