"""Widen a network without changing what it computes, and narrow it again.

Widening follows Net2WiderNet (Chen, Goodfellow & Shlens 2016, section 2.1) for integer factors:
every feature is repeated `factor` times, and a layer that reads a feature reads all of its copies.
The weights for the copies are random shares of the old weight and sum to it, so the copies receive
different gradients and diverge in training.

Narrowing is the inverse. It keeps the function only while the copies agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from model.arrays import AnyArray
from model.checkpoint import Checkpoint, parameter_shapes
from model.config import UNetConfig
from model.errors import ConfigError
from model.predict import load_tensors

_MOST_SPREAD = 0.2
"""Largest share of the squares of copied weights that may be differences between the copies. With
unrelated weights it is a half for two copies, and more for several."""


def widen_checkpoint(checkpoint: Checkpoint, base_features: int) -> Checkpoint:
    """Return a wider network that computes the same function.

    The tensors keep their types. The result has no calibration, and the rounding of its sums
    differs: attach a new golden pair with `model.predict.attach_golden`.

    Args:
        base_features: a multiple of the checkpoint's.

    Raises:
        ConfigError: `base_features` is not a multiple of the checkpoint's.
    """
    before = checkpoint.unet
    wider = dataclasses.replace(before, base_features=base_features)
    state = widen(load_tensors(checkpoint), before, wider)
    return _with_network(checkpoint, wider, state, note="widened")


def narrow_checkpoint(checkpoint: Checkpoint, base_features: int) -> Checkpoint:
    """Undo `widen_checkpoint`: return the narrower network that computes the same function.

    The tensors keep their types. The result has no calibration, and the rounding of its sums
    differs: attach a new golden pair with `model.predict.attach_golden`.

    Args:
        base_features: a divisor of the checkpoint's.

    Raises:
        ConfigError: `base_features` is not a divisor of the checkpoint's, or the checkpoint was not
            widened from it, or was trained after it was widened.
    """
    before = checkpoint.unet
    narrower = dataclasses.replace(before, base_features=base_features)
    factor = _compute_factor(narrower, before)
    for name, _ in parameter_shapes(before):
        if not _copies_agree(name, checkpoint.state[name], factor):
            raise ConfigError(
                f"{checkpoint.name} cannot be narrowed to base_features {base_features}: it was "
                f"not widened from there, or was trained since; copies of features differ in {name}"
            )
    state = narrow(load_tensors(checkpoint), before, narrower)
    return _with_network(checkpoint, narrower, state, note="narrowed")


def widen(state: Mapping[str, Tensor], config: UNetConfig, wider: UNetConfig) -> dict[str, Tensor]:
    """Return the state dict of `wider` that computes what `state` computes.

    The shares depend on the networks alone: the same input gives the same result.

    Args:
        state: of a `model.unet.UNet` of `config`.
        wider: the same network with a multiple of its `base_features`.

    Raises:
        ConfigError: `wider` differs in more than its width, or its width is not a multiple.
    """
    factor = _compute_factor(config, wider)
    rng = torch.Generator().manual_seed(0)
    result = {}
    for name, _ in parameter_shapes(config):  # the order of `state` may vary between two loads
        tensor = state[name].detach().cpu()
        layout = _find_layout(name)
        if name.endswith(".bias"):
            result[name] = tensor.clone() if layout.last else tensor.repeat(factor)
            continue
        if not layout.last:
            tensor = torch.cat([tensor] * factor, layout.outputs)
        if layout.groups:
            groups = tensor.chunk(layout.groups, layout.inputs)
            shares = [_split_into_shares(group, layout.inputs, factor, rng) for group in groups]
            tensor = torch.cat(shares, layout.inputs)
        result[name] = tensor.contiguous()
    return result


def narrow(
    state: Mapping[str, Tensor], config: UNetConfig, narrower: UNetConfig
) -> dict[str, Tensor]:
    """Return the state dict of `narrower`: the mean of each feature's copies.

    If the copies agree, `narrower` computes what `state` computes. If they have diverged a little
    in training, it computes nearly the same and can be trained further.

    Args:
        state: of a `model.unet.UNet` of `config`.
        narrower: the same network with a divisor of its `base_features`.

    Raises:
        ConfigError: `narrower` differs in more than its width, its width is not a divisor, or the
            copies have little in common: `state` was not widened from this width.
    """
    factor = _compute_factor(narrower, config)
    result = {}
    spread = total = 0.0
    for name, tensor in state.items():
        tensor = _sum_shares(name, tensor.detach().cpu(), factor)
        layout = _find_layout(name)
        if not layout.last:
            copies = torch.stack(tensor.chunk(factor, layout.outputs))
            tensor = copies.mean(0)
            spread += float((copies - tensor).square().sum())
            total += float(copies.square().sum())
        result[name] = tensor.clone().contiguous()
    if spread > _MOST_SPREAD * total:
        raise ConfigError(
            f"the weights were not widened from base_features {narrower.base_features}: copies of "
            f"features differ by {spread / total:.0%} of their squares"
        )
    return result


def _with_network(
    checkpoint: Checkpoint, network: UNetConfig, state: Mapping[str, Tensor], note: str
) -> Checkpoint:
    """Replace the network, and note it in the card."""
    before = checkpoint.unet.base_features
    training = dict(checkpoint.card.get("training", {}))
    training[note] = f"from base_features {before}, without further training"
    return dataclasses.replace(
        checkpoint,
        architecture=network,
        state={
            name: tensor.numpy().astype(checkpoint.state[name].dtype)
            for name, tensor in state.items()
        },
        card={**checkpoint.card, "training": training},
        calibration=None,
    )


def _compute_factor(config: UNetConfig, wider: UNetConfig) -> int:
    factor, rest = divmod(wider.base_features, config.base_features)
    if rest or dataclasses.replace(config, base_features=wider.base_features) != wider:
        raise ConfigError(
            f"{config} and {wider} cannot be converted into each other: channels and padding must "
            "agree, and the larger base_features must be a multiple of the smaller"
        )
    return factor


def _copies_agree(name: str, array: AnyArray, factor: int) -> bool:
    """Whether the copies of features in a stored tensor differ by no more than rounding.

    Widening rounds every share once to the stored type and computes it in fp32, so two sums of
    shares differ by at most `eps` of the stored type and `2 * factor * eps` of fp32.
    """
    layout = _find_layout(name)
    if layout.last:
        return True  # has shares alone, and any shares are valid
    stored = np.finfo(array.dtype)
    tensor = torch.from_numpy(array).float()
    sums = _sum_shares(name, tensor, factor).chunk(factor, layout.outputs)
    sizes = _sum_shares(name, tensor.abs(), factor).chunk(factor, layout.outputs)
    relative = float(stored.eps) + 2 * factor * torch.finfo(torch.float32).eps
    smallest = factor * float(stored.smallest_subnormal)
    return all(
        bool(((copy - sums[0]).abs() <= relative * torch.maximum(size, sizes[0]) + smallest).all())
        for copy, size in zip(sums[1:], sizes[1:], strict=True)
    )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a tensor of the state dict is widened.

    Attributes:
        last: whether it belongs to the last layer, whose outputs are not repeated.
        inputs, outputs: its axes of input and output channels.
        groups: how many blocks of input channels are repeated separately. 0 for the first layer,
            which reads the image, and for a bias, which has no inputs.
    """

    last: bool
    inputs: int
    outputs: int
    groups: int


def _find_layout(name: str) -> _Layout:
    last = name.startswith("final_conv")
    if name.endswith(".bias"):
        return _Layout(last, inputs=0, outputs=0, groups=0)
    # (out, in, h, w), but (in, out, h, w) in a transposed convolution
    inputs, outputs = (0, 1) if ".up." in name else (1, 0)
    if name.startswith("down_conv.0.first."):
        groups = 0
    elif name.startswith("up_conv") and ".first." in name:
        groups = 2  # the concatenation's up-sampled half, then its skip
    else:
        groups = 1
    return _Layout(last, inputs, outputs, groups)


def _split_into_shares(tensor: Tensor, axis: int, factor: int, rng: torch.Generator) -> Tensor:
    """Concatenate along `axis` `factor` random shares that sum to `tensor`."""
    shares = torch.rand(factor, *tensor.shape, generator=rng) + 0.5
    shares /= shares.sum(0)
    return torch.cat([tensor * share for share in shares], axis)


def _sum_shares(name: str, tensor: Tensor, factor: int) -> Tensor:
    """Undo `_split_into_shares` for every group of a tensor's input channels."""
    layout = _find_layout(name)
    if not layout.groups:
        return tensor
    groups = tensor.chunk(layout.groups, layout.inputs)
    sums = [torch.stack(group.chunk(factor, layout.inputs)).sum(0) for group in groups]
    return torch.cat(sums, layout.inputs)
