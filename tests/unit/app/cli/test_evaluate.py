"""`unet evaluate`: its data, and the mistakes it reports before it measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app import cli
from tests.conftest import nuclei, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, of one class and of three, and two images with masks of two classes."""
    root = tmp_path_factory.mktemp("evaluate")
    write_tiny(root / "one.safetensors")
    write_tiny(root / "three.safetensors", classes=3)
    for part in ("images", "masks"):
        (root / part).mkdir()
    for seed in range(2):
        image, labels = nuclei(64, 64, seed)
        Image.fromarray(image).save(root / f"images/{seed}.png")
        Image.fromarray((labels % 3).astype(np.uint8)).save(root / f"masks/{seed}.png")
    return root


def evaluate(folder: Path, model: str, *more: str) -> int:
    data = ["--images", str(folder / "images"), "--masks", str(folder / "masks")]
    return cli.main(["evaluate", str(folder / f"{model}.safetensors"), *data, *more])


def test_masks_of_classes_are_the_default_for_several_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert evaluate(folder, "three", "--json", str(report)) == 0
    by_default = report.read_text()
    assert evaluate(folder, "three", "--labels", "classes", "--json", str(report)) == 0
    assert report.read_text() == by_default
    assert "dice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "more", "says"),
    [
        (
            "three",
            ["--labels", "binary"],
            "masks of binary cannot be used for a model with 3 classes",
        ),
        ("three", ["--labels", "instances"], "masks of instances cannot be used"),
        (
            "one",
            ["--labels", "classes"],
            "masks of classes cannot be used for a model with 2 classes",
        ),
        ("one", ["--config", "model/configs/nuclei.toml"], "leave out these flags"),
        ("one", ["--part", "training"], "--part needs --config"),
        ("one", ["--json", "/no/such/report.json"], "/no/such is not a folder"),
        ("one", ["--sheet", "/no/such/sheet.png"], "/no/such is not a folder"),
        ("one", ["--device", "foo"], "--device foo: must be auto, cpu, cuda or cuda:N"),
        ("one", ["--device", "foo", "--engine", "auto"], "--device foo: must be"),
        ("one", ["--engine", "openvino", "--precision", "fp16"], "--precision fp16"),
        ("one", ["--url", "http://localhost:1"], "localhost:1"),
        ("one", ["--url", "http://localhost:abc"], "invalid server URL 'http://localhost:abc'"),
    ],
)
def test_mistake_is_one_line_before_anything_is_measured(
    folder: Path, model: str, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, model, *more) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.startswith("unet: error: ")
    assert said.err.count("\n") == 1
    assert not said.out
