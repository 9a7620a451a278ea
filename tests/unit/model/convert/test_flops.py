"""The count of operations agrees with the network itself."""

import pytest
import torch

from model.config import UNetConfig
from model.convert.flops import flops
from model.unet import UNet


def counted(config: UNetConfig, height: int, width: int) -> int:
    """By watching the convolutions of a network without storage: 2 for each multiply-add."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        taps = module.weight[0, 0].numel()
        if isinstance(module, torch.nn.ConvTranspose2d):
            taps //= module.stride[0] * module.stride[1]
        total += 2 * output.numel() * module.in_channels * taps

    with torch.device("meta"):
        network = UNet.from_config(config)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.register_forward_hook(count)
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
def test_it_is_what_the_network_does(config, height, width):
    assert flops(config, height, width) == counted(config, height, width)


def test_the_figure_that_speeds_are_told_by():
    assert flops(UNetConfig(), 512, 512) == pytest.approx(385.3e9, rel=1e-3)
