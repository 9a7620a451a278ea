"""A run that starts from a checkpoint ships nothing that is worse than that checkpoint."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.predict import attach_golden
from model.training.best import BestWeights
from model.training.initial import InitialWeights
from model.training.trainer import Snapshot, Trainer
from tests.conftest import drawn_weights, nuclei
from tests.training_runs import (
    interrupt_after_step,
    read_records,
    read_report,
    read_steps,
    read_weights,
    run,
)


def write_start(data: Path, foreground: float, outputs: int = 2) -> list[str]:
    """Write a checkpoint that predicts one value everywhere; return flags to start from it.

    Args:
        foreground: the logit of the foreground.
    """
    network = UNetConfig(3, outputs, 4, 1)
    preprocess = PreprocessConfig(window=((112, 112),), overlap=16)
    state = drawn_weights(network, 0)
    state["final_conv.weight"][:] = 0
    state["final_conv.bias"][:] = [foreground, -9][:outputs]
    draft = Checkpoint("begin", network, preprocess, state)
    save_checkpoint(data / "begin.safetensors", attach_golden(draft, nuclei(96, 112)[0]))
    return ["--init-from", str(data / "begin.safetensors")]


@pytest.fixture
def destructive_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step makes the network predict background everywhere, which has a Dice of 0."""
    train_step = Trainer.step

    def step_and_destroy(trainer: Trainer, *args: Any) -> None:
        train_step(trainer, *args)
        with torch.no_grad():
            for network in (trainer.ema, trainer.network):
                network.final_conv.bias.fill_(-9)
                network.final_conv.weight.zero_()

    monkeypatch.setattr(Trainer, "step", step_and_destroy)


def assert_start_is_shipped(data: Path, out: str) -> None:
    start = load_checkpoint(data / "begin.safetensors").state
    shipped = read_weights(data / out)
    assert all(np.array_equal(start[name].astype(np.float16), shipped[name]) for name in start)


@pytest.mark.usefixtures("destructive_steps")
def test_start_is_shipped_if_no_step_improves_it(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, *write_start(data, 9.0), "--steps", "4") == 0
    assert_start_is_shipped(data, "run")
    output = capsys.readouterr().out
    assert re.search(r"step 0: validation Dice 0\.[1-9].*, the start, begin@", output)
    assert re.search(r"step 4: validation Dice 0.0000.*; the start is better", output)
    assert re.search(r"\nstart +step 0: validation Dice 0\.[1-9].* <- in the checkpoint", output)
    assert "training did not improve the weights of begin@" in output
    assert "train longer, or use a lower learning rate" in output
    report = read_report(data / "run")
    assert report["shipped_step"] == 0
    assert report["validation"] == report["validation_by_step"]["0"]
    assert report["start"]["checkpoint"] == load_checkpoint(data / "begin.safetensors").id
    card = load_checkpoint(data / "run/drawn.safetensors").card
    assert card["metrics"] == report["validation"]
    assert "did not improve" in card["training"]["warning"]
    first, *_ = read_records(data / "run")
    assert (first["step"], first["dice"]) == (0, report["validation"]["dice"])


@pytest.mark.slow
def test_trained_weights_are_shipped_if_they_are_better(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, *write_start(data, -9.0), "--learning-rate", "1e-2") == 0
    report = read_report(data / "run")
    assert report["shipped_step"] > 0
    assert report["start"]["validation"] == report["validation_by_step"]["0"]
    assert report["validation"]["dice"] >= report["start"]["validation"]["dice"]
    assert "warning" not in load_checkpoint(data / "run/drawn.safetensors").card["training"]
    assert "did not improve" not in capsys.readouterr().out


@pytest.mark.usefixtures("destructive_steps")
def test_start_with_new_outputs_is_not_validated(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its border channel is new, so its scores say nothing."""
    assert run(data, *write_start(data, 9.0, outputs=1), "--steps", "4") == 0
    report = read_report(data / "run")
    assert report["shipped_step"] == 4
    assert "start" not in report
    assert read_steps(data / "run") == [4]
    assert "step 0" not in capsys.readouterr().out


@pytest.mark.usefixtures("destructive_steps")
def test_start_is_compared_on_all_validation_images(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if trained weights had a higher score on the images of a validation during the run."""
    update = BestWeights.update

    def overrate(best: BestWeights, score: float, *args: Any) -> None:
        update(best, 0.99, *args)

    monkeypatch.setattr(BestWeights, "update", overrate)
    assert run(data, *write_start(data, 9.0), "--steps", "6") == 0
    report = read_report(data / "run")
    assert sorted(report["validation_by_step"]) == ["0", "4", "6"]
    assert report["shipped_step"] == 0
    assert_start_is_shipped(data, "run")


@pytest.mark.slow
@pytest.mark.usefixtures("destructive_steps")
def test_resumed_run_still_has_its_start(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the checkpoint was deleted since."""
    flags = [*write_start(data, 9.0), "--steps", "8"]
    assert run(data, *flags, out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt_after_step(patch, 6)
        assert run(data, *flags, out="resumed") == 0
    (data / "begin.safetensors").rename(data / "gone.safetensors")
    assert run(data, *flags, out="resumed") == 0
    (data / "gone.safetensors").rename(data / "begin.safetensors")
    assert_start_is_shipped(data, "resumed")
    assert read_steps(data / "resumed") == read_steps(data / "whole") == [0, 4, 8]


@pytest.mark.slow
def test_resumed_fine_tuning_has_the_same_result(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*write_start(data, -1.0), "--learning-rate", "1e-2"]
    assert run(data, *flags, out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt_after_step(patch, 6)
        assert run(data, *flags, out="resumed") == 0
    assert run(data, *flags, out="resumed") == 0
    expected, found = read_weights(data / "whole"), read_weights(data / "resumed")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    scores = [read_report(data / out)["validation_by_step"] for out in ("whole", "resumed")]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_restart_without_a_state_validates_the_start_once(data: Path) -> None:
    flags = write_start(data, 9.0)
    assert run(data, *flags, "--steps", "4") == 0
    (data / "run/state.pt").unlink()
    assert run(data, *flags, "--steps", "4") == 0
    assert read_steps(data / "run") == [0, 4]


class DrawnSnapshot(Snapshot):
    """A snapshot without a network that computes anything."""

    def __init__(self, step: int) -> None:
        network = torch.nn.Linear(1, 1)
        super().__init__(dataclasses.make_dataclass("Holder", ["network"])(network), {"step": step})


def test_start_that_is_better_does_not_end_a_run_that_improves() -> None:
    best = BestWeights()
    best.take_start(0.9, InitialWeights("a@0", {}, (), solve_task=True))
    for step, score in enumerate((0.2, 0.3, 0.4), start=1):
        best.update(score, DrawnSnapshot(step))
        assert best.since == 0
    assert (best.step, best.score) == (0, 0.9)
    best.update(0.4, DrawnSnapshot(4))
    assert best.since == 1
    best.update(0.9, DrawnSnapshot(5))
    assert (best.step, best.since) == (5, 0)


def test_state_of_an_earlier_version_has_no_start() -> None:
    best = BestWeights.load({"best": {"step": 4, "score": 0.5, "weights": {}, "since": 1}})
    best.update(0.5, DrawnSnapshot(8))
    assert (best.since, best.step, best.start) == (2, 8, "")
