"""The network as the torch engines run it: from the bytes of windows to probabilities.

`WindowNetwork` computes what `model.unet.UNet` computes. With fused layers a 3×3 convolution, its
bias and its ReLU are one kernel: as three, the last two read and write every activation again. The
first and the last layer get eight channels, the fewest that tensor cores multiply; the weights of
the added channels are zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpoint import Checkpoint
from model.predict import build_network
from model.transforms import normalize, probabilities
from model.unet import DoubleConvolution, UNet

_CHANNELS = 8
"""Tensor cores multiply blocks of so many 16-bit channels."""

ConvolveFn = Callable[[Tensor, nn.Conv2d], Tensor]
"""Computes a convolution with its bias, and a ReLU."""


def convolve_by_cudnn(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Compute a convolution, its bias and a ReLU in one kernel of cuDNN."""
    assert isinstance(layer.padding, tuple)
    return torch.cudnn_convolution_relu(
        x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


class FusedUNet(nn.Module):
    """A `UNet` for inference with fused layers, and padded channels at both ends.

    Args:
        unet: its other layers are shared.
        convolve: computes a 3×3 convolution.
    """

    def __init__(self, unet: UNet, convolve: ConvolveFn = convolve_by_cudnn) -> None:
        super().__init__()
        self._unet = unet
        self._convolve = convolve
        self._out_channels = unet.config.out_channels
        self._padding = max(0, _CHANNELS - unet.config.in_channels)
        entry = unet.down_conv[0]
        assert isinstance(entry, DoubleConvolution)
        self.first = _pad(entry.first, inputs=self._padding)
        self.last = _pad(unet.final_conv, outputs=max(0, _CHANNELS - self._out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, as `UNet.forward`."""
        unet = self._unet
        x = F.pad(x, (0, 0, 0, 0, 0, self._padding)).contiguous(memory_format=torch.channels_last)
        skips = []
        for level, (block, shrink) in enumerate(zip(unet.down_conv, unet.down_sample, strict=True)):
            x = self._convolve_twice(x, block, None if level else self.first)
            skips.append(x)
            x = shrink(x)
        x = self._convolve_twice(x, unet.middle_conv)
        for grow, join, block in zip(unet.up_sample, unet.concat, unet.up_conv, strict=True):
            x = self._convolve_twice(join(grow(x), skips.pop()), block)
        return self.last(x)[:, : self._out_channels]  # type: ignore[no-any-return]

    def _convolve_twice(
        self, x: Tensor, block: nn.Module, first: nn.Conv2d | None = None
    ) -> Tensor:
        assert isinstance(block, DoubleConvolution)
        return self._convolve(self._convolve(x, first or block.first), block.second)


def _pad(layer: nn.Conv2d, inputs: int = 0, outputs: int = 0) -> nn.Conv2d:
    """Return a convolution with more channels, whose weights are zero."""
    out_channels, in_channels, *kernel = layer.weight.shape
    padded = nn.Conv2d(
        in_channels + inputs,
        out_channels + outputs,
        (kernel[0], kernel[1]),
        padding=layer.padding,  # type: ignore[arg-type]
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    assert layer.bias is not None
    assert padded.bias is not None
    weight = F.pad(layer.weight.detach(), (0, 0, 0, 0, 0, inputs, 0, outputs))
    padded.weight.data = weight.contiguous(memory_format=torch.channels_last)
    padded.bias.data = F.pad(layer.bias.detach(), (0, outputs))
    return padded


class WindowNetwork(nn.Module):
    """A checkpoint's network on one device, with what comes before and after it.

    Args:
        dtype: of the activations.

    Attributes:
        unet: computes logits.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.unet: nn.Module = (
            build_network(checkpoint)
            .eval()
            .to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        )
        self._preprocess = checkpoint.preprocess
        self._dtype = dtype

    def forward(self, windows: Tensor) -> Tensor:
        """Compute (n, h, w, C) uint8 -> (n, channels, h', w') float32 in 0..1, on the device."""
        inputs = normalize(windows, self._preprocess)
        inputs = inputs.to(dtype=self._dtype, memory_format=torch.channels_last)
        return probabilities(self.unet(inputs), self._preprocess)
