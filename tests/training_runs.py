"""Runs of `unet train`, for tests of training: started here or in a process, and read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app import cli
from model.arrays import AnyArray
from model.checkpoint import load_checkpoint
from model.training.trainer import Trainer
from tests.conftest import ROOT

NUCLEI = str(ROOT / "weights/nuclei.safetensors")

# Workers are forked while TensorBoard's thread runs, of which Python 3.12 warns.
ignore_fork_warning = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def run(data: Path, *flags: str, out: str = "run") -> int:
    """Run `unet train` in this process and return its exit status."""
    return cli.main(["train", str(data / "recipe.toml"), "--out", str(data / out), *flags])


def start(data: Path, *flags: str, out: str = "run") -> subprocess.Popen[str]:
    """Start `unet train` in a process and a process group of its own."""
    command = [sys.executable, "-m", "app.cli", "train", str(data / "recipe.toml")]
    return subprocess.Popen(
        [*command, "--out", str(data / out), *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # like `one_thread` in this process
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and not path.exists():
        time.sleep(0.02)
    assert path.exists()


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def read_weights(folder: Path) -> Mapping[str, AnyArray]:
    return load_checkpoint(folder / "drawn.safetensors").state


def read_records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_records(folder)]


def read_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error that was printed, which is one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def interrupt_after_step(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Press Ctrl-C during a step."""
    train_step = Trainer.step

    def step_and_interrupt(trainer: Trainer, *args: Any) -> None:
        train_step(trainer, *args)
        if trainer.steps_done == last:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", step_and_interrupt)
