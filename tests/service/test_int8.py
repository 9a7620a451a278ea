"""From `unet export --calibrate` to a service that says what it runs in, and why."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.cli import main
from app.engine.openvino import OpenVinoEngine
from app.engine.predictor import engine_predictor
from model.checkpoint import Golden, load_checkpoint, save_checkpoint, update_manifest
from model.config import Calibration
from model.transforms import to_mask
from tests.conftest import Server, encode, nuclei, serving, write_tiny


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Six drawn fields with their labels."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for seed in range(6):
        image, labels = nuclei(150, 140, seed)
        Image.fromarray(image).save(tmp_path / "images" / f"{seed}.png")
        Image.fromarray(labels).save(tmp_path / "labels" / f"{seed}.png")
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
        name = "drawn"
        [data]
        images = "{tmp_path}/images"
        masks = "{tmp_path}/labels"
        labels = "instances"
        validation_share = 0.5
        [preprocess]
        classes = ["none", "nucleus"]
        [optim]
        steps = 1
    """)
    return path


def test_a_network_that_sees_nothing_proves_nothing(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two empty masks are the same; that says nothing of int8."""
    path = tmp_path / "blind.safetensors"
    write_tiny(path)
    checkpoint = load_checkpoint(path)
    state = {**checkpoint.state, "final_conv.bias": checkpoint.state["final_conv.bias"] - 100}
    save_checkpoint(path, dataclasses.replace(checkpoint, state=state))
    update_manifest(path)
    assert main(["export", str(path), "--calibrate", str(recipe), "--images", "2"]) == 0
    calibration = load_checkpoint(path).calibration
    assert calibration is not None
    assert not calibration.validated
    assert len(calibration.ranges) == 22  # so that it can still be asked for
    assert "no validation image that shows anything" in capsys.readouterr().out


def loaded(server: Server, name: str) -> dict[str, Any]:
    """What /models says of it once it is loaded, which only the default model is from the start."""
    while True:
        model: dict[str, Any] = httpx.get(f"{server.url}/models/{name}").json()
        assert not model["error"]
        if model["ready"]:
            return model
        time.sleep(0.05)


def test_calibrated_proven_served(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    plain = folder / "plain.safetensors"
    write_tiny(plain)
    measured = folder / "measured.safetensors"
    asked = ["export", str(plain), "--calibrate", str(recipe), "--images", "2"]
    status, said = main([*asked, "--out", str(measured)]), capsys.readouterr()
    assert status == 0, said.err
    checkpoint = load_checkpoint(measured)
    calibration = checkpoint.calibration
    assert calibration is not None
    assert calibration.images == 3
    assert len(calibration.ranges) == 22  # every convolution but the last, whose output is logits
    assert 0.5 < calibration.iou <= 1
    assert str(calibration) in said.out
    assert load_checkpoint(plain).calibration is None

    figures = {
        "proven": Calibration(calibration.ranges, 3, iou=0.995, dice_loss=0.0, golden_iou=0.99),
        "unproven": Calibration(calibration.ranges, 3, iou=0.95, dice_loss=0.0, golden_iou=0.99),
    }
    for name, figure in figures.items():
        path = folder / f"{name}.safetensors"
        draft = dataclasses.replace(checkpoint, calibration=figure)
        if figure.validated:  # untrained weights need a golden mask that int8 can reproduce
            engine = OpenVinoEngine(checkpoint, threads=2, max_batch=1, precision="int8")
            probabilities = engine_predictor(engine, checkpoint)(checkpoint.golden.image)
            mask = to_mask(probabilities, checkpoint.preprocess)
            draft = dataclasses.replace(draft, golden=Golden(checkpoint.golden.image, mask))
        save_checkpoint(path, draft)
        update_manifest(path)
    image = encode(nuclei(100, 100)[0])
    with serving(UNET_WEIGHTS_DIR=str(folder), UNET_MODEL="plain") as server:
        for name, precision, why in (
            ("plain", "fp32", "no calibration"),
            ("unproven", "fp32", "IoU 0.9500"),
            ("proven", "int8", "IoU 0.9950"),
        ):
            model = loaded(server, name)
            assert model["precision"] == precision
            assert why in model["chosen_because"]
            answer = httpx.post(
                f"{server.url}/segment",
                params={"model": name},
                content=image,
                headers={"Content-Type": "image/png"},
            )
            assert answer.status_code == 200
            assert answer.headers["X-Engine"].endswith(precision)
