"""int8 from `unet export --calibrate` to a service that reports its precision, and why."""

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
    """A recipe with six synthetic images and their labels."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for seed in range(6):
        image, labels = nuclei(150, 140, seed)
        Image.fromarray(image).save(tmp_path / "images" / f"{seed}.png")
        Image.fromarray(labels).save(tmp_path / "labels" / f"{seed}.png")
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
        name = "synthetic"
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


def test_empty_masks_do_not_validate_int8(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two empty masks are equal whatever int8 does."""
    path = tmp_path / "empty.safetensors"
    write_tiny(path)
    checkpoint = load_checkpoint(path)
    state = {**checkpoint.state, "final_conv.bias": checkpoint.state["final_conv.bias"] - 100}
    save_checkpoint(path, dataclasses.replace(checkpoint, state=state))
    update_manifest(path)
    assert main(["export", str(path), "--calibrate", str(recipe), "--images", "2"]) == 0
    calibration = load_checkpoint(path).calibration
    assert calibration is not None
    assert not calibration.validated
    assert len(calibration.ranges) == 22  # so that int8 can still be set
    assert "no validation image with foreground" in capsys.readouterr().out


def wait_until_loaded(server: Server, name: str) -> dict[str, Any]:
    """Wait until a model is loaded, and return its entry in /models."""
    while True:
        model: dict[str, Any] = httpx.get(f"{server.url}/models/{name}").json()
        assert not model["error"]
        if model["ready"]:
            return model
        time.sleep(0.05)


def test_a_validated_model_is_served_in_int8(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    plain = folder / "plain.safetensors"
    write_tiny(plain)
    calibrated = folder / "calibrated.safetensors"
    command = ["export", str(plain), "--calibrate", str(recipe), "--images", "2"]
    status, output = main([*command, "--out", str(calibrated)]), capsys.readouterr()
    assert status == 0, output.err
    checkpoint = load_checkpoint(calibrated)
    calibration = checkpoint.calibration
    assert calibration is not None
    assert calibration.images == 3
    assert len(calibration.ranges) == 22  # every convolution but the last, whose output is logits
    assert 0.5 < calibration.iou <= 1
    assert str(calibration) in output.out
    assert load_checkpoint(plain).calibration is None

    calibrations = {
        "validated": Calibration(calibration.ranges, 3, iou=0.995, dice_loss=0.0, golden_iou=0.99),
        "inaccurate": Calibration(calibration.ranges, 3, iou=0.95, dice_loss=0.0, golden_iou=0.99),
    }
    for name, calibration in calibrations.items():
        path = folder / f"{name}.safetensors"
        draft = dataclasses.replace(checkpoint, calibration=calibration)
        if calibration.validated:  # untrained weights need a golden mask that int8 reproduces
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
            ("inaccurate", "fp32", "IoU 0.9500"),
            ("validated", "int8", "IoU 0.9950"),
        ):
            model = wait_until_loaded(server, name)
            assert model["precision"] == precision
            assert why in model["chosen_because"]
            response = httpx.post(
                f"{server.url}/segment",
                params={"model": name},
                content=image,
                headers={"Content-Type": "image/png"},
            )
            assert response.status_code == 200
            assert response.headers["X-Engine"].endswith(precision)
