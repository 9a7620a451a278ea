"""Files that are not imported are named by their format, with a way out."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.convert.foreign_files import InertObject, load_content
from model.errors import CheckpointError
from tests.conftest import write_tiny


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_content(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(path: Path) -> None:
    torch.jit.script(torch.nn.Conv2d(3, 4, 1)).save(str(path))
    assert "TorchScript" in message(path)
    run_advice(path)


@pytest.mark.slow
def test_exported_program(path: Path) -> None:
    path = path.with_suffix(".pt2")
    program = torch.export.export(torch.nn.Conv2d(3, 4, 1), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(program, path)
    assert "(.pt2)" in message(path)
    run_advice(path)


def run_advice(path: Path) -> None:
    """Run the lines of the message; they write a state dict."""
    lines = message(path).partition("run: ")[2].partition(", and import")[0]
    lines = lines.replace(path.name, str(path)).replace("weights.pth", str(path.parent / "w.pth"))
    exec(lines, {"torch": torch})
    assert {"weight", "bias"} == load_content(path.parent / "w.pth").keys()


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes"),
        (b"\x89PNG\r\n\x1a\n", "is an image (PNG)"),
        (b"\x01\x02\x03\x04", "is not a torch or safetensors file"),
        (b"PK\x03\x04", "is damaged, cut off or of another format (File is not a zip file)"),
        (b"\x10\0\0\0\0\0\0\0{", "is damaged, cut off or of another format"),
        (b"\x80\x02", "is damaged, cut off or of another format"),
    ],
)
def test_first_bytes(path: Path, start: bytes, says: str) -> None:
    path.write_bytes(start)
    assert says in message(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_file_that_is_cut_off(path: Path, kind: str) -> None:
    state = {"weight": torch.ones(1000)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for length in (*range(0, 400, 7), len(content) // 2):
        path.write_bytes(content[:length])
        text = message(path)
    assert "is damaged, cut off or of another format" in text


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["model.weights.h5", "config.json"], "is a Keras model"),
        (["rdf.yaml", "weights.pt"], "bioimage.io package; run: unzip model.bin weights.pt"),
        (["bioimageio.yaml", "weights.h5"], "without an ONNX graph or a state dict"),
        (["arr_0.npy"], "NumPy archive"),
        (["readme.txt"], "zip archive"),
    ],
)
def test_archives(path: Path, names: list[str], says: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    assert says in message(path)


def test_checkpoint_of_this_project(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    assert f"unet serve --model tiny --weights-dir {tmp_path}" in message(path)


def test_folder_and_missing_file(tmp_path: Path) -> None:
    assert "Is a directory" in message(tmp_path)
    assert "No such file" in message(tmp_path / "missing.pth")


class Other:
    def __init__(self) -> None:
        self.rate = 0.1


def test_object_of_a_class_becomes_inert(path: Path) -> None:
    torch.save(Other(), path)
    content = load_content(path)
    assert type(content) is InertObject
    assert content.attributes == {"rate": 0.1}
