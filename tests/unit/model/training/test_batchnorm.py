"""Batch normalisation comes and goes without changing the function."""

import copy

import pytest
import torch

from model.training.batchnorm import NormalisedConvolution, fold, normalise_convolutions
from model.unet import UNet


@pytest.fixture
def network():
    torch.manual_seed(0)
    return UNet(3, 2, base_features=4)


@pytest.fixture
def inputs():
    return torch.randn(4, 3, 64, 48, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_trained_network_stays_the_function_it_is(network, inputs):
    expected = network(inputs)
    normalised = normalise_convolutions(copy.deepcopy(network), inputs)
    in_training = normalised.train()(inputs)
    assert torch.allclose(in_training, expected, atol=1e-5)
    assert torch.allclose(normalised.eval()(inputs), expected, atol=2e-3)  # stats moved a little


@torch.no_grad()
def test_folding_keeps_names_shapes_and_function(network, inputs):
    normalised = normalise_convolutions(copy.deepcopy(network)).train()
    for _ in range(3):
        normalised(inputs * 2 + 1)  # statistics that are not those it began with
    for layer in normalised.modules():
        if isinstance(layer, NormalisedConvolution):
            layer.gain.uniform_(0.5, 2)
            layer.bias.normal_()
    normalised.eval()
    plain = fold(normalised)
    assert {name: t.shape for name, t in plain.state_dict().items()} == {
        name: t.shape for name, t in network.state_dict().items()
    }
    assert not any(isinstance(layer, NormalisedConvolution) for layer in plain.modules())
    assert torch.allclose(plain(inputs), normalised(inputs), atol=1e-4, rtol=1e-4)


def test_a_network_without_it_is_only_copied(network, inputs):
    plain = fold(network)
    assert plain is not network
    assert torch.equal(plain(inputs), network(inputs))
