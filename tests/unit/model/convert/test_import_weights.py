"""An imported network computes the logits of the network it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app import cli
from model.checkpoint import load_checkpoint
from model.convert.import_weights import infer_architecture, read_state, to_unet_state_dict
from model.errors import CheckpointError
from model.unet import UNet


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


@pytest.fixture(params=[1, 2, 4])
def milesial(request: pytest.FixtureRequest) -> Milesial:
    """A network of 1, 2 or 4 classes, with batch statistics as after training."""
    torch.manual_seed(request.param)
    network = Milesial(request.param, 4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 2)
    return network.eval()


def test_milesial_is_converted_exactly(milesial: Milesial, tmp_path: Path) -> None:
    torch.save({**milesial.state_dict(), "mask_values": [0, 1]}, tmp_path / "milesial.pth")
    state = to_unet_state_dict(read_state(tmp_path / "milesial.pth"))
    network = UNet.from_config(infer_architecture(state))
    network.load_state_dict(state)
    x = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        expected, found = milesial(x), network(x)
    if expected.shape[1] == 2:
        assert torch.allclose(found.sigmoid()[:, 0], expected.softmax(1)[:, 1], atol=1e-5)
    else:
        assert torch.allclose(found, expected, atol=1e-4)


def test_order_of_concatenated_channels_matters() -> None:
    """So `test_milesial_is_converted_exactly` would find a missing permutation."""
    torch.manual_seed(0)
    network = Milesial(1, 4).eval()
    state = to_unet_state_dict(network.state_dict())
    name = "up_conv.0.first.weight"
    upsampled, skip = state[name].chunk(2, dim=1)
    swapped = {**state, name: torch.cat([skip, upsampled], dim=1)}
    x = torch.randn(1, 3, 32, 32)
    right, wrong = UNet(3, 1, base_features=4), UNet(3, 1, base_features=4)
    right.load_state_dict(state)
    wrong.load_state_dict(swapped)
    with torch.inference_mode():
        assert F.l1_loss(wrong(x), network(x)) > 10 * F.l1_loss(right(x), network(x))


def test_milesial_with_bilinear_up_sampling_is_rejected(milesial: Milesial) -> None:
    state = {name: t for name, t in milesial.state_dict().items() if ".up." not in name}
    with pytest.raises(CheckpointError, match="bilinear up-sampling cannot be converted"):
        to_unet_state_dict(state)


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(3, 1, base_features=4)


@pytest.fixture
def weights(network: UNet, tmp_path: Path) -> Path:
    """The state dict of `network`, saved by torch."""
    path = tmp_path / "annotated.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
def test_import_writes_a_checkpoint_with_a_golden_pair(
    network: UNet,
    weights: Path,
    tmp_path: Path,
    wrapper: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if wrapper:
        state = {f"module.{name}": value for name, value in network.state_dict().items()}
        torch.save({wrapper: state, "epoch": 3}, weights)
    arguments = ["import", str(weights), "--out", str(tmp_path), "--name", "mine"]
    assert cli.main([*arguments, "--classes", "background", "cell", "--base-features", "4"]) == 0
    loaded = load_checkpoint(tmp_path / "mine.safetensors")
    assert loaded.architecture == network.config
    assert loaded.preprocess.classes == ("background", "cell")
    assert loaded.golden.image.shape == (256, 256, 3)
    for name, tensor in network.state_dict().items():
        assert np.array_equal(loaded.state[name], tensor.numpy()), name
    assert loaded.card["revision"]
    assert "unet serve --model mine" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["cell"], ["background,cell"], ["background", "cell"]])
def test_classes_may_be_separated_by_commas_and_omit_the_background(
    weights: Path, tmp_path: Path, names: list[str]
) -> None:
    out = tmp_path / "new" / "imported.safetensors"
    assert cli.main(["import", str(weights), "--out", str(out), "--classes", *names]) == 0
    assert load_checkpoint(out).preprocess.classes == ("background", "cell")


def test_percentiles_need_the_intensity_percentile(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imported.safetensors"
    command = ["import", str(weights), "--out", str(out), "--percentiles", "0", "100"]
    assert cli.main(command) == 2
    assert "--percentiles needs --intensity percentile" in capsys.readouterr().err
    assert cli.main([*command, "--intensity", "percentile"]) == 0
    assert load_checkpoint(out).preprocess.percentiles == (0, 100)


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_rounded_only_if_exact_or_requested(
    network: UNet, weights: Path, tmp_path: Path, half: bool
) -> None:
    out = tmp_path / "imported.safetensors"
    assert cli.main(["import", str(weights), "--out", str(out), *["--half"][: int(half)]]) == 0
    assert {array.dtype for array in load_checkpoint(out).state.values()} == {
        np.dtype("float16" if half else "float32")
    }
    torch.save(network.half().state_dict(), weights)
    assert cli.main(["import", str(weights), "--out", str(out), "--force"]) == 0
    assert {a.dtype for a in load_checkpoint(out).state.values()} == {np.dtype("float16")}


@pytest.mark.parametrize(("value", "says"), [(7e4, "too large for fp16"), (np.nan, "not finite")])
def test_weights_that_are_not_finite_are_rejected(
    network: UNet,
    weights: Path,
    tmp_path: Path,
    value: float,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert network.final_conv.bias is not None
    with torch.no_grad():
        network.final_conv.bias.fill_(value)
    torch.save(network.state_dict(), weights)
    assert cli.main(["import", str(weights), "--out", str(tmp_path / "out"), "--half"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_meaning_of_two_outputs_must_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The softmax predicts class 1 everywhere; channel 0 alone would predict nothing."""
    network = UNet(3, 2, base_features=4)
    assert network.final_conv.bias is not None
    with torch.no_grad():
        network.final_conv.weight.zero_()
        network.final_conv.bias.copy_(torch.tensor([-5.0, 5.0]))
    torch.save(network.state_dict(), tmp_path / "two.pth")
    command = ["import", str(tmp_path / "two.pth"), "--out", str(tmp_path), "--force"]
    assert cli.main(command) == 2
    assert "--two-outputs softmax" in capsys.readouterr().err
    for kind, outputs, mask in (("softmax", 1, 255), ("border", 2, 0)):
        assert cli.main([*command, "--two-outputs", kind, "--classes", "ground", "cell"]) == 0
        loaded = load_checkpoint(tmp_path / "two.safetensors")
        assert loaded.architecture.out_channels == outputs
        assert loaded.golden.mask.min() == loaded.golden.mask.max() == mask


@pytest.mark.parametrize("name", ["клетка", "a/b", ".hidden", "new\nline", " "])
def test_invalid_model_name_is_rejected(
    weights: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["import", str(weights), "--name", name, "--out", str(out)]) == 2
    assert "invalid model name" in capsys.readouterr().err
    assert not out.exists()


class Malicious:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weight": Malicious()}, "contains pickled objects"),
        ({"network": {}, "ema": {}, "optimizer": {}}, "is the state of a training run"),
        ({"network": {}, "average": {}, "optimiser": {}}, "is the state of a training run"),
        (torch.zeros(3), "contains a Tensor, not a state dict"),
        ({"epoch": 3}, "contains no tensors"),
        ({"layer.weight": torch.zeros(3)}, "unrecognised architecture"),
        ({"down_conv.0.first.weight": torch.zeros(4, 3, 3, 3)}, "is incomplete"),
    ],
    ids=["pickle", "run state", "old run state", "tensor", "no tensors", "unknown", "incomplete"],
)
def test_file_that_cannot_be_imported_is_reported_in_one_line(
    tmp_path: Path,
    content: Any,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "bad.pth")
    assert cli.main(["import", "bad.pth", "--out", "."]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_wrong_base_features_are_rejected(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["import", str(weights), "--base-features", "64", *out]) == 2
    assert "the file has 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["hello", None], ids=["text", "missing"])
def test_file_that_torch_cannot_read_is_rejected(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.pth"
    if content is not None:
        path.write_text(content)
    assert cli.main(["import", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "file.pth" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
