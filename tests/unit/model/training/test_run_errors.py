"""Mistakes and faults of a run: each is one line, and nothing that was saved is lost."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from model.training import batches, validation
from model.training.data import open_dataset
from model.training.device_crops import ImagesDoNotFit
from model.training.recipe import Recipe
from model.training.split import split_dataset
from model.training.trainer import READ_EVERY
from tests.training_runs import (
    NUCLEI,
    ignore_fork_warning,
    read_error,
    run,
)


def test_infinite_loss_that_is_read_later_names_its_step(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--learning-rate", "1e30", "--grad-clip", "0", "--warmup", "0", "--steps", "9"]
    flags += ["--validate-every", "100"]
    assert run(data, *flags, out="at once") == 2
    expected = read_error(capsys)
    monkeypatch.setitem(READ_EVERY, "cpu", 50)
    assert run(data, *flags, out="later") == 2
    assert read_error(capsys) == expected
    assert not (data / "later/drawn.safetensors").exists()


def test_weights_that_are_not_finite_end_a_run_that_validates_beside(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the validation's thread reaches the run, here when it ends."""
    monkeypatch.setattr(validation, "VALIDATE_BESIDE", {"cpu"})
    flags = ["--learning-rate", "1e30", "--steps", "1", "--validate-every", "1"]
    assert run(data, *flags) == 2
    assert "too large for fp16 after step 1; try a lower --learning-rate" in read_error(capsys)
    assert not (data / "run/state.pt").exists()


def test_images_that_do_not_fit_on_the_device_are_one_line(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: object) -> None:
        raise ImagesDoNotFit("the training images take too much memory")

    monkeypatch.setattr(batches, "DeviceCrops", reject)
    assert run(data, "--augment-on", "device") == 2
    assert "too much memory; use --augment-on host" in read_error(capsys)


def test_label_below_zero_ends_before_training(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "masks/3.png").unlink()
    tifffile.imwrite(data / "masks/3.tif", np.full((96, 112), -1, np.int16))
    assert run(data) == 2
    assert "masks/3.tif contains the label -1" in read_error(capsys)


def test_infinite_loss_names_the_images_of_the_batch(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, "--learning-rate", "1e30", "--grad-clip", "0", "--warmup", "0") == 2
    error = read_error(capsys)
    assert re.search(r"the loss is (nan|inf) at step \d+, in the batch of \d, \d", error)
    assert not (data / "run/drawn.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["CUDA", "torch", "NumPy"],
)
def test_out_of_memory_is_one_line(
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("model.training.trainer.segmentation_loss", fail)
    assert run(data) == 2
    line = read_error(capsys)
    assert "memory" in line
    assert "try a smaller --crop, --base-features, or --batch-size than 2" in line


def test_other_runtime_errors_are_bugs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("model.training.trainer.segmentation_loss", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(data)


@pytest.mark.parametrize("validate_every", ["1", "400"])
def test_weights_that_are_not_finite_are_not_saved(
    data: Path, capsys: pytest.CaptureFixture[str], validate_every: str
) -> None:
    flags = ["--learning-rate", "1e30", "--steps", "1", "--validate-every", validate_every]
    assert run(data, *flags) == 2
    assert "too large for fp16 after step 1; try a lower --learning-rate" in read_error(capsys)
    assert not (data / "run/state.pt").exists()
    assert not (data / "run/drawn.safetensors").exists()


def test_infinite_gradient_keeps_the_last_state(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(data, "--steps", "1") == 0
    before = (data / "run/state.pt").read_bytes()

    def steep(logits: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return (logits.sum() * 0).sqrt()  # 0, with an infinite slope

    monkeypatch.setattr("model.training.trainer.segmentation_loss", steep)
    assert run(data, "--steps", "2") == 2
    error = read_error(capsys)
    assert "the gradient's norm is nan at step 1, in the batch of" in error
    assert f"the last state is kept in {data / 'run'}; try another --out" in error
    assert (data / "run/state.pt").read_bytes() == before


def test_missing_golden_image_is_found_before_training(data: Path) -> None:
    assert run(data, "--steps", "1", "--golden", "absent.png") == 2
    assert not (data / "run").exists()


@ignore_fork_warning
def test_unreadable_image_in_a_worker_is_one_line(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.read(data / "recipe.toml")
    training, _ = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    bad = training.pairs[-1].image
    bad.write_bytes(bad.read_bytes()[:100])
    assert run(data, "--workers", "1", "--cache-mb", "0", "--initialisation", "torch") == 2
    assert f"{bad} cannot be read" in read_error(capsys)


def test_full_disk_leaves_the_last_state(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(data, "--steps", "4") == 0
    before = (data / "run/state.pt").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert run(data, "--steps", "8") == 2
    assert f"{data / 'run'} cannot be written: No space left on device" in read_error(capsys)
    assert (data / "run/state.pt").read_bytes() == before
    assert not list((data / "run").glob(".*.part"))


def test_folder_that_cannot_be_created_is_one_line(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, out="recipe.toml/run") == 2
    assert "recipe.toml/run cannot be written: Not a directory" in read_error(capsys)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--images", "absent"], "absent is not a folder"),
        (["--crop", "[50,50]"], "multiples of 16"),
        (["--device", "cuda"], "device 'cuda' is not available: no CUDA device"),
        (["--seed", "9223372036854775808"], "seed must be"),
        (["--golden", "absent.png"], "absent.png cannot be read"),
        (["--init-from", "absent.safetensors"], "absent.safetensors cannot be read"),
        (["--groups", "absent.csv"], "absent.csv cannot be read: No such file"),
        (["--init-from", NUCLEI, "--base-features", "16"], "not widened from base_features 16"),
    ],
)
def test_mistake_is_one_line_and_status_2(
    data: Path, capsys: pytest.CaptureFixture[str], flags: Sequence[str], says: str
) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run(data, *flags, "--steps", "2") == 2
    assert says in read_error(capsys)
