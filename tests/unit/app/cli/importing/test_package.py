"""`unet import package.zip`: the description answers for the flags."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import cli
from model.checkpoint import load_checkpoint
from model.config import GraphConfig
from model.convert.export import export_onnx
from model.predict import Predictor
from tests.conftest import write_tiny
from tests.drawing import nuclei


def write_package(folder: Path, step: dict[str, Any] | None = None) -> tuple[Path, np.ndarray]:
    """Write a package whose graph takes values 0..255, and return the probabilities to expect."""
    path = folder / "source.safetensors"
    write_tiny(path)
    checkpoint = load_checkpoint(path)
    graph, _ = export_onnx(checkpoint, "float32")
    image = np.stack([nuclei(64, 64)[0]] * 3, axis=2)
    expected = Predictor.of(checkpoint)(image)
    arrays = {
        "in.npy": image.transpose(2, 0, 1)[None].astype(np.float32),
        "out.npy": expected[None],
    }
    space = [{"type": "space", "id": axis, "size": 64} for axis in "yx"]
    description = {
        "license": "MIT",
        "inputs": [
            {
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": ["r", "g", "b"]},
                    *space,
                ],
                "data": {"type": "float32", "range": [0, 255]},
                "test_tensor": {"source": "in.npy"},
                "preprocessing": [step] if step else [],
            }
        ],
        "outputs": [
            {
                "axes": [{"type": "batch"}, {"type": "channel", "channel_names": ["cell"]}, *space],
                "test_tensor": {"source": "out.npy"},
            }
        ],
        "weights": {"onnx": {"source": "weights.onnx"}},
    }
    package = folder / "theirs.zip"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("rdf.yaml", json.dumps(description))
        archive.writestr("weights.onnx", graph)
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(name, buffer.getvalue())
    return package, expected


def test_package_becomes_a_checkpoint_that_gives_its_test_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, expected = write_package(tmp_path)
    assert cli.main(["import", str(package), "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    line = output.splitlines()[-1]
    assert line.startswith("test tensors of the package: probabilities differ by ")
    assert float(line.split()[-3]) < 1e-4
    checkpoint = load_checkpoint(tmp_path / "theirs.safetensors")
    assert isinstance(checkpoint.architecture, GraphConfig)
    assert checkpoint.preprocess.classes == ("background", "cell")
    assert checkpoint.preprocess.window == ((64, 64),)
    assert checkpoint.card["licence"] == "MIT"
    assert checkpoint.card["imported_from"] == "theirs.zip"
    mask = np.where(expected[0] >= checkpoint.preprocess.threshold, 255, 0)
    assert np.array_equal(checkpoint.golden.mask, mask)


def test_flags_win_over_the_description(tmp_path: Path) -> None:
    package, _ = write_package(tmp_path, {"id": "zero_mean_unit_variance"})
    flags = ["--std", "0.5", "0.5", "0.5", "--classes", "spot", "--licence", "CC0-1.0"]
    assert cli.main(["import", str(package), "--out", str(tmp_path), *flags]) == 0
    checkpoint = load_checkpoint(tmp_path / "theirs.safetensors")
    assert checkpoint.preprocess.std == (0.5, 0.5, 0.5)
    assert checkpoint.preprocess.classes == ("background", "spot")
    assert checkpoint.card["licence"] == "CC0-1.0"


def test_normalization_that_cannot_be_expressed_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, _ = write_package(tmp_path, {"id": "zero_mean_unit_variance"})
    assert cli.main(["import", str(package), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "theirs.zip: it normalizes each image by the image's own mean" in line
    assert "set --mean and --std" in line
    assert not (tmp_path / "theirs.safetensors").exists()


def test_flag_of_weights_does_not_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, _ = write_package(tmp_path)
    assert cli.main(["import", str(package), "--half"]) == 2
    assert "--half does not apply to an ONNX graph" in capsys.readouterr().err
