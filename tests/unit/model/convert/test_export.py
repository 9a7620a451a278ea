"""Exported files hold the network: a state dict loads into the code that it is named for."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper
from safetensors.torch import load
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop

from model.checkpoint import load_checkpoint
from model.convert import export
from model.convert.export import export_onnx, export_state_dict
from model.convert.onnx import build_onnx
from model.errors import ExportError
from model.predict import build_network
from tests.conftest import write_tiny


# The annotated implementation (labml.ai, MIT), with the number of features as an argument.
class DoubleConvolution(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.act1 = nn.ReLU()
        self.second = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.second(self.act1(self.first(x))))


class DownSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


class UpSample(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class CropAndConcat(nn.Module):
    def forward(self, x: Tensor, contracting_x: Tensor) -> Tensor:
        contracting_x = center_crop(contracting_x, [x.shape[2], x.shape[3]])
        return torch.cat([x, contracting_x], dim=1)


class AnnotatedUNet(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, base: int) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(5)]
        pairs = list(pairwise(widths))
        down = [(in_channels, base), *pairs[:3]]
        self.down_conv = nn.ModuleList([DoubleConvolution(i, o) for i, o in down])
        self.down_sample = nn.ModuleList([DownSample() for _ in range(4)])
        self.middle_conv = DoubleConvolution(*pairs[3])
        self.up_sample = nn.ModuleList([UpSample(o, i) for i, o in pairs[::-1]])
        self.up_conv = nn.ModuleList([DoubleConvolution(o, i) for i, o in pairs[::-1]])
        self.concat = nn.ModuleList([CropAndConcat() for _ in range(4)])
        self.final_conv = nn.Conv2d(base, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        pass_through = []
        for i in range(len(self.down_conv)):
            x = self.down_conv[i](x)
            pass_through.append(x)
            x = self.down_sample[i](x)
        x = self.middle_conv(x)
        for i in range(len(self.up_conv)):
            x = self.up_sample[i](x)
            x = self.concat[i](x, pass_through.pop())
            x = self.up_conv[i](x)
        return self.final_conv(x)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_state_dict_loads_into_the_annotated_implementation(tmp_path: Path, suffix: str) -> None:
    write_tiny(tmp_path / "tiny.safetensors")
    checkpoint = load_checkpoint(tmp_path / "tiny.safetensors")
    content = export_state_dict(checkpoint, suffix)
    read = {
        ".pt": lambda data: torch.load(io.BytesIO(data), weights_only=True),
        ".safetensors": load,
    }
    state = read[suffix](content)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    theirs = AnnotatedUNet(3, 1, 4).eval()
    theirs.load_state_dict(state)
    x = torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = theirs(x) - build_network(checkpoint).eval()(x)
    assert difference.abs().max() < 1e-5


def test_graph_is_compared_with_the_reference(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.safetensors", classes=3)
    checkpoint = load_checkpoint(tmp_path / "tiny.safetensors")
    content, difference = export_onnx(checkpoint)
    assert 0 <= difference <= 1e-5
    assert ModelProto.FromString(content).graph.name == "tiny"


@pytest.mark.parametrize("offset", [0.01, np.nan])
def test_graph_that_computes_something_else_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: float
) -> None:
    def build_wrongly(*arguments: object) -> ModelProto:
        model = build_onnx(*arguments)  # type: ignore[arg-type]
        (bias,) = (each for each in model.graph.initializer if each.name == "final_conv.bias")
        wrong = numpy_helper.to_array(bias) + np.float32(offset)
        bias.CopyFrom(numpy_helper.from_array(wrong, bias.name))
        return model

    monkeypatch.setattr(export, "build_onnx", build_wrongly)
    write_tiny(tmp_path / "tiny.safetensors")
    with pytest.raises(ExportError, match="tiny: the probabilities of ONNX Runtime differ"):
        export_onnx(load_checkpoint(tmp_path / "tiny.safetensors"))
