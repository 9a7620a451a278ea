"""U-Nets of other implementations, written down from their descriptions, with their names."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)  # type: ignore[no-any-return]


class Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)  # type: ignore[no-any-return]


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
        self.conv = DoubleConv(inputs, outputs)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(below)], dim=1))  # type: ignore[no-any-return]


class OutConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class Milesial(nn.Module):
    """The architecture of milesial/Pytorch-UNet with bilinear=False, from its description."""

    def __init__(self, classes: int, base: int) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(5)]
        self.inc = DoubleConv(3, base)
        for level in range(4):
            setattr(self, f"down{level + 1}", Down(widths[level], widths[level + 1]))
            setattr(self, f"up{level + 1}", Up(widths[4 - level], widths[3 - level]))
        self.outc = OutConv(base, classes)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for level in range(1, 5):
            skips.append(getattr(self, f"down{level}")(skips[-1]))
        x = skips.pop()
        for level in range(1, 5):
            x = getattr(self, f"up{level}")(x, skips.pop())
        return self.outc(x)  # type: ignore[no-any-return]


class Mateuszbuda(nn.Module):
    """The architecture of mateuszbuda/brain-segmentation-pytorch, without its last sigmoid."""

    def __init__(self, classes: int, base: int) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(5)]
        for level, (inputs, outputs) in enumerate(zip([3, *widths], widths, strict=False), 1):
            name = f"encoder{level}" if level < 5 else "bottleneck"
            setattr(self, name, self.block(inputs, outputs, name.replace("oder", "")))
        for level in range(4, 0, -1):
            width = widths[level - 1]
            setattr(self, f"upconv{level}", nn.ConvTranspose2d(2 * width, width, 2, stride=2))
            setattr(self, f"decoder{level}", self.block(2 * width, width, f"dec{level}"))
        self.conv = nn.Conv2d(base, classes, 1)

    @staticmethod
    def block(inputs: int, outputs: int, name: str) -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, channels in ((1, inputs), (2, outputs)):
            layers[f"{name}conv{index}"] = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
            layers[f"{name}norm{index}"] = nn.BatchNorm2d(outputs)
            layers[f"{name}relu{index}"] = nn.ReLU()
        return nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in range(1, 5):
            skips.append(getattr(self, f"encoder{level}")(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottleneck(x)  # type: ignore[operator]
        for level in range(4, 0, -1):
            x = torch.cat([getattr(self, f"upconv{level}")(x), skips.pop()], dim=1)
            x = getattr(self, f"decoder{level}")(x)
        return self.conv(x)  # type: ignore[no-any-return]


class JvanvugtBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, padding: int, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=padding), nn.ReLU()]
            layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


class JvanvugtUp(nn.Module):
    def __init__(self, inputs: int, outputs: int, padding: int, batch_norm: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.conv_block = JvanvugtBlock(inputs, outputs, padding, batch_norm)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        up = self.up(below)
        top, left = (skip.shape[2] - up.shape[2]) // 2, (skip.shape[3] - up.shape[3]) // 2
        cropped = skip[:, :, top : top + up.shape[2], left : left + up.shape[3]]
        return self.conv_block(torch.cat([up, cropped], 1))  # type: ignore[no-any-return]


class Jvanvugt(nn.Module):
    """The architecture of jvanvugt/pytorch-unet with up_mode="upconv" and maximum pooling."""

    def __init__(
        self, classes: int, base: int, padding: int = 0, batch_norm: bool = False, depth: int = 5
    ) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(depth)]
        self.down_path = nn.ModuleList(
            JvanvugtBlock(inputs, outputs, padding, batch_norm)
            for inputs, outputs in zip([3, *widths], widths, strict=False)
        )
        self.up_path = nn.ModuleList(
            JvanvugtUp(2 * width, width, padding, batch_norm) for width in reversed(widths[:-1])
        )
        self.last = nn.Conv2d(base, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down_path:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = skips.pop()
        for up in self.up_path:
            x = up(x, skips.pop())
        return self.last(x)  # type: ignore[no-any-return]


def trained(network: nn.Module, lowest_factor: float = 0.5) -> Any:
    """Give the network batch statistics as after training, and logits of usual size."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, lowest_factor, 2)
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 2)
    return network.eval()
