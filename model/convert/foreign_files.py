"""Read what other programs saved, without executing anything in it, and name what is not read.

A file is recognised by its content. Torch files are read by torch's restricted unpickler. Where a
file names a class or a function, an `InertObject` takes its place, which keeps attributes and does
nothing, so the tensors of a pickled module can be read without its code.

Knows files; no networks.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from model.checkpoint import FORMAT
from model.convert.file_kinds import check_kind, is_safetensors
from model.errors import CheckpointError, first_line
from model.files import check_regular

_NUMPY_NAMES = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
)
"""Names in files with NumPy values beside the weights, for torch's format before 1.6, in which the
names cannot be listed."""

_ZIP = b"PK"
_PICKLE = b"\x80"
"""Start of a pickle of protocol 2 or later, which torch writes."""
_HDF5 = b"\x89HDF\r\n\x1a\n"
_TRAIN = "train a network with `unet train` on its data"
_KERAS_ADVICE = f"convert it to ONNX where its code is, and import the .onnx file; or {_TRAIN}"


class InertObject:
    """Takes the place of an object whose class a file names. Nothing of the file is called.

    Attributes:
        attributes: of the object, as the file has them.
    """

    attributes: Mapping[str, Any] = {}

    def __new__(cls, *_: Any) -> InertObject:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def load_content(path: Path) -> Any:
    """Load a file of torch or safetensors without executing anything in it.

    Returns:
        Mappings, lists and tensors, with an `InertObject` for every object of another class.

    Raises:
        CheckpointError: the file cannot be read, or has another format; the message names the
            format and says how to get its weights, where that is possible.
    """
    try:
        check_regular(path)
        check_kind(path)
        with path.open("rb") as file:
            start = file.read(16)
        is_archive = start.startswith(_ZIP)
        if is_archive:
            _check_archive(path)
        elif is_safetensors(start):
            return _load_safetensors(path)
        elif start.startswith(_HDF5):
            raise CheckpointError(f"{path} is an HDF5 file, as Keras writes; {_KERAS_ADVICE}")
        elif not start.startswith(_PICKLE):
            raise CheckpointError(f"{path} is not a torch or safetensors file")
        return _load_torch(path, is_archive)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} contains pickled objects that are never loaded; where its code is, run: "
            f"torch.save(model.state_dict(), 'weights.pth'), and import weights.pth"
        ) from error
    except (
        RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, SafetensorError,
        zipfile.BadZipFile, struct.error, AssertionError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{path} is damaged, cut off or of another format ({first_line(error)}); copy or "
            "download it again"
        ) from error


def _load_safetensors(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("format") == FORMAT:
            raise CheckpointError(
                f"{path} is a checkpoint of this project already: serve it with: unet serve "
                f"--model {path.stem} --weights-dir {path.parent}"
            )
        return {name: file.get_tensor(name) for name in file.offset_keys()}


def _load_torch(path: Path, is_archive: bool) -> Any:
    names = get_unsafe_globals_in_checkpoint(str(path)) if is_archive else _NUMPY_NAMES
    with safe_globals([(InertObject, name) for name in names]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: Path) -> None:
    """Report zip archives that are not files of `torch.save`.

    Raises:
        CheckpointError: it is one.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last and any("/code/" in name for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript program; where torch is, run: m = torch.jit.load("
            f"'{path.name}', map_location='cpu'); torch.save(m.state_dict(), 'weights.pth'), and "
            "import weights.pth"
        )
    if "archive_format" in last or "serialized_exported_program.json" in last:
        raise CheckpointError(
            f"{path} is a program of torch.export (.pt2); where torch is, run: p = "
            f"torch.export.load('{path.name}'); torch.save(p.state_dict, 'weights.pth'), and "
            "import weights.pth"
        )
    if "model.weights.h5" in last:
        raise CheckpointError(f"{path} is a Keras model; {_KERAS_ADVICE}")
    if {"rdf.yaml", "bioimageio.yaml"} & last:
        raise CheckpointError(_describe_bioimage(path, names))
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        kind = "NumPy archive" if any(name.endswith(".npy") for name in names) else "zip archive"
        raise CheckpointError(
            f"{path} is a {kind} without a state dict of torch; unpack it and import the file of "
            "torch or safetensors in it"
        )


def _describe_bioimage(path: Path, names: list[str]) -> str:
    weights = [name for name in names if name.endswith((".pt", ".pth", ".safetensors"))]
    if not weights:
        return (
            f"{path} is a bioimage.io package without an ONNX graph or a state dict of torch; "
            f"{_TRAIN}"
        )
    return (
        f"{path} is a bioimage.io package; run: unzip {path.name} {weights[0]}, and import "
        f"{weights[0]} (rdf.yaml has its preprocessing)"
    )
