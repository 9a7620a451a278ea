"""Batch normalisation for the training alone: folded into the convolutions before anything ships.

The network of the paper has none, and a checkpoint of it is to load everywhere. But without one,
training from scratch stands still for a hundred steps and bears small learning rates only. Between
a convolution and its ReLU, batch normalisation (Ioffe & Szegedy 2015) is linear once its statistics
are fixed, so a trained one becomes part of the convolution, exactly: the same names, the same
shapes, the same function (`folded`). The way in is as exact (`normalised`), so that a plain
checkpoint can be trained on.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.unet import DoubleConvolution, UNet

_MOMENTUM = 0.05
"""Of the running statistics: an average over about twenty batches."""
_EPSILON = 1e-5


class NormalisedConvolution(nn.Conv2d):
    """A convolution whose output has mean `bias` and standard deviation `gain`, a channel each.

    Args:
        plain: the convolution whose weights and bias it starts from.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__(
            plain.in_channels,
            plain.out_channels,
            plain.kernel_size,  # type: ignore[arg-type]
            padding=plain.padding,  # type: ignore[arg-type]
        )
        self.load_state_dict(plain.state_dict())
        self.gain = nn.Parameter(torch.ones(plain.out_channels))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(plain.out_channels))
        self.register_buffer("variance", torch.ones(plain.out_channels))
        self.adopting = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, None, self.stride, self.padding)
        if self.adopting:
            self._adopt(x)
        return F.batch_norm(
            x,
            self.mean,
            self.variance,
            self.gain,
            self.bias,
            training=self.training and not self.adopting,
            momentum=_MOMENTUM,
            eps=_EPSILON,
        )

    @torch.no_grad()
    def _adopt(self, x: Tensor) -> None:
        """Take the statistics of `x`, and the gain and bias that give back what was plain."""
        variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        assert self.bias is not None
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.gain.copy_((variance + _EPSILON).sqrt())
        self.bias.add_(mean)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain convolution that computes the same."""
        assert self.bias is not None
        factor = self.gain / (self.variance + _EPSILON).sqrt()
        return self.weight * factor[:, None, None, None], self.bias - self.mean * factor


@torch.no_grad()
def normalise_convolutions(network: UNet, inputs: Tensor | None = None) -> UNet:
    """Put batch normalisation behind every 3×3 convolution of `network`.

    Args:
        network: changed, and given back.
        inputs: (N, C, H, W), a batch on whose statistics the network stays the function it is, for
            one that is trained already. None: every channel starts with mean 0 and deviation 1.
    """
    for block in network.modules():
        if isinstance(block, DoubleConvolution):
            block.first = NormalisedConvolution(block.first).to(block.first.weight.device)
            block.second = NormalisedConvolution(block.second).to(block.second.weight.device)
    if inputs is not None:
        # In one pass: what a layer gives is what it gave before, so the next sees what it saw.
        for layer in _normalised(network):
            layer.adopting = True
        network(inputs)
        for layer in _normalised(network):
            layer.adopting = False
    return network


@torch.no_grad()
def fold(network: UNet) -> UNet:
    """A plain copy of `network` that computes what it computes in evaluation mode."""
    plain = copy.deepcopy(network)
    for block in plain.modules():
        if isinstance(block, DoubleConvolution):
            block.first, block.second = _plain(block.first), _plain(block.second)
    return plain


def _plain(layer: nn.Conv2d) -> nn.Conv2d:
    if not isinstance(layer, NormalisedConvolution):
        return layer
    weight, bias = layer.folded()
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
    ).to(weight.device)
    plain.weight.copy_(weight)
    assert plain.bias is not None
    plain.bias.copy_(bias)
    return plain


def _normalised(network: UNet) -> list[NormalisedConvolution]:
    return [layer for layer in network.modules() if isinstance(layer, NormalisedConvolution)]
