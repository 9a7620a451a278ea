"""A server of an ONNX graph: every way in gives what the network computed where it was made."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from app import cli
from app.engine.predictor import engine_predictor
from app.engine.selection import build_engine, choose_engines
from model.checkpoint import Golden, load_checkpoint, save_checkpoint, update_manifest
from model.config import Calibration
from model.transforms import to_mask
from tests.conftest import ROOT, Server, decode, encode, nuclei, serving
from tests.onnx_networks import BilinearUNet, Net, export, randomize_statistics
from tests.unit.app.engine.test_graph_quantizers import find_ranges, make_content

NETWORK = randomize_statistics(BilinearUNet(outputs=3))
IMAGE = np.repeat(nuclei(96, 128)[0][:, :, None], 3, axis=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "theirs.onnx").write_bytes(export(NETWORK))
    windows = ["--window", "96x128", "64x64"]
    command = ["import", str(folder / "theirs.onnx"), "--out", str(folder), *windows]
    assert cli.main([*command, "--classes", "cell", "edge"]) == 0
    return folder


def test_graph_is_served_as_any_other_model(weights: Path) -> None:
    with torch.no_grad():
        pixels = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float() / 255
        expected = NETWORK(pixels).softmax(1)[0].numpy()
    with serving("--weights-dir", str(weights), "--model", "theirs", "--reload", "true") as server:
        (model,) = httpx.get(f"{server.url}/models").json()["models"]
        assert (model["engine"], model["precision"], model["golden_iou"]) == ("openvino", "fp32", 1)
        assert model["architecture"]["kind"] == "onnx"
        assert model["classes"] == ["background", "cell", "edge"]
        mask = decode(httpx.post(f"{server.url}/segment", content=encode(IMAGE)).content)
        assert (mask == expected.argmax(0)).mean() > 0.999  # ties are rounding
        probabilities = read_probabilities(server, IMAGE)
        assert np.abs(probabilities - expected).max() < 1e-4
        many = np.tile(IMAGE, (4, 3, 1))  # is cut into windows
        assert read_probabilities(server, many).shape == (3, 384, 384)
        replace_by_another(weights, server)


def test_calibrated_graph_is_served_in_int8(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    content = make_content()
    path.write_bytes(content)
    assert cli.main(["import", str(path), "--out", str(tmp_path), "--window", "64x64"]) == 0
    calibration = Calibration(find_ranges(content), 9, iou=0.995, dice_loss=0.0, golden_iou=0.99)
    checkpoint = load_checkpoint(tmp_path / "small.safetensors")
    draft = dataclasses.replace(checkpoint, calibration=calibration)
    (choice,) = choose_engines(device="cpu", precision="int8")
    predict = engine_predictor(build_engine(choice, draft), draft)
    image = IMAGE[:, :, 0]
    mask = to_mask(predict(image), draft.preprocess)
    golden = Golden(image, mask)  # untrained weights need a golden mask that int8 reproduces
    save_checkpoint(tmp_path / "small.safetensors", dataclasses.replace(draft, golden=golden))
    update_manifest(tmp_path / "small.safetensors")
    with serving("--weights-dir", str(tmp_path), "--model", "small") as server:
        (model,) = httpx.get(f"{server.url}/models").json()["models"]
        assert (model["precision"], model["golden_iou"]) == ("int8", 1)
        assert str(calibration) in model["chosen_because"]
        response = httpx.post(f"{server.url}/segment", content=encode(image))
        assert response.headers["X-Engine"] == "cpu/int8"
        assert np.array_equal(decode(response.content), mask)


def test_int8_that_is_set_needs_a_calibrated_graph(weights: Path) -> None:
    settings = ["--weights-dir", str(weights), "--model", "theirs", "--precision", "int8"]
    command = [sys.executable, "-m", "app", "serve", "--port", "0", *settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    expected = "theirs has no calibration; make one with: unet export theirs.safetensors"
    assert expected in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def read_probabilities(server: Server, image: np.ndarray) -> np.ndarray:
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [1, *image.shape],
        "data": image.ravel().tolist(),
    }
    body = {"inputs": [tensor], "outputs": [{"name": "probabilities"}]}
    response = httpx.post(f"{server.url}/v2/models/theirs/infer", json=body, timeout=60)
    (output,) = response.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])[0]


def replace_by_another(weights: Path, server: Server) -> None:
    """Import another graph under the same name while the server runs, and wait for it."""

    def describe() -> dict[str, Any]:
        described: dict[str, Any] = httpx.get(f"{server.url}/models/theirs").json()
        return described

    before = describe()["sha256"]
    (weights / "theirs.onnx").write_bytes(export(Net(outputs=3)))
    command = ["import", str(weights / "theirs.onnx"), "--out", str(weights), "--force"]
    assert cli.main([*command, "--window", "64x64"]) == 0
    until = time.monotonic() + 60
    while (model := describe())["sha256"] == before:
        assert model["error"] is None
        assert time.monotonic() < until, "the new graph was not loaded"
        time.sleep(0.1)
