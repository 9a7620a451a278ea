"""Networks of the libraries that most users have, with small widths, through ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.app.cli.importing.test_graph import check_difference, run

pytestmark = pytest.mark.slow


class First(nn.Module):
    """The first of the outputs that a network returns by name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return next(iter(self.network(x).values()))


def smp_unet() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Unet("resnet34", encoder_weights=None, classes=1)  # type: ignore[no-any-return]


def monai_unet() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return nets.UNet(  # type: ignore[no-any-return]
        spatial_dims=2, in_channels=1, out_channels=3, channels=(8, 16, 32), strides=(2, 2)
    )


def nnunet() -> nn.Module:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    return unet.PlainConvUNet(  # type: ignore[no-any-return]
        1, 4, (8, 16, 32, 32), nn.Conv2d, 3, (1, 2, 2, 2), 2, 3, 2,
        norm_op=nn.InstanceNorm2d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
        deep_supervision=True,
    )  # fmt: skip


def deeplab() -> nn.Module:
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    return First(
        segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=4
        )
    )


@pytest.mark.parametrize(
    ("make", "channels"), [(smp_unet, 3), (monai_unet, 1), (nnunet, 1), (deeplab, 3)]
)
def test_library_is_served_as_it_computes(
    make: Callable[[], nn.Module], channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = make()
    train_statistics(network, channels)
    assert run(network, tmp_path, "--window", "128x160", shape=(1, channels, 128, 128)) == 0
    activation = torch.sigmoid if make is smp_unet else lambda y: y.softmax(1)
    check_difference(tmp_path, network, activation, (128, 160))


def train_statistics(network: nn.Module, channels: int) -> None:
    """Give normalization the statistics of images, as training does."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.rand(2, channels, 128, 128))
    network.eval()
