"""`unet import model.onnx`: the checkpoint computes what the network computed where it was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app import cli
from app.engine.predictor import engine_predictor
from app.engine.selection import build_engine, choose_engines
from model.arrays import ByteArray, FloatArray
from model.checkpoint import Checkpoint, load_checkpoint
from tests.drawing import nuclei
from tests.onnx_networks import BilinearUNet, Net, export, randomize_statistics


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
    """What the network itself returns for an image."""
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
