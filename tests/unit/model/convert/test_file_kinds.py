"""Files that hold no network are named by their first bytes, and networks are let through."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from model.convert.file_kinds import check_kind
from model.errors import CheckpointError
from tests.onnx_networks import Net, export

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def message(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        check_kind(path)
    text = str(error.value)
    assert text.startswith(f"{path} is ")
    assert "\n" not in text
    return text.removeprefix(f"{path} ")


@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "GIF", "BMP", "WebP", "TIFF", "JPEG 2000", "AVIF"]
)
def test_image(tmp_path: Path, format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, format.replace(" ", ""))
    found = message(tmp_path / "cells.pth", buffer.getvalue())
    assert found.startswith(f"is an image ({format}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gzip", gzip.compress(b"weights")),
        ("bzip2", bz2.compress(b"weights")),
        ("xz", lzma.compress(b"weights")),
    ],
)
def test_compressed_file(tmp_path: Path, name: str, content: bytes) -> None:
    assert f"is a {name} archive; unpack it" in message(tmp_path / "weights", content)


def test_tar_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "weights.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    content = (tmp_path / "weights.tar").read_bytes()
    assert "is a tar archive; unpack it" in message(tmp_path / "weights", content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (POINTER, "is a pointer of Git LFS, not the file itself; run: git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>404", "is a web page, not the file itself"),
        (b"\n <HTML lang=en>", "is a web page, not the file itself"),
        (b"hello\nworld", r"is a text file, not a network; it begins with 'hello\nworld'"),
        ('{"name": "Größe"}'.encode(), """it begins with '{"name": "Größe"}'"""),
        (b"\xef\xbb\xbfa,b", "it begins with 'a,b'"),
        (("ä" * 300 + "b").encode(), "it begins with 'ä"),
        (b"x" + "ä".encode() * 300, "it begins with 'xä"),  # a character is cut at 512 bytes
        (b"\x1c\0\0\0TFL3", "is a TensorFlow Lite model; convert it to ONNX"),
        (b"%PDF-1.7\n\xe2\xe3", "is a PDF file"),
    ],
)
def test_other_file(tmp_path: Path, content: bytes, says: str) -> None:
    assert says in message(tmp_path / "weights.pth", content)


def test_array_of_numpy(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    content = (tmp_path / "array.npy").read_bytes()
    assert "is a NumPy file, not a network" in message(tmp_path / "weights", content)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "onnx"])
def test_file_of_a_network_is_let_through(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights"
    state = {"weight": torch.ones(3)}
    if kind == "onnx":
        path.write_bytes(export(Net()))
    elif kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    check_kind(path)


def test_safetensors_whose_length_looks_like_a_bitmap_is_let_through(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(int.from_bytes(b"BM", "little").to_bytes(8, "little") + b'{"a": ')
    check_kind(path)
