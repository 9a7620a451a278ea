"""The network as the torch engines run it: from the bytes of windows to probabilities.

`WindowNetwork` computes what `model.unet.UNet` computes. With fused layers a 3×3 convolution, its
bias and its ReLU are one kernel: as three, the last two read and write every activation again. The
first and the last layer get eight channels, the fewest that tensor cores multiply; the weights of
the added channels are zero.

An up-convolution may be a matrix product: its 2×2 kernels do not overlap, so each pixel's patch is
a product of its channels and one matrix. The patches are moved to their places in the joined
tensor, where a transposed convolution, its bias and the concatenation each write all of it.

Max-pooling may be two maxima, of rows and of columns: torch's kernel also writes the index of each
maximum, eight bytes for a value of two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpoint import Checkpoint
from model.config import LEVELS
from model.predict import build_network
from model.transforms import normalize, probabilities
from model.unet import DoubleConvolution, UNet, crop_center

_CHANNELS = 8
"""Tensor cores multiply blocks of so many 16-bit channels."""

ConvolveFn = Callable[[Tensor, nn.Conv2d], Tensor]
"""Computes a convolution with its bias, and a ReLU."""
JoinFn = Callable[[Tensor, Tensor], Tensor]
"""Up-samples a tensor, and joins a skip connection to it."""


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
        grow_by_product: up-convolutions are matrix products.
        pool_by_maxima: max-pooling is two maxima.
    """

    def __init__(
        self,
        unet: UNet,
        convolve: ConvolveFn = convolve_by_cudnn,
        *,
        grow_by_product: bool = False,
        pool_by_maxima: bool = False,
    ) -> None:
        super().__init__()
        self._unet = unet
        self._convolve = convolve
        self._join: list[JoinFn] = [
            ProductJoin(grow.up) if grow_by_product else _join_by_layers(grow, join)  # type: ignore[arg-type]
            for grow, join in zip(unet.up_sample, unet.concat, strict=True)
        ]
        self._shrink: list[Callable[[Tensor], Tensor]] = (
            [pool_by_maxima_of_halves] * LEVELS if pool_by_maxima else list(unet.down_sample)
        )
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
        for level, (block, shrink) in enumerate(zip(unet.down_conv, self._shrink, strict=True)):
            x = self._convolve_twice(x, block, None if level else self.first)
            skips.append(x)
            x = shrink(x)
        x = self._convolve_twice(x, unet.middle_conv)
        for join, block in zip(self._join, unet.up_conv, strict=True):
            x = self._convolve_twice(join(x, skips.pop()), block)
        return self.last(x)[:, : self._out_channels]  # type: ignore[no-any-return]

    def _convolve_twice(
        self, x: Tensor, block: nn.Module, first: nn.Conv2d | None = None
    ) -> Tensor:
        assert isinstance(block, DoubleConvolution)
        return self._convolve(self._convolve(x, first or block.first), block.second)


def _join_by_layers(grow: nn.Module, join: nn.Module) -> JoinFn:
    return lambda x, skip: join(grow(x), skip)


class ProductJoin:
    """Compute an up-convolution as a matrix product, and join a skip connection to it.

    Args:
        up: the up-convolution.
    """

    def __init__(self, up: nn.ConvTranspose2d) -> None:
        assert up.kernel_size == up.stride == (2, 2)
        assert up.bias is not None
        weight = up.weight.detach()  # (in, out, 2, 2)
        self._matrix = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()
        self._bias = up.bias.detach().repeat(4)

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        """Compute (n, in, h, w) and (n, c, H, W) -> (n, out + c, 2h, 2w) in channels-last order.

        The skip is cropped at its center, as by `model.unet.CropAndConcat`.
        """
        count, inputs, height, width = x.shape
        skip = crop_center(skip, 2 * height, 2 * width).permute(0, 2, 3, 1)
        rows = x.permute(0, 2, 3, 1).reshape(-1, inputs)  # no copy: channels come last
        patches = torch.addmm(self._bias, rows, self._matrix)
        patches = patches.view(count, height, width, 2, 2, -1).transpose(2, 3)
        outputs = patches.shape[-1]
        joined = x.new_empty(count, 2 * height, 2 * width, outputs + skip.shape[-1])
        _move(joined[..., :outputs].view(count, height, 2, width, 2, outputs), patches)
        _move(joined[..., outputs:], skip)
        return joined.permute(0, 3, 1, 2)


def pool_by_maxima_of_halves(x: Tensor) -> Tensor:
    """Compute 2×2 max-pooling of (n, c, h, w) in channels-last order, h and w even."""
    rows = x.permute(0, 2, 3, 1)
    rows = torch.maximum(rows[:, ::2], rows[:, 1::2])
    columns = torch.maximum(rows[:, :, ::2], rows[:, :, 1::2])
    return columns.permute(0, 3, 1, 2)


def _move(target: Tensor, source: Tensor) -> None:
    """Copy a tensor, by 16 bytes at a time if the channels allow it; torch copies by elements."""
    values = 16 // target.element_size()
    if target.shape[-1] % values == 0 and all(
        stride % values == 0 for tensor in (target, source) for stride in tensor.stride()[:-1]
    ):
        target, source = (each.view(torch.complex128) for each in (target, source))
    target.copy_(source)


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
