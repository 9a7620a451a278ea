"""Training as a user sees it: it learns, can be killed and resumed, and reports mistakes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from app import cli
from model.arrays import AnyArray
from model.checkpoint import load_checkpoint
from model.evaluation.evaluate import Sample
from model.training import batches, progress, validation
from model.training.crops import CropDataset
from model.training.data import open_dataset, read_sample
from model.training.device_crops import ImagesDoNotFit
from model.training.loop import catch_interrupt
from model.training.recipe import Recipe
from model.training.run_folder import open_run
from model.training.split import split_dataset
from model.training.trainer import READ_EVERY, Trainer
from tests.conftest import FIXTURES, ROOT

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


def test_complete_run_is_not_repeated_silently(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(data, "--steps", "1") == 0
    assert run(data, "--steps", "1") == 0
    assert "is complete after 1 steps; its files are written again" in caplog.text


def test_line_is_printed_without_a_terminal(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert run(data, "--steps", "3") == 0
    lines = capsys.readouterr().err
    assert re.search(r"step 3 of 3: loss [\d.]+, lr .* images/s, 00:00 left", lines)
    assert "reading: 2 of 2 images" in lines
    assert "validating: 2 of 2 images" in lines


def test_label_below_zero_ends_before_training(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "masks/3.png").unlink()
    tifffile.imwrite(data / "masks/3.tif", np.full((96, 112), -1, np.int16))
    assert run(data) == 2
    assert "masks/3.tif contains the label -1" in read_error(capsys)


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


def test_minutes_limit_the_training_time(data: Path) -> None:
    assert run(data, "--minutes", "0.01", "--steps", "0", "--validate-every", "1000") == 0
    state = torch.load(data / "run/state.pt", weights_only=True)
    assert 0.6 <= state["seconds"] < 10
    assert state["step"] > 1


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
        "difficulty_report": "focus",
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


LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
time.sleep(60)
"""


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
