"""A wider network that computes what a narrow one computes: where training a wide one may start.
And back, for a wide one that learnt hardly more than the narrow one: training that costs a quarter.

Net2WiderNet (Chen, Goodfellow & Shlens 2016, section 2.1), for factors that are whole numbers:
every feature is there `factor` times, and whoever reads a feature reads all its copies, with shares
of the old weight that sum to it. The shares are random, one draw a weight, so that the copies get
different gradients and grow apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import UNetConfig
from model.errors import ConfigError
from model.predict import load_tensors


def widen_checkpoint(checkpoint: Checkpoint, base_features: int) -> Checkpoint:
    """A draft of the same function in a network of more features, its tensors of the same types.

    What int8 would need of it is not known. Its golden pair is to be made anew, since sums of other
    terms are rounded otherwise: `model.predict.attach_golden`.

    Args:
        base_features: a multiple of the checkpoint's.

    Raises:
        ConfigError: no multiple.
    """
    before = checkpoint.architecture
    wider = dataclasses.replace(before, base_features=base_features)
    state = {
        name: tensor.numpy().astype(checkpoint.state[name].dtype)
        for name, tensor in widen(load_tensors(checkpoint), before, wider).items()
    }
    training = dict(checkpoint.card.get("training", {}))
    training["widened"] = f"from base_features {before.base_features}, without further training"
    return dataclasses.replace(
        checkpoint,
        architecture=wider,
        state=state,
        card={**checkpoint.card, "training": training},
        calibration=None,
    )


def widen(state: Mapping[str, Tensor], config: UNetConfig, wider: UNetConfig) -> dict[str, Tensor]:
    """The state dict of `wider` that computes what `state` computes.

    Args:
        state: of a `model.unet.UNet` of `config`.
        wider: the same network with a multiple of its `base_features`.

    Raises:
        ConfigError: it is another network, or no multiple.
    """
    factor = _factor(config, wider)
    rng = torch.Generator().manual_seed(0)
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        last, inputs, outputs, halves = _layout(name)
        if name.endswith(".bias"):
            result[name] = tensor.clone() if last else tensor.repeat(factor)
            continue
        if not last:
            tensor = _repeated(tensor, outputs, factor)
        if halves:
            parts = tensor.chunk(halves, inputs)
            tensor = torch.cat([_shared(part, inputs, factor, rng) for part in parts], inputs)
        result[name] = tensor.contiguous()
    return result


def narrow(
    state: Mapping[str, Tensor], config: UNetConfig, narrower: UNetConfig
) -> dict[str, Tensor]:
    """The way back: the mean of a feature's copies, and the sum of the shares that read them.

    Computes the same only while the copies are alike: just after `widen`, and nearly so if little
    was learnt since. A checkpoint that was never widened becomes nonsense.

    Args:
        state: of a `model.unet.UNet` of `config`.
        narrower: the same network with `base_features` that divide its own.

    Raises:
        ConfigError: it is another network, or no such one.
    """
    factor = _factor(narrower, config)
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        last, inputs, outputs, halves = _layout(name)
        if name.endswith(".bias"):
            result[name] = tensor.clone() if last else _mean(tensor, 0, factor)
            continue
        if halves:
            parts = [_mean(part, inputs, factor) * factor for part in tensor.chunk(halves, inputs)]
            tensor = torch.cat(parts, inputs)
        if not last:
            tensor = _mean(tensor, outputs, factor)
        result[name] = tensor.contiguous()
    return result


def _factor(config: UNetConfig, wider: UNetConfig) -> int:
    factor, rest = divmod(wider.base_features, config.base_features)
    if rest or (config.in_channels, config.out_channels, config.padding) != (
        wider.in_channels,
        wider.out_channels,
        wider.padding,
    ):
        raise ConfigError(
            f"{config} and {wider} cannot start from each other: channels and padding must agree, "
            "and base_features of one be a multiple of the other's"
        )
    return factor


def _layout(name: str) -> tuple[bool, int, int, int]:
    """Whether a tensor is the last layer's; the axes of its inputs and outputs; and in how many
    parts its inputs were repeated: none in the first layer, whose inputs are the image's."""
    # (out, in, h, w), but (in, out, h, w) in an up-convolution
    inputs, outputs = (0, 1) if ".up." in name else (1, 0)
    # what is concatenated was repeated half by half: the up-sampled, then the skip
    halves = 2 if name.startswith("up_conv") and ".first." in name else 1
    if name.startswith("down_conv.0.first."):
        halves = 0
    return name.startswith("final_conv"), inputs, outputs, halves


def _repeated(tensor: Tensor, axis: int, factor: int) -> Tensor:
    return torch.cat([tensor] * factor, axis)


def _shared(tensor: Tensor, axis: int, factor: int, rng: torch.Generator) -> Tensor:
    """`factor` parts, which sum to `tensor`, one behind the other along `axis`."""
    shares = torch.rand(factor, *tensor.shape, generator=rng) + 0.5
    shares /= shares.sum(0)
    return torch.cat([tensor * share for share in shares], axis)


def _mean(tensor: Tensor, axis: int, factor: int) -> Tensor:
    """Of the `factor` parts that lie one behind the other along `axis`."""
    return torch.stack(tensor.chunk(factor, axis)).mean(0)
