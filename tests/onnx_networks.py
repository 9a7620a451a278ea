"""Networks of torch that tests export to ONNX. Needs torch and onnx alone."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn


class Net(nn.Module):
    """A small network; `levels` poolings, skipped at each level, and `ending` at its end."""

    def __init__(
        self,
        channels: int = 3,
        outputs: int = 1,
        levels: int = 0,
        padding: int = 1,
        ending: Any = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(channels, 4, 3, padding=padding)
        self.levels = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(levels))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.last = nn.Conv2d(4, outputs, 1)
        self.ending = ending or nn.Identity()

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        skips = []
        for level in self.levels:
            skips.append(x)
            x = level(F.max_pool2d(x, 2)).relu()
        for skip in reversed(skips):
            x = torch.cat([self.up(x), skip], 1)[:, :4]
        return self.ending(self.last(x))


def export(network: nn.Module, shape: tuple[int, ...] = (1, 3, 64, 64), **options: Any) -> bytes:
    """Export with free sizes, unless `dynamic_axes` says otherwise."""
    free = {0: "n", 2: "h", 3: "w"}
    options = {"dynamic_axes": {"x": free}, "input_names": ["x"], **options}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no other package is deprecated
        torch.onnx.export(network.eval(), torch.zeros(shape), buffer, dynamo=False, **options)
    return buffer.getvalue()


def convert_to_half(content: bytes) -> bytes:
    """Convert the weights, the input and the outputs of a graph to fp16."""
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.graph.value_info[:]
    return model.SerializeToString()


class Several(nn.Module):
    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(x) for network in self.networks)


class DoubleConv(nn.Sequential):
    """Two convolutions with normalization, of milesial/Pytorch-UNet."""

    def __init__(self, inputs: int, outputs: int, middle: int | None = None) -> None:
        middle = middle or outputs
        super().__init__(
            nn.Conv2d(inputs, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class BilinearUNet(nn.Module):
    """The architecture of milesial/Pytorch-UNet with bilinear=True, from its description."""

    def __init__(self, channels: int = 3, outputs: int = 1, base: int = 4) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(5)]
        widths[4] //= 2
        self.inc = DoubleConv(channels, base)
        self.down = nn.ModuleList(DoubleConv(*widths[level : level + 2]) for level in range(4))
        self.up = nn.ModuleList(
            DoubleConv(2 * wide, max(wide // 2, base), wide) for wide in reversed(widths[:4])
        )
        self.outc = nn.Conv2d(base, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for block in self.down:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for block in self.up:
            skip = skips.pop()
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            x = block(torch.cat([skip, x], dim=1))
        return self.outc(x)


def randomize_statistics(network: nn.Module) -> nn.Module:
    """Give layers of batch normalization the statistics of a trained network."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()
