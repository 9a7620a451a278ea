"""Mistakes in the options of `unet import` are one line, before the network runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from app import cli
from app.engine.inspection import inspect_graph
from model.checkpoint import load_checkpoint
from model.unet import UNet
from tests.conftest import tiff
from tests.onnx_networks import Net, export
from tests.unet_networks import Milesial


def write_weights(folder: Path, channels: int = 3, outputs: int = 1) -> Path:
    path = folder / "theirs.pth"
    torch.save(UNet(channels, outputs, base_features=2).state_dict(), path)
    return path


def write_graph(folder: Path, channels: int = 3, outputs: int = 1) -> Path:
    path = folder / "theirs.onnx"
    path.write_bytes(export(Net(channels, outputs), (1, channels, 64, 64)))
    return path


@pytest.fixture
def resting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no network run."""

    def fail(*_: Any) -> NoReturn:
        raise AssertionError("the network runs")

    monkeypatch.setattr(UNet, "forward", fail)
    monkeypatch.setattr(inspect_graph, "compute", fail)


def read_error(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Run `unet import` with a mistake, and return its line."""
    assert cli.main(["import", *command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.usefixtures("resting")
@pytest.mark.parametrize("write", [write_weights, write_graph])
@pytest.mark.parametrize(
    ("channels", "flags", "says"),
    [
        (1, ["--mean", ".4", ".4", ".4", "--std", ".2", ".2", ".2"],
         "--mean 0.4 0.4 0.4: the network takes 1 channel; give 1 value, not 3"),
        (3, ["--mean", "0.5", "--std", "0.5"], "the network takes 3 channels; give 3 values"),
        (3, ["--mean", ".5", ".5", "--std", ".5", ".5"], "give 3 values, not 2"),
        (3, ["--std", "0.5"], "--std 0.5: the network takes 3 channels; give 3 values, not 1"),
        (3, ["--mean", ".1", "--std", ".1", ".2"], "--mean has 1 value and --std 2 values"),
        (3, ["--window", "100by100"], "--window 100by100: a shape is HEIGHTxWIDTH"),
        (3, ["--window", "0x64"], "--window 0x64: a window has sides of 1 to 4096 pixels"),
        (3, ["--window", "64x99999999"], "a window has sides of 1 to 4096 pixels"),
        (3, ["--mode", "resize", "--window", "64x64", "96x96"], "--mode resize takes one --window"),
        (3, ["--percentiles", "1", "99"], "--percentiles needs --intensity percentile"),
        (3, ["--intensity", "percentile", "--percentiles", "9", "1"], "the lower one first"),
        (3, ["--classes", "cell", "cell"], "--classes: 'cell' is given twice"),
        (3, ["--classes", "cell,edge, cell"], "--classes: 'cell' is given twice"),
        (3, ["--classes", ","], "--classes: give at least one name"),
        (3, ["--golden", "missing.png"], "missing.png cannot be read"),
        (3, ["--name", "long" * 100], "cannot be written: File name too long"),
        (3, ["--name", ""], "invalid model name ''"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_before_the_network_runs(
    write: Any,
    channels: int,
    flags: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, channels)
    assert says in read_error(capsys, str(path), "--out", str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("resting")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--window", "100x64"], "window 100x64 is not divisible by 16; use 112x64, for example"),
        (["--padding", "0", "--window", "200x200"], "204, 220, ..., 572), at least 204; use 204x"),
        (["--classes", "a", "b", "c"], "--classes has 3 names; a network with 1 output has 2"),
        (["--two-outputs", "border"], "theirs.pth has 1 output; leave it out"),
    ],
)
def test_option_that_does_not_fit_the_weights(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_weights(tmp_path)
    assert says in read_error(capsys, str(path), "--out", str(tmp_path / "out"), *flags)


@pytest.mark.usefixtures("resting")
@pytest.mark.parametrize("names", [["cell"], ["background", "cell"], ["background", "a", "b", "c"]])
def test_classes_must_be_as_many_as_the_outputs(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_weights(tmp_path, outputs=3)
    line = read_error(capsys, str(path), "--out", str(tmp_path / "out"), "--classes", *names)
    assert "a network with 3 outputs has 3 classes: name all, or all but the background" in line


@pytest.mark.usefixtures("resting")
def test_number_of_channels_must_be_that_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grey.png").write_bytes(b"")
    Image.new("L", (32, 32)).save(tmp_path / "grey.png")
    path = write_weights(tmp_path, channels=4)
    for flags in ([], ["--golden", str(tmp_path / "grey.png")]):
        line = read_error(capsys, str(path), "--out", str(tmp_path / "out"), *flags)
        assert "the network takes 4 channels; only 1 (grey) and 3 (RGB) are supported" in line


@pytest.mark.usefixtures("resting")
def test_softmax_of_known_code_is_no_border(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Milesial(2, 2).state_dict(), tmp_path / "theirs.pth")
    command = [str(tmp_path / "theirs.pth"), "--out", str(tmp_path), "--two-outputs", "border"]
    assert "milesial/Pytorch-UNet applies a softmax to two outputs" in read_error(capsys, *command)


@pytest.mark.usefixtures("resting")
@pytest.mark.parametrize(
    ("shape", "says"), [((3, 40, 30), "the image has 3 pages"), ((40, 30, 2), "has 2 channels")]
)
def test_golden_image_with_a_choice_is_explained_without_parameters_of_requests(
    shape: tuple[int, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tifffile

    golden = tmp_path / "stack.tif"
    if len(shape) == 3 and shape[2] == 2:
        golden.write_bytes(tiff(np.zeros(shape, np.uint8), planes=False, extra=(0,)))
    else:
        tifffile.imwrite(golden, np.zeros(shape, np.uint8), photometric="minisblack")
    command = [str(write_weights(tmp_path)), "--out", str(tmp_path / "out")]
    line = read_error(capsys, *command, "--golden", str(golden))
    assert f"--golden {golden}: the image " in line
    assert says in line
    assert "save one page with 1 or 3 channels as a file of its own" in line
    assert "page=" not in line
    assert "channel=" not in line


@pytest.mark.parametrize(
    ("flags", "written"),
    [
        ([], "theirs.safetensors"),
        (["--name", "mine"], "mine.safetensors"),
        (["--out", "new"], "new/theirs.safetensors"),
        (["--out", "new/folder", "--name", "mine"], "new/folder/mine.safetensors"),
        (["--out", "new/mine.safetensors"], "new/mine.safetensors"),
        (["--out", "new/mine.safetensors", "--name", "mine"], "new/mine.safetensors"),
        (["--out", "version.2"], "version.2/theirs.safetensors"),
    ],
)
def test_out_is_a_checkpoint_or_a_folder(
    flags: list[str], written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "version.2").mkdir()
    path = write_weights(tmp_path)
    default = [] if "--out" in flags else ["--out", "."]
    assert cli.main(["import", str(path), "--window", "64x64", *default, *flags]) == 0
    assert [str(each) for each in Path().rglob("*.safetensors")] == [written]
    assert load_checkpoint(Path(written)).name == Path(written).stem


@pytest.mark.usefixtures("resting")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--out", "w/a.safetensors", "--name", "b"],
         "--out w/a.safetensors and --name b are two names; leave one out"),
        (["--out", "w/a.pt"], "ends with .safetensors, for example w/a.safetensors"),
        (["--out", "file"], "file/theirs.safetensors cannot be written: file is not a folder"),
        (["--out", "file/a/b"], "cannot be written: file is not a folder"),
        (["--out", "folder.safetensors", "--force"], "folder.safetensors is a folder"),
    ],
)  # fmt: skip
def test_out_that_names_nothing_to_write_is_rejected(
    flags: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_weights(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert says in read_error(capsys, str(path), *flags)
    assert sorted(tmp_path.rglob("*")) == before
