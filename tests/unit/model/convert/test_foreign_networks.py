"""Networks of other implementations compute the same logits after conversion.

They are in `tests.unet_networks`.
"""

from __future__ import annotations

import re
from pathlib import Path

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
from tests.unet_networks import Jvanvugt, Mateuszbuda, Milesial, trained

CONVERT = {family.name.rpartition("/")[0] or "labml": family.convert for family in FAMILIES}


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
