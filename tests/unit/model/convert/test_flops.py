"""The number of operations equals what the network's convolutions compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.config import UNetConfig
from model.convert.flops import count_flops
from model.unet import UNet


def observe_flops(config: UNetConfig, height: int, width: int) -> int:
    """Sum the operations of a network's convolutions, 2 per multiply-add, without storage."""
    total = 0

    def add(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        taps = module.weight[0, 0].numel()
        if isinstance(module, nn.ConvTranspose2d):
            taps //= module.stride[0] * module.stride[1]
        total += 2 * output.numel() * module.in_channels * taps

    with torch.device("meta"):
        network = UNet.from_config(config)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.register_forward_hook(add)
        network(torch.empty(1, config.in_channels, height, width))
    return total


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (UNetConfig(), 512, 512),
        (UNetConfig(1, 2, 8), 48, 80),
        (UNetConfig(3, 2, 64, padding=0), 572, 572),
        (UNetConfig(3, 1, 4, padding=0), 204, 220),
    ],
)
def test_count_equals_the_networks_convolutions(
    config: UNetConfig, height: int, width: int
) -> None:
    assert count_flops(config, height, width) == observe_flops(config, height, width)


def test_default_network_at_512_pixels_takes_385_gflop() -> None:
    assert count_flops(UNetConfig(), 512, 512) == pytest.approx(385.3e9, rel=1e-3)
