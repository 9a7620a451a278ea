"""The U-Net, as in Ronneberger, Fischer and Brox 2015 (https://arxiv.org/abs/1505.04597).

The network is a letter U. Down its left side the image shrinks while the number of features
grows: the network learns *what* is in the image and loses track of *where*. Up the right side the
resolution is restored. At each level a skip connection adds the left side's features of the same
resolution, which say *where*::

    image ─▶ ■■ 64 ──────────────── skip ────────────────▶ ■■■ 64 ─▶ 1×1 ─▶ logits
              ▼ ■■ 128 ──────────── skip ──────────▶ ■■■ 128 ▲
                 ▼ ■■ 256 ───────── skip ────▶ ■■■ 256 ▲
                    ▼ ■■ 512 ────── skip ▶ ■■■ 512 ▲
                       ▼ ■■ 1024 (middle) ▲

Names and arithmetic are those of the annotated implementation (labml.ai), so that its state dicts
load unchanged. One thing differs from the paper: the 3×3 convolutions are padded, so the output is
as large as the input. `padding=0` gives the paper's own network, 572 -> 388.

Knows no images, files or training.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from model.config import DIVISOR, LEVELS, UNetConfig


class DoubleConvolution(nn.Module):
    """Two 3×3 convolutions, each followed by a ReLU: the block that the whole U repeats.

    Unpadded, each convolution takes one pixel off every side (paper, section 2).

    Args:
        in_channels: channels in, shape (N, in_channels, H, W).
        out_channels: channels out, shape (N, out_channels, H - 4 + 4·padding, same for W).
        padding: 1 keeps the size; 0 is the paper's network.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=padding)
        self.act1 = nn.ReLU()
        self.second = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=padding)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.first(x))
        return self.act2(self.second(x))  # type: ignore[no-any-return]


class DownSample(nn.Module):
    """2×2 max-pooling with stride 2: half the height and width, on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)  # type: ignore[no-any-return]


class UpSample(nn.Module):
    """A 2×2 "up-convolution" with stride 2: twice the height and width, half the channels.

    Its kernels do not overlap: each input pixel writes a 2×2 patch of its own.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)  # type: ignore[no-any-return]


class CropAndConcat(nn.Module):
    """Skip connection: join the features of the contracting path to the up-sampled ones.

    The skip is cropped at the centre, because unpadded convolutions removed its counterpart's
    border. With `padding=1` both sizes agree and nothing is cropped. Up-sampled channels come
    first: checkpoints depend on the order.
    """

    def forward(self, x: Tensor, contracting_x: Tensor) -> Tensor:
        return torch.cat([x, crop_center(contracting_x, *x.shape[-2:])], dim=1)


def crop_center(x: Tensor, height: int, width: int) -> Tensor:
    """Return the (..., height, width) at the center of a tensor, a view."""
    top = _halve(x.shape[-2] - height)
    left = _halve(x.shape[-1] - width)
    return x[..., top : top + height, left : left + width]


def _halve(number: int) -> int:
    """Round number / 2 half to even, like the annotated implementation.

    `round` is not defined for the tensors that stand for sizes while the network is traced.
    """
    half = number // 2
    return half + number % 2 * (half % 2)


class UNet(nn.Module):
    """The network. `UNet(3, 1)` has 31,031,745 parameters.

    Args:
        in_channels: channels of the image, 3 for RGB.
        out_channels: channels of the logits: one per class, or 1 for foreground against background.
        base_features: features at the top of the U, doubled at each of the four levels down.
        padding: of the 3×3 convolutions; 0 is the paper's network.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        base_features: int = 64,
        padding: int = 1,
    ) -> None:
        super().__init__()
        self.config = UNetConfig(in_channels, out_channels, base_features, padding)
        widths = [base_features * 2**level for level in range(LEVELS + 1)]  # 64 .. 1024
        levels = list(pairwise(widths))  # (64, 128) ... (512, 1024)

        # Contracting path: convolve, keep the result for the skip, pool.
        self.down_conv = nn.ModuleList(
            DoubleConvolution(i, o, padding) for i, o in [(in_channels, widths[0]), *levels[:-1]]
        )
        self.down_sample = nn.ModuleList(DownSample() for _ in levels)

        # Bottom of the U: the lowest resolution, each pixel with a receptive field of 140×140.
        self.middle_conv = DoubleConvolution(*levels[-1], padding)

        # Expansive path: up-convolve, join the skip (which doubles the channels), convolve.
        self.up_sample = nn.ModuleList(UpSample(o, i) for i, o in reversed(levels))
        self.concat = nn.ModuleList(CropAndConcat() for _ in levels)
        self.up_conv = nn.ModuleList(DoubleConvolution(o, i, padding) for i, o in reversed(levels))

        # One 1×1 convolution maps each pixel's features to its logits.
        self.final_conv = nn.Conv2d(widths[0], out_channels, kernel_size=1)

    @classmethod
    def from_config(cls, config: UNetConfig) -> UNet:
        """Build the network that a checkpoint describes, with new weights."""
        return cls(
            config.in_channels,
            config.out_channels,
            base_features=config.base_features,
            padding=config.padding,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of a batch of images.

        Args:
            x: (N, in_channels, H, W). With `padding=1`, H and W are multiples of 16.

        Returns:
            (N, out_channels, H, W) with `padding=1`; (N, out_channels, H - 184, W - 184) with
            `padding=0`.

        Raises:
            ValueError: the network does not take this shape; the message names valid sizes.
        """
        self._check(x)
        skips = []
        for convolve, shrink in zip(self.down_conv, self.down_sample, strict=True):
            x = convolve(x)
            skips.append(x)
            x = shrink(x)
        x = self.middle_conv(x)
        for grow, join, convolve in zip(self.up_sample, self.concat, self.up_conv, strict=True):
            x = convolve(join(grow(x), skips.pop()))
        return self.final_conv(x)  # type: ignore[no-any-return]

    def _check(self, x: Tensor) -> None:
        wanted = self.config.in_channels
        if x.ndim != 4 or x.shape[1] != wanted:
            raise ValueError(f"the network takes (N, {wanted}, H, W), not {tuple(x.shape)}")
        height, width = x.shape[-2:]
        if self.config.padding == 1:
            if height < DIVISOR or width < DIVISOR or height % DIVISOR or width % DIVISOR:
                nearest = " x ".join(
                    str(max(DIVISOR, -(-size // DIVISOR) * DIVISOR)) for size in (height, width)
                )
                raise ValueError(
                    f"height and width must be multiples of {DIVISOR} (16, 32, 48, ...), not "
                    f"{height} x {width}: pad to {nearest}"
                )
        elif min(height, width) < 188:
            raise ValueError(
                f"an unpadded network takes at least 188 x 188 (best: 188, 204, ..., 572, which "
                f"are multiples of {DIVISOR} plus 12), not {height} x {width}"
            )
