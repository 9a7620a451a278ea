"""Batch normalization during training, folded into the convolutions when weights are exported.

The network of the paper has no batch normalization, and checkpoints hold only its layers. Without
it, however, training from scratch makes no progress for about a hundred steps, and needs a small
learning rate. Batch normalization (Ioffe & Szegedy 2015) between a convolution and its ReLU is
linear once its statistics are fixed. `fold_batch_norm` therefore merges it exactly into the
convolution: names and shapes of the tensors, and the function, stay the same. `add_batch_norm` is
exact as well, so a plain checkpoint can be trained further.

Knows the network; no data, no files.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.unet import DoubleConvolution, UNet

_MOMENTUM = 0.05
"""Weight of a new batch in the running statistics, which average about twenty batches."""
_EPSILON = 1e-5


class NormalizedConvolution(nn.Conv2d):
    """A convolution followed by batch normalization.

    Each channel of the output has mean `bias` and standard deviation `gain`.

    Args:
        plain: the convolution whose weights and bias it takes over.
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
        self.calibrating = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, None, self.stride, self.padding)
        if self.calibrating:
            self._calibrate(x)
        return F.batch_norm(
            x,
            self.mean,
            self.variance,
            self.gain,
            self.bias,
            training=self.training and not self.calibrating,
            momentum=_MOMENTUM,
            eps=_EPSILON,
        )

    @torch.no_grad()
    def _calibrate(self, x: Tensor) -> None:
        """Take the statistics of `x`, and set gain and bias so that they cancel."""
        variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        assert self.bias is not None
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.gain.copy_((variance + _EPSILON).sqrt())
        self.bias.add_(mean)

    def fold(self) -> nn.Conv2d:
        """Return the plain convolution that computes the same in evaluation mode."""
        assert self.bias is not None
        factor = self.gain / (self.variance + _EPSILON).sqrt()
        plain = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
        ).to(self.weight.device)
        assert plain.bias is not None
        plain.weight.copy_(self.weight * factor[:, None, None, None])
        plain.bias.copy_(self.bias - self.mean * factor)
        return plain


@torch.no_grad()
def add_batch_norm(network: UNet, inputs: Tensor | None = None) -> UNet:
    """Add batch normalization after every 3×3 convolution of a network.

    Args:
        network: changed in place.
        inputs: (N, C, H, W), a batch for a network that is already trained: with the statistics of
            this batch the network still computes the same. None: every channel starts with mean 0
            and standard deviation 1.

    Returns:
        `network`.
    """
    for block in network.modules():
        if isinstance(block, DoubleConvolution):
            block.first = NormalizedConvolution(block.first).to(block.first.weight.device)
            block.second = NormalizedConvolution(block.second).to(block.second.weight.device)
    if inputs is not None:
        # One pass is enough: each layer's output is unchanged, so the next layer sees what it saw.
        layers = [each for each in network.modules() if isinstance(each, NormalizedConvolution)]
        for layer in layers:
            layer.calibrating = True
        network(inputs)
        for layer in layers:
            layer.calibrating = False
    return network


@torch.no_grad()
def fold_batch_norm(network: UNet) -> UNet:
    """Return a copy without batch normalization that computes the same in evaluation mode."""
    plain = copy.deepcopy(network)
    for block in plain.modules():
        if isinstance(block, DoubleConvolution):
            if isinstance(block.first, NormalizedConvolution):
                block.first = block.first.fold()
            if isinstance(block.second, NormalizedConvolution):
                block.second = block.second.fold()
    return plain
