"""Batch normalization can be added and folded without changing the function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from model.training.batchnorm import NormalizedConvolution, add_batch_norm, fold_batch_norm
from model.unet import UNet


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(3, 2, base_features=4)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(4, 3, 64, 48, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_adding_it_to_a_trained_network_keeps_the_function(network: UNet, inputs: Tensor) -> None:
    expected = network(inputs)
    normalized = add_batch_norm(copy.deepcopy(network), inputs)
    in_training = normalized.train()(inputs)
    assert torch.allclose(in_training, expected, atol=1e-5)
    assert torch.allclose(normalized.eval()(inputs), expected, atol=2e-3)  # statistics moved


@torch.no_grad()
def test_folding_keeps_names_shapes_and_function(network: UNet, inputs: Tensor) -> None:
    normalized = add_batch_norm(copy.deepcopy(network)).train()
    for _ in range(3):
        normalized(inputs * 2 + 1)  # so that the statistics differ from the initial ones
    for layer in normalized.modules():
        if isinstance(layer, NormalizedConvolution):
            layer.gain.uniform_(0.5, 2)
            assert layer.bias is not None
            layer.bias.normal_()
    normalized.eval()
    plain = fold_batch_norm(normalized)
    assert {name: t.shape for name, t in plain.state_dict().items()} == {
        name: t.shape for name, t in network.state_dict().items()
    }
    assert not any(isinstance(layer, NormalizedConvolution) for layer in plain.modules())
    assert torch.allclose(plain(inputs), normalized(inputs), atol=1e-4, rtol=1e-4)


def test_folding_a_plain_network_copies_it(network: UNet, inputs: Tensor) -> None:
    plain = fold_batch_norm(network)
    assert plain is not network
    assert torch.equal(plain(inputs), network(inputs))
