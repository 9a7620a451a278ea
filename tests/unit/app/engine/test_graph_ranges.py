"""`unet export --calibrate` of an ONNX graph: NNCF measures its ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from app import cli
from app.engine.openvino import OpenVinoEngine
from model.checkpoint import Checkpoint, load_checkpoint
from tests.drawing import nuclei
from tests.onnx_networks import convert_to_half, export

pytest.importorskip("nncf")
pytestmark = pytest.mark.slow

SIDE = 96


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images and masks."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for seed in range(6):
        image, labels = nuclei(SIDE, SIDE, seed)
        Image.fromarray(image).save(tmp_path / f"images/{seed}.png")
        Image.fromarray(np.uint8(255 * (labels > 0))).save(tmp_path / f"masks/{seed}.png")
    return tmp_path


def train_network() -> nn.Module:
    """Train a small network that finds the drawn nuclei."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
        nn.Conv2d(8, 1, 1),
    )
    pairs = [nuclei(SIDE, SIDE, seed) for seed in range(10, 14)]
    images, labels = (np.stack(each)[:, None] for each in zip(*pairs, strict=True))
    x = torch.from_numpy(images).float() / 255
    y = torch.from_numpy(labels > 0).float()
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(x), y).backward()
        optimizer.step()
    return network


def calibrate(folder: Path, *flags: str, half: bool = False) -> int:
    """Import a network as "theirs", and calibrate it on the images of the folder."""
    network = train_network()
    content = export(network, (1, 1, SIDE, SIDE))
    if half:
        content = convert_to_half(content)
    (folder / "theirs.onnx").write_bytes(content)
    command = ["import", str(folder / "theirs.onnx"), "--out", str(folder)]
    assert cli.main([*command, "--window", f"{SIDE}x{SIDE}", *flags]) == 0
    data = ["--calibrate", str(folder / "images"), "--masks", str(folder / "masks")]
    return cli.main(["export", str(folder / "theirs.safetensors"), *data])


def load(folder: Path) -> Checkpoint:
    return load_checkpoint(folder / "theirs.safetensors")


def test_graph_is_quantized_and_compared_with_fp32(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(folder) == 0
    checkpoint = load(folder)
    calibration = checkpoint.calibration
    assert calibration is not None
    assert calibration.images == 3  # of six; the others are for calibration
    assert 0.9 < calibration.iou < 1
    assert 0.9 < calibration.golden_iou < 1
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.startswith(f"{folder}/theirs.safetensors: {checkpoint.id}; {calibration}")


def test_convolutions_run_in_8_bits(folder: Path) -> None:
    assert calibrate(folder) == 0
    engine = OpenVinoEngine(load(folder), threads=2, max_batch=1, precision="int8")
    engine.warm()
    layers = [each for each in engine.layers() if each[0] in ("Convolution", "Deconvolution")]
    assert len(layers) == 4
    assert {bits for _, bits in layers} <= {"u8", "i8"}


def test_ranges_are_those_of_normalized_windows(folder: Path) -> None:
    assert calibrate(folder, "--mean", "0.2", "--std", "0.25") == 0
    calibration = load(folder).calibration
    assert calibration is not None
    low, high = calibration.ranges["output x"]
    images = [nuclei(SIDE, SIDE, seed)[0] for seed in range(6)]
    assert low < -0.2 / 0.25 + 0.1
    assert 1 < high < (max(int(each.max()) for each in images) / 255 - 0.2) / 0.25 + 0.1


def test_second_calibration_replaces_the_first(folder: Path) -> None:
    assert calibrate(folder) == 0
    first = load(folder)
    data = ["--calibrate", str(folder / "images"), "--masks", str(folder / "masks")]
    assert cli.main(["export", str(folder / "theirs.safetensors"), *data]) == 0
    assert load(folder).calibration == first.calibration


def test_graph_in_fp16_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(folder, half=True) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line == "unet: error: int8 needs a graph in float32; export it again, and import it"
    assert load(folder).calibration is None
