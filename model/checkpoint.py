"""Self-describing checkpoints: one `.safetensors` file holds everything that a mask needs.

Besides the network's tensors, under their state-dict names, or an ONNX graph, the file holds

- in its header, as JSON: the architecture, the preprocessing, a card (metrics, data, licence,
  training, git revision), and the int8 calibration if there is one;
- two more tensors, `golden.image` and `golden.mask`: an image and the reference's mask of it, which
  an engine must reproduce before it serves;
- a digest of all tensors, which detects damage wherever the file is copied.

`manifest.json` in the same folder records the sha256 of each file. Nothing is ever unpickled.
Arrays are NumPy. Knows no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from model.arrays import AnyArray, ByteArray
from model.config import (
    LEVELS,
    Architecture,
    Calibration,
    GraphConfig,
    PreprocessConfig,
    UNetConfig,
    check_name,
    check_together,
    read_architecture,
)
from model.errors import CheckpointError, ConfigError
from model.files import MAX_CHECKPOINT_BYTES, MAX_TEXT_BYTES, read_file

SUFFIX = ".safetensors"
MANIFEST = "manifest.json"
FORMAT = "unet-server/1"

GRAPH_TENSOR = "graph.onnx"
"""Name of the only tensor of a network that is an ONNX graph: the bytes of the file."""

_GOLDEN_IMAGE, _GOLDEN_MASK = "golden.image", "golden.mask"

_DAMAGED = (
    AttributeError,
    ConfigError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    SafetensorError,
)
"""Exceptions that invalid JSON, or JSON of another form, raises in its readers."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """An image and its mask, computed by the reference in fp32.

    Attributes:
        image: decoded, (H, W) or (H, W, 3), uint8 or uint16.
        mask: (H, W) uint8, as returned by `model.transforms.to_mask`.
    """

    image: AnyArray
    mask: ByteArray


_NO_GOLDEN = Golden(np.zeros((0, 0), np.uint8), np.zeros((0, 0), np.uint8))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained model and everything needed to run it.

    Attributes:
        name: the file's stem, by which clients request the model.
        architecture, preprocess: describe the network and its data path.
        state: tensors by state-dict name, float16 or float32; of an ONNX graph its bytes, as
            `GRAPH_TENSOR`.
        golden: the pair an engine must reproduce; empty until `model.predict.attach_golden`.
        card: facts for people, as JSON: metrics, data, licence, training, revision, ...
        calibration: activation ranges for int8, or None.
        sha256: of the file, in hex; empty before it is saved.
    """

    name: str
    architecture: Architecture
    preprocess: PreprocessConfig
    state: Mapping[str, AnyArray]
    golden: Golden = dataclasses.field(default_factory=lambda: _NO_GOLDEN)
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None
    sha256: str = ""

    @property
    def id(self) -> str:
        """name@sha256, shortened to 12 hex digits: identifies exactly these weights."""
        return f"{self.name}@{self.sha256[:12]}"

    @property
    def unet(self) -> UNetConfig:
        """The architecture of a `model.unet.UNet`, for what only such a network can do.

        Raises:
            CheckpointError: the network is an ONNX graph.
        """
        if isinstance(self.architecture, GraphConfig):
            raise CheckpointError(
                f"{self.name} is an ONNX graph; this works with U-Nets of this project alone"
            )
        return self.architecture


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Write a checkpoint atomically: a reader sees the old file or the new one.

    Returns:
        The checkpoint with the name and sha256 of the file.

    Raises:
        ConfigError: architecture and preprocessing do not match, or the file's name is not a valid
            model name.
        CheckpointError: the tensors do not match the architecture, or the golden pair is missing.
        OSError: the file cannot be written. An existing file is left intact.
    """
    check_name(path.stem)
    check_together(checkpoint.architecture, checkpoint.preprocess)
    tensors = {name: np.ascontiguousarray(value) for name, value in checkpoint.state.items()}
    _check_tensors(path, tensors, checkpoint.architecture)
    if not checkpoint.golden.image.size:
        raise CheckpointError(f"{path}: the checkpoint has no golden pair")
    tensors[_GOLDEN_IMAGE] = np.ascontiguousarray(checkpoint.golden.image)
    tensors[_GOLDEN_MASK] = np.ascontiguousarray(checkpoint.golden.mask)
    header = {
        "format": FORMAT,
        "digest": _digest(tensors),
        "architecture": json.dumps(checkpoint.architecture.to_json()),
        "preprocess": json.dumps(checkpoint.preprocess.to_json()),
        "card": json.dumps(checkpoint.card),
    }
    if checkpoint.calibration is not None:
        header["calibration"] = json.dumps(checkpoint.calibration.to_json())
    content = save(tensors, metadata=header)
    write_atomically(path, content)
    return dataclasses.replace(
        checkpoint, name=path.stem, sha256=hashlib.sha256(content).hexdigest()
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: the file is missing, truncated, altered, or not a checkpoint; one line says
            which, and what to do.
    """
    try:
        content = read_file(path, MAX_CHECKPOINT_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    recorded = read_manifest(path.parent).get(path.name, sha256)
    if recorded != sha256:
        raise CheckpointError(
            f"{path} does not match {MANIFEST}: its sha256 starts with {sha256[:12]}, not "
            f"{recorded[:12]}; download it again, or update the manifest if you changed the file"
        )
    header = _read_header(path, content)
    try:
        tensors = load(content)
        if header["digest"] != _digest(tensors):
            raise CheckpointError(f"{path} is damaged: its tensors do not match their digest")
        golden = Golden(tensors.pop(_GOLDEN_IMAGE), tensors.pop(_GOLDEN_MASK))
        architecture = read_architecture(json.loads(header["architecture"]))
        preprocess = PreprocessConfig.from_json(json.loads(header["preprocess"]))
        card = json.loads(header["card"])
        if not isinstance(card, dict):
            raise ConfigError(f"card must be an object, not a {type(card).__name__}")
        stored = json.loads(header.get("calibration", "null"))
        calibration = Calibration.from_json(stored) if stored else None
        check_together(architecture, preprocess)
    except CheckpointError:
        raise
    except _DAMAGED as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    _check_tensors(path, tensors, architecture)
    return Checkpoint(
        path.stem, architecture, preprocess, tensors, golden, card, calibration, sha256
    )


def read_manifest(folder: Path) -> dict[str, str]:
    """Read the sha256 of each file that the folder's manifest lists; empty without a manifest.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    return {name: entry["sha256"] for name, entry in _read_entries(folder / MANIFEST).items()}


def update_manifest(path: Path) -> None:
    """Add the file at `path` to the manifest in its folder.

    Raises:
        CheckpointError: the existing manifest is damaged. It is left as it is.
        OSError: the file cannot be read, or the manifest cannot be written.
    """
    content = path.read_bytes()
    manifest = path.parent / MANIFEST
    entries = _read_entries(manifest)
    entries[path.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    write_atomically(manifest, (json.dumps(entries, indent=2, sort_keys=True) + "\n").encode())


def _read_entries(manifest: Path) -> dict[str, dict[str, Any]]:
    try:
        entries: dict[str, dict[str, Any]] = json.loads(read_file(manifest, MAX_TEXT_BYTES))
        if not all(isinstance(entry["sha256"], str) for entry in entries.values()):
            raise TypeError("sha256 must be a string")
    except FileNotFoundError:
        return {}
    except (OSError, *_DAMAGED) as error:
        raise CheckpointError(
            f'{manifest} should map file names to {{"sha256": ...}}: {error!r}'
        ) from error
    return entries


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace the file at `path` in one step. On failure the old file stays intact."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def git_revision() -> str:
    """Return the checked-out commit, with `+` if files changed since; "unknown" outside git."""
    root = Path(__file__).parent
    try:
        revision = _run_git("rev-parse", "--short=12", "HEAD", cwd=root)
        return revision + ("+" if _run_git("status", "--porcelain", "-uno", cwd=root) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def parameter_shapes(config: UNetConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of the network's state dict (see model.unet)."""
    widths = [config.base_features * 2**level for level in range(LEVELS + 1)]

    def conv(name: str, out: int, *rest: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, *rest)
        yield f"{name}.bias", (out,)

    def double(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from conv(f"{name}.first", outputs, inputs, 3, 3)
        yield from conv(f"{name}.second", outputs, outputs, 3, 3)

    levels = list(pairwise(widths))
    for level, (inputs, outputs) in enumerate([(config.in_channels, widths[0]), *levels[:-1]]):
        yield from double(f"down_conv.{level}", inputs, outputs)
    yield from double("middle_conv", *levels[-1])
    for level, (low, high) in enumerate(reversed(levels)):
        yield f"up_sample.{level}.up.weight", (high, low, 2, 2)
        yield f"up_sample.{level}.up.bias", (low,)
    for level, (low, high) in enumerate(reversed(levels)):
        yield from double(f"up_conv.{level}", high, low)
    yield from conv("final_conv", config.out_channels, widths[0], 1, 1)


def _run_git(*arguments: str, cwd: Path) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.strip()


def _read_header(path: Path, content: bytes) -> dict[str, str]:
    """Read the metadata of a safetensors file: 8 bytes of length, then JSON."""
    if not content:
        raise CheckpointError(f"{path} is empty")
    if content[:4] == b"PK\x03\x04" or content[:2] == b"\x80\x02":
        raise CheckpointError(
            f"{path} is a pickled torch file, which is never opened for serving; convert it with: "
            f"unet import {path} --name {path.stem}"
        )
    length = int.from_bytes(content[:8], "little")
    if content[8:9] != b"{":
        raise CheckpointError(f"{path} is not a safetensors file")
    if len(content) < 8 + length:
        raise CheckpointError(f"{path} is truncated: its header is incomplete")
    try:
        fields = json.loads(content[8 : 8 + length])
        header: dict[str, str] = fields.pop("__metadata__", None) or {}
        known = header.get("format") == FORMAT
        size = 8 + length + max((each["data_offsets"][1] for each in fields.values()), default=0)
    except _DAMAGED as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if len(content) < size:
        raise CheckpointError(f"{path} is truncated: {len(content):,} bytes of {size:,}")
    if not known:
        raise CheckpointError(
            f"{path} is a safetensors file that does not describe its network; convert it with: "
            f"unet import {path} --name {path.stem}"
        )
    return header


def _check_tensors(path: Path, tensors: Mapping[str, AnyArray], architecture: Architecture) -> None:
    """Check that the tensors are those of the network.

    Raises:
        CheckpointError: they are not, or an ONNX graph is not accepted.
    """
    if isinstance(architecture, GraphConfig):
        _check_graph(path, tensors, architecture)
        return
    wanted = dict(parameter_shapes(architecture))
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} does not match {architecture}: {name} should be "
                f"{wanted.get(name, 'absent')}, but is {found.get(name, 'absent')}"
            )


def _check_graph(path: Path, tensors: Mapping[str, AnyArray], config: GraphConfig) -> None:
    from model.graph import check_graph  # imports onnx

    graph = tensors.get(GRAPH_TENSOR, np.zeros(0))
    if len(tensors) != 1 or graph.dtype != np.uint8 or graph.ndim != 1:
        raise CheckpointError(f"{path} should have one tensor, {GRAPH_TENSOR}, the bytes of a file")
    try:
        check_graph(graph.tobytes(), config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _digest(tensors: Mapping[str, AnyArray]) -> str:
    """Hash name, type, shape and bytes of every tensor with sha256, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
