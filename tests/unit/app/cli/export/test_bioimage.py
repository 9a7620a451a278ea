"""`unet export --bioimageio`: the package passes the test of bioimageio.core."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app import cli
from app.cli.export import bioimage
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, update_manifest
from model.config import PreprocessConfig, UNetConfig
from model.predict import Predictor, attach_golden
from tests.conftest import write_tiny
from tests.drawing import drawn_weights, nuclei

pytest.importorskip("bioimageio.core", reason="needs the extra export")

FLAGS = ["--author", "Ada Lovelace", "--licence", "MIT"]


@pytest.fixture
def tiny_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    return path


def change(path: Path, **fields: Any) -> Checkpoint:
    """Save the checkpoint at `path` with other fields, and a golden pair of 16 bits."""
    checkpoint = dataclasses.replace(load_checkpoint(path), **fields)
    image = checkpoint.golden.image.astype(np.uint16) * 3 + 1000
    saved = save_checkpoint(path, attach_golden(checkpoint, image))
    update_manifest(path)
    return saved


def export(path: Path, *flags: str) -> int:
    return cli.main(["export", str(path), "--bioimageio", str(path.with_suffix(".zip")), *flags])


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], zipfile.ZipFile]:
    """The description and the arrays of the package beside a checkpoint."""
    package = zipfile.ZipFile(io.BytesIO(path.with_suffix(".zip").read_bytes()))
    arrays = {
        name: np.load(io.BytesIO(package.read(name)))
        for name in package.namelist()
        if name.endswith(".npy")
    }
    return json.loads(package.read("rdf.yaml")), arrays, package


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "classes", "resize"])
def test_package_passes_the_test_of_bioimageio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path, classes=3 if kind == "classes" else 1, resize=kind == "resize")
    assert export(path, *FLAGS) == 0
    output = capsys.readouterr()
    assert "licence MIT; it passes the " in output.out
    assert output.err == ""
    description, arrays, package = read(path)
    assert description["cite"][0]["doi"] == "10.1007/978-3-319-24574-4_28"
    assert description["authors"] == [{"name": "Ada Lovelace"}]
    assert description["config"]["unet_server"]["checkpoint_sha256"] == load_checkpoint(path).sha256
    cover = Image.open(io.BytesIO(package.read("cover.png")))
    assert cover.width == 2 * cover.height or kind == "resize"
    assert arrays["test_input.npy"].shape[1] == 3
    assert arrays["test_output.npy"].shape[1] == load_checkpoint(path).architecture.out_channels


@pytest.mark.slow
@pytest.mark.parametrize("resize", [False, True])
def test_package_is_imported_with_everything_that_it_describes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], resize: bool
) -> None:
    path, again = tmp_path / "tiny.safetensors", tmp_path / "again.safetensors"
    write_tiny(path, classes=3, resize=resize)
    config = dataclasses.replace(load_checkpoint(path).preprocess, intensity="percentile")
    change(path, preprocess=config)
    assert export(path, *FLAGS) == 0
    capsys.readouterr()
    assert cli.main(["import", str(path.with_suffix(".zip")), "--out", str(again)]) == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if "test tensors" in each)
    assert float(line.split()[-3]) < (1e-3 if not resize else 0.05)
    imported = load_checkpoint(again)
    assert imported.card["licence"] == "MIT"
    assert imported.golden.image.dtype == np.uint16 or resize
    for name in ("mode", "window", "intensity", "percentiles", "classes"):
        assert getattr(imported.preprocess, name) == getattr(config, name), name


@pytest.mark.slow
def test_percentiles_of_16_bits_are_in_the_package(tiny_path: Path) -> None:
    config = dataclasses.replace(
        load_checkpoint(tiny_path).preprocess, intensity="percentile", window=((128, 128),)
    )
    checkpoint = change(tiny_path, preprocess=config)
    assert export(tiny_path, *FLAGS) == 0
    description, arrays, _ = read(tiny_path)
    steps = [each["id"] for each in description["inputs"][0]["preprocessing"]]
    assert steps == ["scale_range", "scale_linear"]
    assert arrays["test_input.npy"].max() > 255
    expected = arrays["test_output.npy"][0, :, :100, :100]
    found = Predictor.of(checkpoint)(checkpoint.golden.image)
    # percentiles are those of the window there, and of the image here
    assert np.abs(expected - found).mean() < 1e-3


@pytest.mark.slow
def test_network_without_padding_passes(tmp_path: Path) -> None:
    path = tmp_path / "valid.safetensors"
    architecture = UNetConfig(1, 1, 4, 0)
    config = PreprocessConfig(window=((204, 204),), overlap=0, mean=(0.5,), std=(0.25,))
    draft = Checkpoint("valid", architecture, config, drawn_weights(architecture, 0))
    save_checkpoint(path, attach_golden(draft, nuclei(100, 100, 0)[0]))
    assert export(path, *FLAGS) == 0
    _, arrays, _ = read(path)
    assert arrays["test_input.npy"].shape == (1, 1, 204, 204)
    assert arrays["test_output.npy"].shape == (1, 1, 20, 20)


@pytest.mark.slow
def test_package_that_fails_the_test_is_not_written(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = bioimage.compute_reference
    monkeypatch.setattr(bioimage, "compute_reference", lambda *each: 0.9 * compute(*each))
    assert export(tiny_path, *FLAGS) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unet: error: the test of bioimageio.core fails: Output 'probabilities'")
    assert not tiny_path.with_suffix(".zip").exists()


@pytest.mark.slow
def test_licence_is_that_of_the_weights_in_the_card(tiny_path: Path) -> None:
    change(
        tiny_path, card={"licence": "BSD-3-Clause (weights); CC0 (data)", "metrics": {"iou": 0.5}}
    )
    assert export(tiny_path, "--author", "A", "B") == 0
    description, _, package = read(tiny_path)
    assert description["license"] == "BSD-3-Clause"
    assert description["authors"] == [{"name": "A"}, {"name": "B"}]
    assert "## Validation\n\n- iou: 0.5\n" in package.read("README.md").decode()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--bioimageio needs --author NAME"),
        (["--author", "A"], "needs --licence ID, an identifier of SPDX such as MIT or CC-BY-4.0; "
         "the checkpoint says 'unknown'"),
        (["--author", "A", "--licence", "free"], "--licence free: not an identifier of SPDX"),
    ],
)  # fmt: skip
def test_mistake_is_one_line(
    tiny_path: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tiny_path, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not tiny_path.with_suffix(".zip").exists()
