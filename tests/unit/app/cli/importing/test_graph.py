"""`unet import model.onnx`: the checkpoint computes what the network computed where it was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from app import cli
from app.engine.predictor import engine_predictor
from app.engine.selection import build_engine, choose_engines
from model.arrays import ByteArray, FloatArray
from model.checkpoint import Checkpoint, load_checkpoint
from model.config import GraphConfig
from tests.drawing import nuclei
from tests.onnx_networks import (
    BilinearUNet,
    Net,
    convert_to_half,
    export,
    randomize_statistics,
)
from tests.unit.model.test_graph import HOSTILE


def run(network: nn.Module, folder: Path, *flags: str, **options: Any) -> int:
    """Export a network, and import it as "theirs"."""
    path = folder / "theirs.onnx"
    path.write_bytes(export(network, **options))
    return cli.main(["import", str(path), "--out", str(folder), *flags])


def load(folder: Path) -> Checkpoint:
    return load_checkpoint(folder / "theirs.safetensors")


def predict(checkpoint: Checkpoint, image: ByteArray) -> FloatArray:
    """The probabilities of an image, as the service computes them on a CPU."""
    (choice,) = choose_engines(device="cpu")
    engine = build_engine(choice, checkpoint)
    engine.warm()
    probabilities = engine_predictor(engine, checkpoint)(image)
    engine.close()
    return probabilities


def draw(height: int, width: int, channels: int = 3) -> ByteArray:
    grey = nuclei(height, width)[0]
    if channels == 1:
        return grey
    return np.stack([grey, 255 - grey, grey // 2], axis=2)


def original(network: nn.Module, image: ByteArray, checkpoint: Checkpoint) -> Tensor:
    """Compute an image with the network itself."""
    pixels = image if image.ndim == 3 else image[:, :, None]
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1)
        for values in (checkpoint.preprocess.mean, checkpoint.preprocess.std)
    )
    with torch.no_grad():
        result = network.eval()((x - mean) / std)
    return result[0] if isinstance(result, tuple | list) else result


def check_difference(
    folder: Path, network: nn.Module, activation: Callable[[Tensor], Tensor], shape: tuple[int, int]
) -> None:
    """Compare with the original on an image of one window."""
    checkpoint = load(folder)
    image = draw(*shape, checkpoint.architecture.in_channels)
    expected = activation(original(network, image, checkpoint))[0].numpy()
    found = predict(checkpoint, image)
    assert expected.std() > 1e-3  # it has something to compare
    assert np.abs(found - expected).max() < 1e-4


def softmax(y: Tensor) -> Tensor:
    return y.softmax(1)


def foreground(y: Tensor) -> Tensor:
    return y.softmax(1)[:, 1:2]


def keep(y: Tensor) -> Tensor:
    return y


@pytest.mark.parametrize(
    ("network", "flags", "activation"),
    [
        (Net(levels=2), ["--mean", "0.4", "0.5", "0.6"], torch.sigmoid),
        (Net(levels=1, outputs=3), ["--classes", "cell", "border"], softmax),
        (Net(levels=1, outputs=2), ["--two-outputs", "softmax"], foreground),
        (Net(levels=1, outputs=2), ["--two-outputs", "border"], torch.sigmoid),
        (Net(outputs=2, ending=nn.Softmax(1)), ["--classes", "cell"], lambda y: y[:, 1:2]),
        (Net(outputs=3, ending=nn.Softmax(1)), [], keep),
        (Net(outputs=1, ending=nn.Sigmoid()), ["--std", "0.2", "0.2", "0.2"], keep),
        (Net(outputs=3, ending=nn.Sigmoid()), [], keep),
        (Net(outputs=2, ending=nn.Sigmoid()), ["--two-outputs", "border"], keep),
        (Net(channels=1, ending=nn.Flatten(0, 1)), [], lambda y: y[:, None].sigmoid()),
        (BilinearUNet(), [], torch.sigmoid),
    ],
)
def test_probabilities_equal_those_of_the_original(
    network: nn.Module, flags: list[str], activation: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    randomize_statistics(network)
    channels = 1 if "channels=1" in repr(network) else next(network.parameters()).shape[1]
    assert run(network, tmp_path, *flags, shape=(1, channels, 64, 64)) == 0
    check_difference(tmp_path, network, activation, (256, 256))
    check_difference(tmp_path, network, activation, (256, 384))


def test_graph_of_one_size_equals_the_original(tmp_path: Path) -> None:
    network = BilinearUNet(channels=1, outputs=3)
    randomize_statistics(network)
    assert run(network, tmp_path, shape=(1, 1, 96, 160), dynamic_axes={}) == 0
    assert load(tmp_path).preprocess.window == ((96, 160),)
    check_difference(tmp_path, network, softmax, (96, 160))


def test_image_of_several_windows_agrees_with_the_whole_one(tmp_path: Path) -> None:
    network = Net(levels=1)
    assert run(network, tmp_path, "--window", "64x64") == 0
    checkpoint = load(tmp_path)
    assert checkpoint.preprocess.overlap == 32
    image = draw(192, 160)
    expected = torch.sigmoid(original(network, image, checkpoint))[0].numpy()
    assert np.abs(predict(checkpoint, image) - expected).max() < 1e-4


def test_graph_in_fp16_is_imported_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Net(levels=1)
    path = tmp_path / "theirs.onnx"
    path.write_bytes(convert_to_half(export(network)))
    assert cli.main(["import", str(path), "--out", str(tmp_path)]) == 0
    assert "OpenVINO and ONNX Runtime compute the same outputs" in capsys.readouterr().out
    checkpoint, image = load(tmp_path), draw(256, 256)
    expected = torch.sigmoid(original(network, image, checkpoint))[0].numpy()
    assert np.abs(predict(checkpoint, image) - expected).max() < 1e-2


def test_checkpoint_describes_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--window", "64x64", "96x64", "--classes", "cell", "--licence", "MIT"]
    assert run(Net(levels=1), tmp_path, *flags, output_names=["out"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "theirs.onnx: ONNX graph of pytorch",
        "input 'x': NCHW, 3 channels, any number of images, sides that are multiples of 2",
        "output 'out': NCHW, 1 channel",
        "values of the output: logits (the graph ends in Conv; ",
        "OpenVINO and ONNX Runtime compute the same outputs, to ",
        "probabilities: sigmoid of the output",
        "windows: 64x64, 96x64; neighbours overlap by 32 pixels",
        "serve it with: unet serve --model theirs --weights-dir",
    ):
        assert line in printed
    checkpoint = load(tmp_path)
    assert checkpoint.architecture == GraphConfig(
        input="x", outputs=("out",), divisor=2, activation="sigmoid"
    )
    assert checkpoint.preprocess.classes == ("background", "cell")
    assert checkpoint.card["licence"] == "MIT"
    assert len(checkpoint.card["onnx"]["sha256"]) == 64
    assert cli.main(["models", str(tmp_path)]) == 0
    assert "onnx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "flags", "message"),
    [
        (Net(outputs=2), [], "has two output channels: set --two-outputs"),
        (Net(ending=nn.Softmax(1)), [], "a softmax over one channel is 1 everywhere"),
        (Net(), ["--padding", "0"], "--padding does not apply to an ONNX graph"),
        (Net(), ["--half"], "--half does not apply to an ONNX graph"),
        (Net(), ["--window", "64"], "--window 64: a shape is HEIGHTxWIDTH"),
        (Net(levels=1), ["--window", "65x64"], "window 65x64 is not divisible by 2"),
        (Net(levels=3), ["--window", "68x64"], "window 68x64 is not divisible by 8"),
        (Net(), ["--window", "16x64"], "window 16x64 must have sides of at least 32"),
        (Net(), ["--window", "8192x64"], "sides of 1 to 4096"),
        (Net(), ["--mean", "0", "1"], "--mean 0 1: the network takes 3 channels; give 3 values"),
        (Net(outputs=3), ["--classes", "a", "b", "c", "d"], "--classes has 4 names; a network"),
        (Net(), ["--two-outputs", "border"], "theirs.onnx has 1 output; leave it out"),
        (Net(outputs=2, ending=nn.Softmax(1)), ["--two-outputs", "border"], "are a softmax"),
        (Net(), ["--output", "no"], "'no' is not an output with values for each pixel"),
        (Net(), ["--layout", "NHWC"], "any number of channels in NHWC"),
        (Net(), ["--divisor", "0"], "--divisor must be at least 1"),
    ],
)
def test_what_does_not_fit_is_rejected_in_one_line(
    network: nn.Module,
    flags: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(network, tmp_path, *flags) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "theirs.safetensors").exists()


def test_flags_of_graphs_do_not_apply_to_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({}, tmp_path / "weights.pth")
    command = ["import", str(tmp_path / "weights.pth"), "--activation", "sigmoid"]
    assert cli.main(command) == 2
    assert "--activation applies to ONNX graphs alone" in capsys.readouterr().err


def test_graph_is_recognised_without_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(export(Net()))
    assert cli.main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path)]) == 0
    assert isinstance(load(tmp_path).architecture, GraphConfig)


def test_existing_checkpoint_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Net(), tmp_path) == 0
    assert run(Net(), tmp_path) == 2
    assert "exists; choose another name, or --force" in capsys.readouterr().err
    assert run(Net(outputs=3), tmp_path, "--force") == 0


@pytest.mark.parametrize("flags", [["--openvino", "x.xml"], ["--base-features", "8"]])
def test_graph_is_not_exported(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Net(), tmp_path) == 0
    assert cli.main(["export", str(tmp_path / "theirs.safetensors"), *flags]) == 2
    assert "theirs is an ONNX graph; this works with U-Nets" in capsys.readouterr().err


def test_whole_images_are_resized_to_the_only_window(tmp_path: Path) -> None:
    network = Net(levels=1)
    assert run(network, tmp_path, "--mode", "resize", "--window", "64x96") == 0
    checkpoint = load(tmp_path)
    assert checkpoint.preprocess.overlap == 0
    assert checkpoint.golden.image.shape == (256, 256, 3)
    image = draw(64, 96)
    expected = torch.sigmoid(original(network, image, checkpoint))[0].numpy()
    assert np.abs(predict(checkpoint, image) - expected).max() < 1e-4
    assert predict(checkpoint, draw(50, 70)).shape == (1, 50, 70)


def test_graph_is_evaluated_by_its_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Net(), tmp_path, "--window", "64x64") == 0
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    image, labels = nuclei(64, 64)
    Image.fromarray(image).save(tmp_path / "images/a.png")
    Image.fromarray((labels > 0).astype(np.uint8) * 255).save(tmp_path / "masks/a.png")
    folders = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    command = ["evaluate", str(tmp_path / "theirs.safetensors"), *folders, "--device", "cpu"]
    assert cli.main(command) == 0
    assert "by openvino on cpu in " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["loop", "recursive function", "weights outside", "cut off"])
def test_hostile_graph_is_one_line_of_the_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, _ = HOSTILE[name]
    content = make()
    path = tmp_path / "theirs.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    assert cli.main(["import", str(path), "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"unet: error: {path}")
    assert printed.count("\n") == 1


def test_enormous_file_is_rejected_unread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.onnx"
    with path.open("wb") as file:
        file.truncate(3_000_000_000)
    assert cli.main(["import", str(path), "--out", str(tmp_path)]) == 2
    assert "it has more than 2,000,000,000 bytes" in capsys.readouterr().err
