"""A wider network that computes what a narrow one computes: where training a wide one may start.

Net2WiderNet (Chen, Goodfellow & Shlens 2016, section 2.1), for factors that are whole numbers:
every feature is there `factor` times, and whoever reads a feature reads all its copies, with shares
of the old weight that sum to it. The shares are random, one draw a weight, so that the copies get
different gradients and grow apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import ConfigError, UNetConfig


def widen(
    state: Mapping[str, Tensor], config: UNetConfig, wider: UNetConfig, seed: int = 0
) -> dict[str, Tensor]:
    """The state dict of `wider` that computes what `state` computes.

    Args:
        state: of a `model.unet.UNet` of `config`.
        wider: the same network with a multiple of its `base_features`.

    Raises:
        ConfigError: it is another network, or no multiple.
    """
    factor, rest = divmod(wider.base_features, config.base_features)
    if rest or (config.in_channels, config.out_channels, config.padding) != (
        wider.in_channels,
        wider.out_channels,
        wider.padding,
    ):
        raise ConfigError(
            f"{wider} cannot start from {config}: channels and padding must agree, and "
            f"base_features be a multiple of {config.base_features}"
        )
    rng = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        first, last = name == "down_conv.0.first.weight", name.startswith("final_conv")
        if name.endswith(".bias"):
            result[name] = tensor.clone() if last else tensor.repeat(factor)
            continue
        # (out, in, h, w), but (in, out, h, w) in an up-convolution
        inputs, outputs = (0, 1) if ".up." in name else (1, 0)
        if not last:
            tensor = _repeated(tensor, outputs, factor)
        if not first:
            # what is concatenated was repeated half by half: the up-sampled, then the skip
            halves = 2 if name.startswith("up_conv") and ".first." in name else 1
            parts = tensor.chunk(halves, inputs)
            tensor = torch.cat([_shared(part, inputs, factor, rng) for part in parts], inputs)
        result[name] = tensor.contiguous()
    return result


def _repeated(tensor: Tensor, axis: int, factor: int) -> Tensor:
    return torch.cat([tensor] * factor, axis)


def _shared(tensor: Tensor, axis: int, factor: int, rng: torch.Generator) -> Tensor:
    """`factor` parts, which sum to `tensor`, one behind the other along `axis`."""
    shares = torch.rand(factor, *tensor.shape, generator=rng) + 0.5
    shares /= shares.sum(0)
    return torch.cat([tensor * share for share in shares], axis)
