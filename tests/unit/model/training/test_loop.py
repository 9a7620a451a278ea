"""Training as a user sees it: it learns, validates, and writes its run."""

from __future__ import annotations

import io
import json
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from app import cli
from model.checkpoint import load_checkpoint
from model.evaluation.evaluate import Sample
from model.training import progress, validation
from model.training.data import read_sample
from model.training.trainer import READ_EVERY, Trainer
from tests.conftest import FIXTURES, ROOT
from tests.training_runs import (
    interrupt_after_step,
    read_error,
    read_records,
    read_report,
    read_weights,
    run,
)


@pytest.mark.slow
def test_run_writes_every_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--previews-per-epoch", "2", "--steps", "8") == 0
    folder = data / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "starts.jsonl", "state.pt", "metrics.jsonl", "curves.png", "samples.png",
        "report.json", "drawn.safetensors", "manifest.json", "tensorboard", "pictures",
    }  # fmt: skip
    report = read_report(folder)
    assert report["steps"] == 8
    assert report["images"] == {"training": 6, "validation": 2}
    assert {"dice", "iou", "f1_50", "ap_50", "found", "true"} <= report["validation"].keys()
    assert "dice" in report["training"]
    checkpoint = load_checkpoint(folder / "drawn.safetensors")
    assert checkpoint.card["metrics"] == report["validation"]
    assert checkpoint.card["training"]["steps"] == 8
    assert checkpoint.golden.image.size
    with Image.open(folder / "curves.png") as curves:
        assert curves.width > 300
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"samples", "curves"} <= set(board.Tags()["images"])
    shown = io.BytesIO(board.Images("samples")[-1].encoded_image_string)
    with Image.open(shown) as picture, Image.open(folder / "samples.png") as file:
        assert np.array_equal(np.asarray(picture), np.asarray(file))
    assert len(list((folder / "pictures").iterdir())) >= 4
    assert "drawn.safetensors" in capsys.readouterr().out


def test_losses_that_are_read_later_change_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: losses are read every 50 steps, and validation runs beside the training."""
    assert run(data, "--steps", "10", out="at once") == 0
    monkeypatch.setitem(READ_EVERY, "cpu", 50)
    monkeypatch.setattr(validation, "VALIDATE_BESIDE", {"cpu"})
    assert run(data, "--steps", "10", out="later") == 0
    expected, found = read_weights(data / "at once"), read_weights(data / "later")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    scores = [
        [record for record in read_records(data / out) if "dice" in record]
        for out in ("at once", "later")
    ]
    assert [record["step"] for record in scores[0]] == [4, 8]
    for first, second in zip(*scores, strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_compiled_network_is_trained(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler itself is not run: it takes minutes."""
    inputs = []

    def compile_network(network: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            inputs.append(x.shape)
            result: torch.Tensor = network(x)
            return result

        return forward

    monkeypatch.setattr(torch, "compile", compile_network)
    assert run(data, "--compile", "true", "--steps", "3") == 0
    assert inputs == [(2, 3, 48, 48)] * 3
    assert run(data, "--steps", "3", out="eager") == 0
    expected, found = read_weights(data / "eager"), read_weights(data / "run")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_short_runs_are_validated_ten_times(data: Path) -> None:
    flags = ["--validate-every", "0"]
    assert run(data, *flags, "--steps", "11", out="steps") == 0
    steps = [record["step"] for record in read_records(data / "steps") if "dice" in record]
    assert steps == list(range(1, 12))
    assert run(data, *flags, "--steps", "0", "--minutes", "0.1", out="minutes") == 0
    records = [record for record in read_records(data / "minutes") if "dice" in record]
    assert len(records) >= 9  # a slow step may pass a tenth of six seconds
    assert (data / "minutes/samples.png").exists()


@pytest.mark.slow
def test_best_weights_are_shipped(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later weights are destroyed, and the run is interrupted and resumed after the best ones."""
    measure = validation.measure
    kept = []

    def measure_and_keep(predictor: Any, *args: Any) -> Any:
        kept.append({k: v.clone() for k, v in predictor.network.state_dict().items()})
        return measure(predictor, *args)

    train_step = Trainer.step

    def step_and_destroy(trainer: Trainer, *args: Any) -> None:
        train_step(trainer, *args)
        if trainer.steps_done > 4:
            with torch.no_grad():
                for network in (trainer.ema, trainer.network):
                    network.final_conv.bias.fill_(-9)
                    network.final_conv.weight.zero_()

    monkeypatch.setattr(validation, "measure", measure_and_keep)
    monkeypatch.setattr(Trainer, "step", step_and_destroy)
    with monkeypatch.context() as patch:
        interrupt_after_step(patch, 6)
        assert run(data, "--learning-rate", "1e-2") == 0
    assert run(data, "--learning-rate", "1e-2") == 0
    report = read_report(data / "run")
    assert report["shipped_step"] == 4
    assert sorted(report["validation_by_step"], key=int) == ["4", "12"]
    assert report["validation"] == report["validation_by_step"]["4"]
    expected = kept[0]
    found = read_weights(data / "run")
    assert all(np.array_equal(expected[name].half().numpy(), found[name]) for name in expected)
    output = capsys.readouterr().out
    assert "stopped by Ctrl-C" in output
    assert re.search(r"best +step 4: validation Dice .* <- in the checkpoint", output)
    assert re.search(r"last +step 12: validation Dice 0", output)


@pytest.mark.slow
def test_run_stops_without_improvement(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--stop-after", "2", "--validate-every", "1", "--learning-rate", "1e-9"]
    assert run(data, *flags, "--warmup", "0") == 0
    assert read_report(data / "run")["steps"] == 8  # the validations after steps 7 and 8 count
    assert "stopped after 2 validations without a better score" in capsys.readouterr().out


def test_line_is_printed_without_a_terminal(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert run(data, "--steps", "3") == 0
    lines = capsys.readouterr().err
    assert re.search(r"step 3 of 3: loss [\d.]+, lr .* images/s, 00:00 left", lines)
    assert "reading: 2 of 2 images" in lines
    assert "validating: 2 of 2 images" in lines


@pytest.mark.slow
def test_run_with_pixels_without_a_label(data: Path) -> None:
    for path in (data / "masks").iterdir():
        labels = np.asarray(Image.open(path)).astype(np.uint16)
        labels[:, 60:] = 999
        Image.fromarray(labels).save(path)
    everywhere = ["--steps", "2", "--labels", "binary", "--out-channels", "1"]
    assert run(data, *everywhere, out="all") == 0
    assert run(data, *everywhere, "--ignore", "999", out="some") == 0
    first, second = read_report(data / "all"), read_report(data / "some")
    assert first["validation"]["dice"] != second["validation"]["dice"]
    device = ["--augment-on", "device"]
    assert run(data, *everywhere, "--ignore", "999", *device, out="device") == 0


def test_minutes_limit_the_training_time(data: Path) -> None:
    assert run(data, "--minutes", "0.01", "--steps", "0", "--validate-every", "1000") == 0
    state = torch.load(data / "run/state.pt", weights_only=True)
    assert 0.6 <= state["seconds"] < 10
    assert state["step"] > 1


def test_tensorboard_has_the_recipe_and_the_final_scores(data: Path) -> None:
    assert run(data, "--steps", "4", "--learning-rate", "0.002") == 0
    folder = data / "run"
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["optim.learning_rate"].number_value == 0.002
    assert values["optim.steps"].number_value == 4
    assert values["augment.crop"].string_value == "[48, 48]"
    (score,) = board.Scalars("final/dice")
    report = read_report(folder)
    assert score.value == pytest.approx(report["validation"]["dice"])
    assert score.step == report["shipped_step"]


@pytest.mark.parametrize("steps", ["0", "100000"])
def test_progress_bar_shows_the_time_left(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, steps: str
) -> None:
    """The time limit ends the run before the steps do."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    flags = ["--minutes", "0.01", "--validate-every", "1000", "--steps", steps]
    assert run(data, *flags) == 0
    left = re.findall(r"([\d:]+) left", capsys.readouterr().err)
    assert left
    assert {"00:00", "00:01"} >= set(left)


def test_validation_images_are_read_one_at_a_time(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Sample]] = []
    counts = []

    def read_and_count(*args: Any) -> Sample:
        alive[:] = [sample for sample in alive if sample() is not None]
        counts.append(len(alive))
        sample = read_sample(*args)
        alive.append(weakref.ref(sample))
        return sample

    monkeypatch.setattr("model.training.data.read_sample", read_and_count)
    assert run(data, "--validation-share", "0.75", "--steps", "4") == 0
    assert max(counts) <= 1


def test_several_classes_train_padded_and_unpadded(data: Path) -> None:
    for path in (data / "masks").iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray((labels % 3).astype(np.uint8)).save(path)
    flags = ["--labels", "classes", "--out-channels", "3", "--border-weight", "0"]
    flags += ["--classes", '["background","odd","even"]', "--steps", "2"]
    flags += ["--palette", "[[0,0,0],[255,0,0],[0,255,0]]"]
    assert run(data, *flags) == 0
    scores = read_report(data / "run")["validation"]
    assert list(scores["by_class"]) == ["background", "odd", "even"]
    assert load_checkpoint(data / "run/drawn.safetensors").card["metrics"] == scores
    confusion = (data / "run/confusion.csv").read_text().splitlines()
    assert confusion[0].split(",")[1:] == ["background", "odd", "even"]
    assert sum(int(count) for row in confusion[1:] for count in row.split(",")[1:]) == 2 * 96 * 112
    board = EventAccumulator(str(data / "run/tensorboard")).Reload()
    assert "confusion" in board.Tags()["images"]
    with Image.open(data / "run/confusion.png") as picture:
        assert picture.width > 200
    unpadded = ["--padding", "0", "--crop", "[204,204]", "--window", "[[204,204]]"]
    assert run(data, *flags, *unpadded, "--overlap", "0", out="unpadded") == 0
    assert load_checkpoint(data / "unpadded/drawn.safetensors").architecture.padding == 0


def test_whole_images_train(data: Path) -> None:
    flags = ["--crop", "[]", "--mode", "resize", "--window", "[[96,112]]", "--size", "[90,110]"]
    assert run(data, *flags, "--steps", "2") == 0


def test_whole_image_that_needs_several_windows_is_rejected(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--padding", "0", "--crop", "[]", "--mode", "resize", "--overlap", "0"]
    assert run(data, *flags, "--window", "[[284,300]]", "--steps", "1") == 2
    assert "size of at most 100x116, not 284x300" in read_error(capsys)


@pytest.mark.slow
def test_training_beats_the_untrained_network(tmp_path: Path) -> None:
    """On the image in the repository: half of it is for training, half for validation."""
    image = np.asarray(Image.open(FIXTURES / "img2d.tif"))
    labels = np.asarray(Image.open(FIXTURES / "mask2d.tif"))
    for index, (top, left) in enumerate(((0, 0), (256, 0), (0, 256), (256, 256))):
        cut = np.s_[top : top + 256, left : left + 256]
        for name, array in (("images", image), ("masks", labels)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array[cut].astype(np.uint16)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "validation.txt").write_text("2\n3\n")
    flags = {
        "sources": "[]", "labels": "instances", "golden": "",
        "images": tmp_path / "images", "masks": tmp_path / "masks",
        "validation-list": tmp_path / "validation.txt", "base-features": 8, "crop": "[64,64]",
        "batch-size": 4, "warmup": 10, "ema": 0.9, "learning-rate": 4e-3, "validate-every": 1000,
        "batch-norm": "true",
    }  # fmt: skip
    config = str(ROOT / "model/configs/nuclei.toml")
    options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    def train(out: str, *extra: str) -> dict[str, Any]:
        assert cli.main(["train", config, "--out", str(tmp_path / out), *options, *extra]) == 0
        return read_report(tmp_path / out)

    untrained = train("untrained", "--steps", "1")["validation"]["dice"]
    trained = train("trained", "--steps", "120")["validation"]["dice"]
    lines = (tmp_path / "trained/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses[-1] < losses[0] - 0.2
    assert trained > untrained + 0.2
    assert trained > 0.6


def test_run_starts_from_a_narrower_checkpoint(data: Path) -> None:
    assert run(data, "--steps", "4") == 0
    initial = data / "run/drawn.safetensors"
    wider = ["--init-from", str(initial), "--base-features", "8", "--batch-norm", "true"]
    assert run(data, *wider, "--steps", "1", "--learning-rate", "1e-9", out="wider") == 0
    reports = [read_report(data / out) for out in ("run", "wider")]
    first, second = (report["validation"]["dice"] for report in reports)
    assert second == pytest.approx(first, abs=0.01)  # it starts where the narrow one ended
    checkpoint = load_checkpoint(data / "wider/drawn.safetensors")
    assert checkpoint.architecture.base_features == 8
    assert np.abs(np.float32(checkpoint.state["down_conv.0.first.bias"])).max() > 0
