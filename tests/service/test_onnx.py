"""A server of an ONNX graph: every way in gives what the network computed where it was made."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from app import cli
from tests.conftest import Server, decode, encode, nuclei, serving
from tests.onnx_networks import BilinearUNet, Net, export, randomize_statistics

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
