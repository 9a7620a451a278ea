"""The network equals the annotated implementation: same names, same parameters, same logits."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from model.config import UNetConfig
from model.unet import CropAndConcat, UNet


class Plain(nn.Module):
    """The same network from a state dict and functional calls alone."""

    def __init__(self, state: dict[str, torch.Tensor], padding: int) -> None:
        super().__init__()
        self.state = state
        self.padding = padding

    def convolve_twice(self, x: torch.Tensor, name: str) -> torch.Tensor:
        for each in ("first", "second"):
            weight, bias = self.state[f"{name}.{each}.weight"], self.state[f"{name}.{each}.bias"]
            x = torch.relu(torch.conv2d(x, weight, bias, padding=self.padding))
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level in range(4):
            x = self.convolve_twice(x, f"down_conv.{level}")
            skips.append(x)
            x = torch.max_pool2d(x, 2)
        x = self.convolve_twice(x, "middle_conv")
        for level in range(4):
            name = f"up_sample.{level}.up"
            x = torch.conv_transpose2d(
                x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride=2
            )
            skip = skips.pop()
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            skip = skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]
            x = self.convolve_twice(torch.cat((x, skip), 1), f"up_conv.{level}")
        return torch.conv2d(x, self.state["final_conv.weight"], self.state["final_conv.bias"])


def test_network_has_as_many_parameters_as_the_papers() -> None:
    assert sum(each.numel() for each in UNet(3, 1).parameters()) == 31_031_745


def test_state_dict_has_the_annotated_names() -> None:
    names = set(UNet(3, 1, base_features=4).state_dict())
    doubles = [f"{path}.{n}" for path in ("down_conv", "up_conv") for n in range(4)]
    layers = [
        f"{double}.{each}" for double in (*doubles, "middle_conv") for each in ("first", "second")
    ]
    layers += [f"up_sample.{n}.up" for n in range(4)] + ["final_conv"]
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize(("padding", "size"), [(1, (64, 96)), (1, (16, 16)), (0, (188, 220))])
def test_logits_equal_the_plain_network(padding: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = UNet(3, 2, base_features=8, padding=padding)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = network(x)
        expected = Plain(network.state_dict(), padding)(x)
    assert logits.shape[:2] == (2, 2)
    assert (logits - expected).abs().max() <= 1e-5


def test_full_width_logits_equal_the_plain_network() -> None:
    torch.manual_seed(1)
    network = UNet(3, 1)
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert (network(x) - Plain(network.state_dict(), 1)(x)).abs().max() <= 1e-5


def test_padded_network_keeps_the_size() -> None:
    assert UNet(1, 3, base_features=2)(torch.zeros(1, 1, 80, 48)).shape == (1, 3, 80, 48)


def test_unpadded_network_has_the_papers_sizes() -> None:
    network = UNet(1, 2, base_features=2, padding=0)
    assert network(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert network(torch.zeros(1, 1, 188, 572)).shape == (1, 2, 4, 388)


@pytest.mark.parametrize("size", [(100, 64), (64, 100), (8, 16), (0, 16)])
def test_error_for_an_invalid_size_names_valid_ones(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=re.escape("multiples of 16 (16, 32, 48, ...)")):
        UNet(3, 1, base_features=2)(torch.zeros(1, 3, *size))


def test_error_names_the_nearest_valid_size() -> None:
    with pytest.raises(ValueError, match="pad to 112 x 64"):
        UNet(3, 1, base_features=2)(torch.zeros(1, 3, 100, 64))


def test_unpadded_network_rejects_small_images() -> None:
    with pytest.raises(ValueError, match="at least 188 x 188"):
        UNet(3, 1, base_features=2, padding=0)(torch.zeros(1, 3, 187, 300))


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32)])
def test_wrong_channels_or_dimensions_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(N, 3, H, W\)"):
        UNet(3, 1, base_features=2)(torch.zeros(*shape))


def test_network_is_rebuilt_from_its_config() -> None:
    config = UNetConfig(2, 5, base_features=4, padding=0)
    network = UNet.from_config(config)
    assert network.config == config
    assert network.final_conv.weight.shape == (5, 4, 1, 1)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and reports every check of a shape
def test_network_can_be_traced(padding: int) -> None:
    network = UNet(3, 1, base_features=2, padding=padding).eval()
    x = torch.randn(1, 3, 192, 208) if padding else torch.randn(1, 3, 188, 204)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(network, x)(x), network(x))


def test_skip_is_cropped_as_in_the_annotated_implementation() -> None:
    for larger in range(20):
        for smaller in range(1, larger):
            start = round((larger - smaller) / 2)
            joined = CropAndConcat()(
                torch.zeros(1, 1, smaller, 1), torch.arange(larger).view(1, 1, -1, 1)
            )
            assert joined[0, 1, 0, 0] == start
