"""Checkpoints: everything that is saved is loaded, and damage is reported in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save

from model.checkpoint import (
    GRAPH_TENSOR,
    Checkpoint,
    Golden,
    load_checkpoint,
    parameter_shapes,
    read_manifest,
    save_checkpoint,
    update_manifest,
    write_atomically,
)
from model.config import Calibration, GraphConfig, PreprocessConfig, UNetConfig
from model.errors import CheckpointError, ConfigError
from model.unet import UNet
from tests.onnx_networks import Net, export


@pytest.fixture
def checkpoint() -> Checkpoint:
    architecture = UNetConfig(3, 1, 2)
    rng = np.random.default_rng(0)
    return Checkpoint(
        "tiny",
        architecture,
        PreprocessConfig(intensity="percentile", threshold=0.4),
        {n: rng.normal(size=s).astype(np.float16) for n, s in parameter_shapes(architecture)},
        Golden(np.zeros((8, 8), np.uint16), np.full((8, 8), 255, np.uint8)),
        {"metrics": {"dice": 0.5}, "licence": "MIT"},
    )


def test_loading_returns_what_was_saved(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "other-name.safetensors"
    saved = save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    assert loaded.name == "other-name"
    assert loaded.sha256 == saved.sha256
    assert loaded.id == f"other-name@{saved.sha256[:12]}"
    assert loaded.architecture == checkpoint.architecture
    assert loaded.preprocess == checkpoint.preprocess
    assert loaded.card == checkpoint.card
    assert loaded.golden.image.dtype == np.uint16
    assert np.array_equal(loaded.golden.mask, checkpoint.golden.mask)
    assert loaded.state.keys() == checkpoint.state.keys()
    for name, tensor in loaded.state.items():
        assert np.array_equal(tensor, checkpoint.state[name])
    assert loaded.calibration is None


def test_header_contains_the_calibration(tmp_path: Path, checkpoint: Checkpoint) -> None:
    measured = Calibration({"down_conv.0.first": (0.0, 5.779), "up_sample.0.up": (-5.437, 5.53)})
    validated = dataclasses.replace(
        measured, images=49, iou=0.99495, dice_loss=0.00043, golden_iou=0.998
    )
    for calibration in (measured, validated):
        path = tmp_path / "calibrated.safetensors"
        save_checkpoint(path, dataclasses.replace(checkpoint, calibration=calibration))
        loaded = load_checkpoint(path).calibration
        assert loaded is not None
        assert loaded == calibration
        assert loaded.validated == (calibration is validated)


@pytest.mark.parametrize(("base", "channels"), [(2, 1), (4, 5)])
def test_parameter_shapes_are_those_of_the_network(base: int, channels: int) -> None:
    network = UNet(3, channels, base_features=base)
    real = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert dict(parameter_shapes(network.config)) == real


def test_failed_write_leaves_the_old_file(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, dataclasses.replace(checkpoint, card={}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 9, 200, -1])
def test_truncated_file_is_reported_in_one_line(
    tmp_path: Path, checkpoint: Checkpoint, keep: int
) -> None:
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, checkpoint)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors (is|has)") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [-3, -5000])
def test_changed_tensor_is_detected(tmp_path: Path, checkpoint: Checkpoint, index: int) -> None:
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, checkpoint)
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_file_that_differs_from_the_manifest_is_rejected(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    path = tmp_path / "tiny.safetensors"
    saved = save_checkpoint(path, checkpoint)
    update_manifest(path)
    assert read_manifest(tmp_path) == {"tiny.safetensors": saved.sha256}
    assert load_checkpoint(path).sha256 == saved.sha256
    save_checkpoint(path, dataclasses.replace(checkpoint, card={"licence": "mine"}))
    with pytest.raises(CheckpointError, match=r"does not match manifest\.json"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": {}}', '{"tiny.safetensors": {"sha256": 1}}'])
def test_damaged_manifest_is_reported_and_kept(
    tmp_path: Path, checkpoint: Checkpoint, text: str
) -> None:
    path, manifest = tmp_path / "tiny.safetensors", tmp_path / "manifest.json"
    save_checkpoint(path, checkpoint)
    manifest.write_text(text)
    calls: tuple[Callable[[Path], object], ...] = (load_checkpoint, update_manifest)
    for call in calls:
        with pytest.raises(CheckpointError, match=r"manifest\.json should map file names"):
            call(path)
    assert manifest.read_text() == text


def test_pickled_file_is_not_opened_and_the_error_names_unet_import(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"pickled .* unet import .*foreign\.pth"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps([1], protocol=2))
    with pytest.raises(CheckpointError, match="pickled"):
        load_checkpoint(path)


def test_plain_safetensors_file_is_rejected_and_the_error_names_unet_import(
    tmp_path: Path,
) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(save({"weight": np.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"does not describe .* unet import"):
        load_checkpoint(path)


def to_safetensors(header: bytes) -> bytes:
    """Return a safetensors file with this header and no tensors."""
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"plain text, and not a checkpoint",
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{",
        to_safetensors(b"{]"),
        to_safetensors(b'{"a": [1, 2]}'),
        to_safetensors(b'{"a": {"data_offsets": [0]}}'),
        to_safetensors(b'{"a": {"data_offsets": ["0", "1"]}}'),
        to_safetensors(b'{"a":' + b"[" * 100_000),
    ],
)
def test_garbage_is_reported_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="garbage"):
        load_checkpoint(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read"):
        load_checkpoint(tmp_path / "absent.safetensors")


def test_contradictions_are_rejected_before_writing(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "tiny.safetensors"
    with pytest.raises(ConfigError, match="output channels"):
        save_checkpoint(path, dataclasses.replace(checkpoint, architecture=UNetConfig(3, 7, 2)))
    with pytest.raises(CheckpointError, match="does not match"):
        save_checkpoint(path, dataclasses.replace(checkpoint, architecture=UNetConfig(3, 1, 4)))
    draft = Checkpoint("tiny", checkpoint.architecture, checkpoint.preprocess, checkpoint.state)
    with pytest.raises(CheckpointError, match="golden pair"):
        save_checkpoint(path, draft)
    assert not path.exists()


def rewrite_metadata(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Replace the metadata in a file's header by `change(metadata)`."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = change(header["__metadata__"])
    path.write_bytes(to_safetensors(json.dumps(header).encode()) + content[8 + length :])


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("preprocess", {"windows": [[256, 256]]}, "unknown key 'windows'"),
        ("preprocess", {"window": 256}, "damaged header"),
        ("architecture", [], "damaged header"),
        ("architecture", {"base_features": "64"}, "damaged header"),
        ("card", [1], "card must be an object, not a list"),
        ("calibration", {"ranges": [1]}, "damaged header"),
        ("calibration", [1], "damaged header"),
    ],
)
def test_invalid_header_is_reported_in_one_line(
    tmp_path: Path, checkpoint: Checkpoint, part: str, value: Any, says: str
) -> None:
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, checkpoint)
    rewrite_metadata(path, lambda metadata: metadata | {part: json.dumps(value)})
    with pytest.raises(CheckpointError, match=rf"tiny\.safetensors .*{says}") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", [[1], "text", {"format": "unet-server/1"}])
def test_invalid_metadata_is_reported(
    tmp_path: Path, checkpoint: Checkpoint, metadata: object
) -> None:
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, checkpoint)
    rewrite_metadata(path, lambda _: metadata)
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors has a damaged header"):
        load_checkpoint(path)


def test_atomic_write_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first")
    write_atomically(path, io.BytesIO(b"second").getbuffer())
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def save_graph(path: Path, content: bytes, **config: Any) -> Checkpoint:
    """Save a checkpoint of an ONNX graph."""
    preprocess = PreprocessConfig(window=((64, 64),), overlap=0)
    state = {GRAPH_TENSOR: np.frombuffer(content, np.uint8)}
    golden = Golden(np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8))
    graph = GraphConfig(input="x", outputs=("y",), **config)
    return save_checkpoint(path, Checkpoint("graph", graph, preprocess, state, golden))


def test_graph_is_saved_and_loaded(tmp_path: Path) -> None:
    path, content = tmp_path / "graph.safetensors", export(Net(), output_names=["y"])
    saved = save_graph(path, content, divisor=2)
    loaded = load_checkpoint(path)
    assert (
        loaded.architecture
        == saved.architecture
        == GraphConfig(input="x", outputs=("y",), divisor=2)
    )
    assert loaded.state[GRAPH_TENSOR].tobytes() == content
    with pytest.raises(CheckpointError, match="graph is an ONNX graph; this works with U-Nets"):
        _ = loaded.unet


def test_graph_is_checked_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The author of a checkpoint need not have used `unet import`."""
    path = tmp_path / "graph.safetensors"
    model = onnx.load_from_string(export(Net(), output_names=["y"]))
    model.graph.node[0].domain = "com.example"
    with pytest.raises(CheckpointError, match=r"is of the domain 'com\.example'"):
        save_graph(path, model.SerializeToString())
    with monkeypatch.context() as patch:
        patch.setattr("model.graph.check_graph", lambda *_: None)
        save_graph(path, model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"is of the domain 'com\.example'") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"graph": np.zeros(4, np.uint8)},
        {GRAPH_TENSOR: np.zeros(4, np.float32)},
        {GRAPH_TENSOR: np.zeros((2, 2), np.uint8)},
        {GRAPH_TENSOR: np.zeros(4, np.uint8), "more": np.zeros(1)},
    ],
)
def test_graph_is_the_only_tensor(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    preprocess = PreprocessConfig(window=((64, 64),), overlap=0)
    draft = Checkpoint("graph", GraphConfig(), preprocess, state)
    with pytest.raises(CheckpointError, match="should have one tensor"):
        save_checkpoint(tmp_path / "graph.safetensors", draft)
