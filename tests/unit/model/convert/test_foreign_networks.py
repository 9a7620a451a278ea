"""Networks of other implementations compute the same logits after conversion.

Each is written down here from its description, under the names of its state dict.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app import cli
from model.checkpoint import load_checkpoint
from model.convert.foreign_networks import FAMILIES, State, describe_unknown
from model.convert.import_weights import ForeignNetwork, infer_architecture
from model.errors import CheckpointError
from model.predict import Predictor
from model.unet import UNet
from tests.conftest import encode, nuclei

CONVERT = {family.name.rpartition("/")[0] or "labml": family.convert for family in FAMILIES}


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


def converted(state: State, author: str, padding: int = 1) -> UNet:
    state = CONVERT[author](state)
    found = infer_architecture(state)
    network = UNet(
        found.in_channels,
        found.out_channels,
        base_features=found.base_features,
        padding=padding,
    )
    network.load_state_dict(state)
    return network.eval()


def check_equal(found: Tensor, expected: Tensor) -> None:
    """Check that logits agree to 1e-5 of the largest, and probabilities to 1e-5."""
    assert found.shape == expected.shape
    assert expected.std() > 1e-3  # not a constant, which anything might reproduce
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (found.sigmoid() - expected.sigmoid()).abs().max() <= 1e-5


@pytest.mark.parametrize("classes", [1, 2, 4])
@torch.inference_mode()
def test_milesial_is_converted_exactly(classes: int) -> None:
    torch.manual_seed(classes)
    network = trained(Milesial(classes, 4))
    x = torch.randn(1, 3, 48, 64)
    expected, found = network(x), converted(network.state_dict(), "milesial")(x)
    if classes == 2:
        assert torch.allclose(found.sigmoid()[:, 0], expected.softmax(1)[:, 1], atol=1e-5)
    else:
        check_equal(found, expected)


@torch.inference_mode()
def test_order_of_concatenated_channels_matters() -> None:
    """So `test_milesial_is_converted_exactly` would find a missing permutation."""
    torch.manual_seed(0)
    network = Milesial(1, 4).eval()
    state = CONVERT["milesial"](network.state_dict())
    name = "up_conv.0.first.weight"
    upsampled, skip = state[name].chunk(2, dim=1)
    swapped = {**state, name: torch.cat([skip, upsampled], dim=1)}
    x = torch.randn(1, 3, 32, 32)
    right, wrong = UNet(3, 1, base_features=4), UNet(3, 1, base_features=4)
    right.load_state_dict(state)
    wrong.load_state_dict(swapped)
    assert F.l1_loss(wrong(x), network(x)) > 10 * F.l1_loss(right(x), network(x))


@pytest.mark.parametrize("classes", [1, 3])
@torch.inference_mode()
def test_mateuszbuda_is_converted_exactly(classes: int) -> None:
    torch.manual_seed(classes)
    network = trained(Mateuszbuda(classes, 4))
    x = torch.randn(1, 3, 48, 64)
    check_equal(converted(network.state_dict(), "mateuszbuda")(x), network(x))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("padding", "size"), [(1, (48, 64)), (0, (188, 204))])
@torch.inference_mode()
def test_jvanvugt_is_converted_exactly(
    padding: int, size: tuple[int, int], batch_norm: bool
) -> None:
    torch.manual_seed(padding)
    network = trained(Jvanvugt(2, 4, padding, batch_norm))
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not re.match(r"down_path\.[0-3]\.block\.5", name):
            nn.init.uniform_(module.weight, -2, 2)  # no pooling follows
    x = torch.randn(1, 3, *size)
    found = converted(network.state_dict(), "jvanvugt", padding)
    assert found.config.base_features == 4 + batch_norm
    check_equal(found(x), network(x))


@torch.inference_mode()
def test_image_of_one_window_has_the_probabilities_of_the_original(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = trained(Mateuszbuda(1, 4))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "theirs.pth")
    command = ["import", str(tmp_path / "theirs.pth"), "--out", str(tmp_path)]
    command += ["--window", "64x96", "--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.3", "0.4"]
    assert cli.main([*command, "--name", "theirs", "--golden", str(golden(tmp_path))]) == 0
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    values = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    expected = network((values - mean.view(3, 1, 1)) / std.view(3, 1, 1)).sigmoid()[0].numpy()
    found = Predictor.of(load_checkpoint(tmp_path / "theirs.safetensors"))(image)
    assert expected.std() > 0.005  # so that 1e-5 distinguishes networks
    assert np.abs(found - expected).max() <= 1e-5


def golden(folder: Path) -> Path:
    path = folder / "golden.png"
    path.write_bytes(encode(nuclei(64, 96)[0]))
    return path


def test_negative_factor_before_pooling_is_rejected() -> None:
    network = trained(Jvanvugt(2, 4, batch_norm=True), lowest_factor=-0.5)
    with pytest.raises(CheckpointError, match="negative factor"):
        CONVERT["jvanvugt"](network.state_dict())


def test_bilinear_up_sampling_is_rejected() -> None:
    state = {name: each for name, each in Milesial(1, 4).state_dict().items() if ".up." not in name}
    with pytest.raises(CheckpointError, match=r"bilinear=True interpolates.*torch\.onnx\.export"):
        CONVERT["milesial"](state)
    state = Jvanvugt(2, 4).state_dict()
    state["up_path.0.up.1.weight"] = state.pop("up_path.0.up.weight")
    with pytest.raises(
        CheckpointError, match=r"up_mode='upsample' interpolates.*torch\.onnx\.export"
    ):
        CONVERT["jvanvugt"](state)


@pytest.mark.parametrize("depth", [4, 6])
def test_other_depth_is_rejected(depth: int) -> None:
    with pytest.raises(CheckpointError, match=f"depth={depth}"):
        CONVERT["jvanvugt"](Jvanvugt(2, 1, depth=depth).state_dict())


@pytest.mark.parametrize("network", [Milesial(1, 2), Mateuszbuda(1, 2), Jvanvugt(1, 2)])
def test_variant_with_other_layers_is_rejected(network: nn.Module) -> None:
    author = type(network).__name__.lower()
    state = {**network.state_dict(), "attention.gate.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"code was changed.*attention\.gate"):
        CONVERT[author](state)
    del state["attention.gate.weight"]
    missing = [name for name in state if not name.endswith(("bias", "_tracked"))][-1]
    del state[missing]
    with pytest.raises(CheckpointError, match=f"incomplete: {missing}"):
        CONVERT[author](state)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("inc.double_conv.1.running_var", (3,), "inc.double_conv.1 should have 4 features"),
        ("inc.double_conv.1.bias", (1,), "inc.double_conv.1 should have 4 features"),
        ("up1.conv.double_conv.0.weight", (), "shapes of tensors do not fit"),
        ("outc.conv.weight", (1, 9, 1, 1), "final_conv.weight should be"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(name: str, shape: tuple[int, ...], says: str) -> None:
    state = {**Milesial(1, 4).state_dict(), name: torch.ones(shape)}
    (family,) = [each for each in FAMILIES if each.name.startswith("milesial")]
    with pytest.raises(CheckpointError, match=says):
        ForeignNetwork("", family, state, is_average=False).convert()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("segmentation_head.0.weight", "segmentation_models_pytorch"),
        ("net.upcat_4.convs.conv_0.conv.weight", "BasicUNet"),
        ("model.0.conv.unit0.conv.weight", "MONAI's UNet"),
        ("input_block.conv1.conv.weight", "DynUNet"),
        ("decoder.seg_layers.3.weight", "nnU-Net"),
        ("backbone.conv1.weight", "torchvision"),
        ("stem.weight", "unrecognised architecture: the first tensor is 'stem.weight'"),
    ],
)
def test_other_networks_are_named(name: str, other: str) -> None:
    message = describe_unknown([name])
    assert other in message
    assert "torch.onnx.export" in message
