"""Files that are not regular, or too large."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model.checkpoint import load_checkpoint
from model.errors import CheckpointError, ConfigError
from model.files import read_file, read_stream
from model.training.recipe import Recipe


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def link_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_fifo, link_device])
def test_fifo_and_device_are_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "nuclei.safetensors")
    make(tmp_path / "recipe.toml")
    started = time.monotonic()
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "recipe.toml", 10)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_checkpoint(tmp_path / "nuclei.safetensors")
    with pytest.raises(ConfigError, match="not a regular file"):
        Recipe.read(tmp_path / "recipe.toml")
    assert time.monotonic() - started < 1


def test_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_file(tmp_path / "file", 10) == b"0123456789"
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_file(tmp_path / "file", 9)


def test_stream_is_read_up_to_its_bound() -> None:
    assert read_stream(io.BytesIO(b"0123456789"), 10) == b"0123456789"
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_stream(io.BytesIO(b"0123456789"), 9)
    with (
        Path("/dev/zero").open("rb") as endless,
        pytest.raises(OSError, match="more than"),
    ):
        read_stream(endless, 3_000_000)


@pytest.mark.parametrize("name", ["recipe.toml", "recipe.json"])
def test_recipe_that_is_nested_too_deeply_is_an_error_of_one_line(
    name: str, tmp_path: Path
) -> None:
    start = "x = " if name.endswith("toml") else ""
    (tmp_path / name).write_text(start + "[" * 100_000 + "]" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply") as error:
        Recipe.read(tmp_path / name)
    assert "\n" not in str(error.value)
