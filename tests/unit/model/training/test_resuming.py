"""Runs that are interrupted or killed resume; a run in use is locked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.checkpoint import load_checkpoint
from model.training import validation
from model.training.crops import CropDataset
from model.training.loop import catch_interrupt
from model.training.recipe import Recipe
from model.training.run_folder import open_run
from tests.training_runs import (
    ignore_fork_warning,
    interrupt_after_step,
    read_error,
    read_report,
    read_steps,
    read_weights,
    run,
    start,
    wait_for,
)

LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@ignore_fork_warning
def test_killed_run_resumes_to_the_same_result(data: Path) -> None:
    """With crops from workers, and compared with a run that was not killed and had none."""
    flags = ["--schedule", "constant"]
    process = start(data, *flags, "--steps", "1000000", "--workers", "2", out="killed")
    wait_for(data / "killed/state.pt")
    process.kill()
    process.communicate()
    step = torch.load(data / "killed/state.pt", weights_only=True)["step"]
    assert step >= 4
    with (data / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "loss')  # a line that the kill left incomplete
    flags += ["--steps", str(step + 4)]
    assert run(data, *flags, "--workers", "2", out="killed") == 0
    assert run(data, *flags, out="whole") == 0
    expected, found = read_weights(data / "whole"), read_weights(data / "killed")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert read_steps(data / "killed") == read_steps(data / "whole")
    assert len((data / "killed/starts.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_killed_run_with_crops_from_the_device_resumes_to_the_same_result(data: Path) -> None:
    flags = ["--schedule", "constant", "--augment-on", "device"]
    process = start(data, *flags, "--steps", "1000000", out="killed")
    wait_for(data / "killed/state.pt")
    process.kill()
    process.communicate()
    step = torch.load(data / "killed/state.pt", weights_only=True)["step"]
    flags += ["--steps", str(step + 4)]
    assert run(data, *flags, out="killed") == 0
    assert run(data, *flags, out="whole") == 0
    expected, found = read_weights(data / "whole"), read_weights(data / "killed")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_complete_run_is_not_repeated_silently(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(data, "--steps", "1") == 0
    assert run(data, "--steps", "1") == 0
    assert "is complete after 1 steps; its files are written again" in caplog.text


@pytest.mark.slow
def test_ctrl_c_ends_the_run_with_a_checkpoint(data: Path) -> None:
    """The terminal sends Ctrl-C to workers too."""
    process = start(data, "--steps", "1000000", "--workers", "1")
    wait_for(data / "run/state.pt")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "drawn.safetensors" in output
    assert read_report(data / "run")["steps"] >= 4
    load_checkpoint(data / "run/drawn.safetensors")


def test_run_with_another_recipe_is_rejected(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, "--steps", "2") == 0
    assert run(data, "--steps", "3", "--batch-size", "4") == 2
    assert "contains a run with batch_size = 2, not 4" in read_error(capsys)
    assert run(data, "--steps", "3", "--validate-every", "1") == 0


def test_card_and_golden_image_may_change_on_resume(data: Path) -> None:
    assert run(data, "--steps", "1") == 0
    card = ["--licence", "CC0-1.0", "--source", "drawn", "--golden", str(data / "images/0.png")]
    assert run(data, "--steps", "2", *card) == 0
    checkpoint = load_checkpoint(data / "run/drawn.safetensors")
    assert (checkpoint.card["licence"], checkpoint.card["data"]) == ("CC0-1.0", "drawn")
    assert np.array_equal(checkpoint.golden.image, np.asarray(Image.open(data / "images/0.png")))


def test_run_that_failed_before_its_first_state_may_be_replaced(data: Path) -> None:
    (data / "scores.json").write_text('{"images": []}')
    assert run(data, "--difficulty-report", str(data / "scores.json")) == 2
    assert (data / "run/config.json").exists()
    assert run(data, "--seed", "1", "--steps", "1") == 0


def test_value_that_an_old_recipe_lacks_had_its_default(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, "--steps", "1") == 0
    config = data / "run/config.json"
    values = json.loads(config.read_text())
    del values["augment"]["unresampled"], values["data"]["difficulty_report"]
    config.write_text(json.dumps(values))
    assert run(data, "--steps", "1", "--unresampled", "0.5") == 2
    assert "unresampled = 0.0, not 0.5" in read_error(capsys)
    assert run(data, "--steps", "1") == 0


def test_damaged_config_of_a_run_is_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--steps", "1") == 0
    for content in ("{", "[]", '{"optim": 3}'):
        (data / "run/config.json").write_text(content)
        assert run(data, "--steps", "1") == 2
        assert "config.json is damaged" in read_error(capsys)


def test_run_folder_with_old_recipe_keys_is_resumed(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, "--steps", "1") == 0
    config = data / "run/config.json"
    text = config.read_text()
    old_names = {
        "colors": "colours",
        "difficulty_report": "focus",
        "color": "colour",
        "unresampled": "exact",
        "init_from": "start",
        "grad_clip": "clip",
        "batch_size": "batch",
        "validate_every": "every",
        "previews_per_epoch": "pictures",
    }
    for name, old in old_names.items():
        assert f'"{name}"' in text
        text = text.replace(f'"{name}"', f'"{old}"')
    config.write_text(text)
    assert run(data, "--steps", "2") == 0
    config.write_text(text)
    assert run(data, "--steps", "3", "--batch-size", "4") == 2
    assert "contains a run with batch_size = 2, not 4" in read_error(capsys)


@pytest.mark.slow
def test_interrupted_run_with_old_state_keys_resumes_to_the_same_result(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(data, "--steps", "4", out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt_after_step(patch, 2)
        assert run(data, "--steps", "4", out="resumed") == 0
    path = data / "resumed/state.pt"
    state = torch.load(path, weights_only=True)
    assert state["step"] == 2
    state["average"], state["optimiser"] = state.pop("ema"), state.pop("optimizer")
    torch.save(state, path)
    assert run(data, "--steps", "4", out="resumed") == 0
    expected, found = read_weights(data / "whole"), read_weights(data / "resumed")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_restart_without_a_state_leaves_no_old_records(data: Path) -> None:
    assert run(data, "--steps", "4") == 0
    (data / "run/state.pt").unlink()
    assert run(data, "--steps", "4") == 0
    assert read_steps(data / "run") == [4]
    board = EventAccumulator(str(data / "run/tensorboard")).Reload()
    assert [event.step for event in board.Scalars("dice")] == [4]


def test_locked_folder_is_rejected(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "run").mkdir()
    command = [sys.executable, "-c", LOCK, str(data / "run/.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert run(data, "--steps", "1") == 2
        assert "is locked by another run; give another --out" in read_error(capsys)
        other.kill()
    (data / "run/.state.pt.1.part").touch()  # from a killed run
    assert run(data, "--steps", "1") == 0
    assert not list((data / "run").glob(".*.part"))


def test_run_locks_its_folder_until_it_ends(data: Path) -> None:
    def try_to_lock() -> int:
        script = LOCK.replace("time.sleep(60)", "")
        command = [sys.executable, "-c", script, str(data / "run/.lock")]
        return subprocess.run(command, capture_output=True, check=False).returncode

    with open_run(data / "run", Recipe.read(data / "recipe.toml")):
        assert try_to_lock() == 1
    assert try_to_lock() == 0


def test_resuming_does_not_need_the_initial_checkpoint(data: Path) -> None:
    assert run(data, "--steps", "1", out="first") == 0
    initial = ["--init-from", str(data / "first/drawn.safetensors")]
    assert run(data, *initial, "--steps", "1") == 0
    (data / "first/drawn.safetensors").unlink()
    assert run(data, *initial, "--steps", "2") == 0


def test_second_ctrl_c_interrupts_at_once() -> None:
    with catch_interrupt() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """Handle SIGINT as Python does; a shell makes background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize(
    ("owner", "name", "steps"),
    [(CropDataset, "preload", 0), (CropDataset, "__getitem__", 0), (validation, "evaluate", 1)],
    ids=["while reading", "before the first step", "in the final evaluation"],
)
def test_ctrl_c_outside_the_steps_writes_no_checkpoint(
    data: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, steps: int
) -> None:
    original = getattr(owner, name)

    def interrupt(*args: object, **kwargs: object) -> object:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupt)
    assert run(data, "--steps", "1") == 130
    assert not (data / "run/drawn.safetensors").exists()
    assert (data / "run/state.pt").exists() == bool(steps)
