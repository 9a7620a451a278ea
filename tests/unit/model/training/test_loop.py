"""Training as a user sees it: it learns, it can be killed, and mistakes are named."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app import cli
from model.checkpoint import load_checkpoint
from model.training import loop as train
from model.training.crops import Crops
from model.training.data import open_dataset, read_sample, split_dataset
from model.training.loop import _interruptible
from model.training.recipe import Recipe
from tests.conftest import FIXTURES, ROOT


def run(data, *flags, out="run"):
    return cli.main(["train", str(data / "recipe.toml"), "--out", str(data / out), *flags])


def test_a_run_leaves_everything_that_was_promised(data, capsys):
    assert run(data, "--previews-per-epoch", "2") == 0
    folder = data / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "starts.jsonl", "state.pt", "metrics.jsonl", "curves.png", "samples.png",
        "report.json", "drawn.safetensors", "manifest.json", "tensorboard", "pictures",
    }  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    assert report["steps"] == 12
    assert report["images"] == {"training": 6, "validation": 2}
    assert {"dice", "iou", "f1_50", "ap_50", "found", "true"} <= report["validation"].keys()
    assert "dice" in report["training"]
    checkpoint = load_checkpoint(folder / "drawn.safetensors")
    assert checkpoint.card["metrics"] == report["validation"]
    assert checkpoint.card["training"]["steps"] == 12
    assert checkpoint.golden.image.size
    with Image.open(folder / "curves.png") as curves:
        assert curves.width > 300
    assert any((folder / "tensorboard").iterdir())
    assert len(list((folder / "pictures").iterdir())) >= 4
    assert "drawn.safetensors" in capsys.readouterr().out


def tensors(folder):
    return load_checkpoint(folder / "drawn.safetensors").state


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_run_goes_on_to_the_same_result(data, workers):
    # Each in a process of its own: sums over a batch depend on the number of threads, and workers
    # are forked; this process has had other tests.
    train = [sys.executable, "-m", "app.cli", "train", str(data / "recipe.toml")]
    straight = [*train, "--out", str(data / "straight")]
    assert subprocess.run(straight, cwd=ROOT, capture_output=True).returncode == 0
    command = [*train, "--out", str(data / "killed"), "--workers", workers]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    log = data / "killed/metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (data / "killed/state.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(data / "killed/state.pt", weights_only=True)
    assert 0 < state["step"] <= 12
    with log.open("a") as file:
        file.write('{"step": 999, "loss')  # a line that the kill cut off
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    whole, resumed = tensors(data / "straight"), tensors(data / "killed")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_ctrl_c_ends_cleanly_with_what_there_is(data):
    command = [
        sys.executable, "-m", "app.cli", "train", str(data / "recipe.toml"),
        "--out", str(data / "run"), "--steps", "1000000",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (data / "run/state.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "drawn.safetensors" in output
    report = json.loads((data / "run/report.json").read_text())
    assert report["steps"] >= 4
    load_checkpoint(data / "run/drawn.safetensors")


def test_minutes_are_a_budget(data):
    begin = time.monotonic()
    assert run(data, "--minutes", "0.03", "--steps", "0", "--validate-every", "1000") == 0
    assert time.monotonic() - begin < 60
    report = json.loads((data / "run/report.json").read_text())
    assert 1.5 < report["hours"] * 3600 < 10


def test_a_folder_with_another_run_is_not_overwritten(data, capsys):
    assert run(data, "--steps", "2") == 0
    assert run(data, "--steps", "3", "--batch-size", "4") == 2
    assert "holds a run with batch_size = 2, not 4" in capsys.readouterr().err
    assert run(data, "--steps", "3", "--validate-every", "1") == 0


def test_what_the_checkpoint_carries_may_change_until_it_is_written(data):
    assert run(data, "--steps", "1") == 0
    card = ["--licence", "CC0-1.0", "--source", "drawn", "--golden", str(data / "images/0.png")]
    assert run(data, "--steps", "2", *card) == 0
    checkpoint = load_checkpoint(data / "run/drawn.safetensors")
    assert (checkpoint.card["licence"], checkpoint.card["data"]) == ("CC0-1.0", "drawn")
    assert np.array_equal(checkpoint.golden.image, np.asarray(Image.open(data / "images/0.png")))


def test_a_failed_start_does_not_bind_its_folder(data):
    (data / "scores.json").write_text('{"images": []}')
    assert run(data, "--difficulty-report", str(data / "scores.json")) == 2
    assert (data / "run/config.json").exists()  # it failed behind that, and before any state
    assert run(data, "--seed", "1", "--steps", "1") == 0


def test_a_value_that_recipes_did_not_have_was_its_default(data, capsys):
    assert run(data, "--steps", "1") == 0
    config = data / "run/config.json"
    values = json.loads(config.read_text())
    del values["augment"]["unresampled"], values["data"]["difficulty_report"]
    config.write_text(json.dumps(values))
    assert run(data, "--steps", "1", "--unresampled", "0.5") == 2
    assert "unresampled = 0.0, not 0.5" in capsys.readouterr().err
    assert run(data, "--steps", "1") == 0


def test_run_folder_with_old_recipe_keys_is_resumed(data, capsys):
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
    assert "holds a run with batch_size = 2, not 4" in capsys.readouterr().err


def test_a_kill_before_the_first_state_leaves_no_second_record(data):
    assert run(data, "--steps", "4") == 0
    (data / "run/state.pt").unlink()
    assert run(data, "--steps", "4") == 0
    lines = (data / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4]
    board = EventAccumulator(str(data / "run/tensorboard")).Reload()
    assert [event.step for event in board.Scalars("dice")] == [4]


def test_a_folder_is_one_runs_at_a_time(data, capsys):
    command = [sys.executable, "-m", "app.cli", "train", str(data / "recipe.toml")]
    command += ["--out", str(data / "run"), "--steps", "1000000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (data / "run/state.pt").exists():
        time.sleep(0.02)
    assert run(data, "--steps", "1") == 2
    error = capsys.readouterr().err
    assert "another run is at work in" in error
    assert error.count("\n") == 1
    process.kill()
    process.wait()
    (data / "run/.state.pt.1.part").touch()  # of a save that was killed
    assert run(data, "--steps", "1") == 0
    assert not list((data / "run").glob("*.part"))


def test_nan_stops_with_the_images_of_the_batch(data, capsys):
    assert run(data, "--learning-rate", "1e30", "--grad-clip", "0", "--warmup", "0") == 2
    error = capsys.readouterr().err
    assert "the loss is" in error
    assert "whose batch is" in error
    assert error.count("\n") == 1
    assert not (data / "run/drawn.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_what_does_not_fit_into_memory_is_one_line(data, capsys, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("model.training.trainer.segmentation_loss", full)
    assert run(data) == 2
    said = capsys.readouterr().err
    assert "memory" in said
    assert "try a smaller --crop, --base-features, or --batch-size than 2" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("every", ["1", "400"])
def test_weights_that_are_no_numbers_are_neither_kept_nor_shipped(data, capsys, every):
    assert run(data, "--learning-rate", "1e30", "--steps", "1", "--validate-every", every) == 2
    error = capsys.readouterr().err
    assert "too large for 16 bits after step 1; try a lower --learning-rate" in error
    assert error.count("\n") == 1
    assert not (data / "run/state.pt").exists()
    assert not (data / "run/drawn.safetensors").exists()


def test_a_gradient_that_is_no_number_stops_with_its_batch(data, capsys, monkeypatch):
    assert run(data, "--steps", "1") == 0
    before = (data / "run/state.pt").read_bytes()

    def steep(logits, *_, **__):  # 0, but infinitely steep there
        return (logits.sum() * 0).sqrt()

    monkeypatch.setattr("model.training.trainer.segmentation_loss", steep)
    assert run(data, "--steps", "2") == 2
    error = capsys.readouterr().err
    assert "the gradient's norm is nan at step 1, whose batch is" in error
    assert f"the state before is in {data / 'run'}; give another --out" in error
    assert error.count("\n") == 1
    assert (data / "run/state.pt").read_bytes() == before


def test_a_wrong_golden_image_is_found_before_the_training(data):
    assert run(data, "--steps", "1", "--golden", "absent.png") == 2
    assert not (data / "run").exists()


def test_what_a_run_started_from_may_be_gone_when_it_goes_on(data):
    assert run(data, "--steps", "1", out="first") == 0
    start = ["--init-from", str(data / "first/drawn.safetensors")]
    assert run(data, *start, "--steps", "1") == 0
    (data / "first/drawn.safetensors").unlink()
    assert run(data, *start, "--steps", "2") == 0


def test_a_second_ctrl_c_is_not_waited_for():
    with _interruptible() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c_is_heard():
    """A shell starts what it puts into the background deaf to SIGINT, these tests among it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("owner", "name", "steps"),
    [(Crops, "preload", 0), (Crops, "__getitem__", 0), (train, "_report", 1)],
    ids=["reading", "in front of the first step", "measuring"],
)
def test_ctrl_c_outside_the_steps_ships_nothing(
    data, monkeypatch, ctrl_c_is_heard, owner, name, steps
):
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    assert run(data, "--steps", "1") == 130
    assert not (data / "run/drawn.safetensors").exists()
    assert (data / "run/state.pt").exists() == bool(steps)


def test_the_time_left_is_that_of_what_ends_first(data, capsys, monkeypatch):
    monkeypatch.setattr(train, "_quiet", lambda: False)
    for steps in ("0", "100000"):
        flags = ["--minutes", "0.02", "--validate-every", "1000", "--steps", steps]
        assert run(data, *flags, out=f"of {steps}") == 0
        left = re.findall(r"([\d:]+) left", capsys.readouterr().err)
        assert left
        assert {"00:00", "00:01"} >= set(left)


def test_validation_images_are_not_held(data, monkeypatch):
    alive = []
    read = read_sample

    def counted(*args):
        alive[:] = [sample for sample in alive if sample() is not None]
        most.append(len(alive))
        sample = read(*args)
        alive.append(weakref.ref(sample))
        return sample

    most = []
    monkeypatch.setattr("model.training.data.read_sample", counted)
    assert run(data, "--validation-share", "0.75", "--steps", "4") == 0
    assert max(most) <= 1


def test_an_image_that_a_worker_cannot_read_is_one_line(data, capsys):
    recipe = Recipe.read(data / "recipe.toml")
    training, _ = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    bad = training.pairs[-1].image
    bad.write_bytes(bad.read_bytes()[:100])
    flags = ["--workers", "1", "--cache-mb", "0", "--initialisation", "torch"]
    assert run(data, *flags) == 2
    error = capsys.readouterr().err
    assert f"{bad} cannot be read" in error
    assert error.count("\n") == 1


def test_a_full_disk_leaves_the_last_state(data, capsys, monkeypatch):
    assert run(data, "--steps", "4") == 0
    before = (data / "run/state.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(data, "--steps", "8") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (data / "run/state.pt").read_bytes() == before
    assert not list((data / "run").glob("*.part"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--images", "absent"], "absent is not a folder"),
        (["--crop", "[50,50]"], "multiples of 16"),
        (["--device", "cuda"], "no CUDA device"),
        (["--seed", "9223372036854775808"], "seed must be below 2^63"),
        (["--golden", "absent.png"], "absent.png cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(data, flags, says, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run(data, *flags, "--steps", "2") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_unpadded_networks_and_several_classes_train(data):
    for path in (data / "masks").iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray((labels % 3).astype(np.uint8)).save(path)
    flags = ["--labels", "classes", "--out-channels", "3", "--border-weight", "0"]
    flags += ["--classes", '["background","odd","even"]', "--steps", "2"]
    flags += ["--palette", "[[0,0,0],[255,0,0],[0,255,0]]"]
    assert run(data, *flags) == 0
    unpadded = ["--padding", "0", "--crop", "[204,204]", "--window", "[[204,204]]"]
    assert run(data, *flags, *unpadded, "--overlap", "0", out="unpadded") == 0
    assert load_checkpoint(data / "unpadded/drawn.safetensors").architecture.padding == 0


def test_whole_images_with_padding_train(data):
    flags = ["--crop", "[]", "--mode", "resize", "--window", "[[96,112]]", "--size", "[90,110]"]
    assert run(data, *flags, "--steps", "2") == 0


def test_a_whole_image_that_needs_several_windows_is_one_line(data, capsys):
    flags = ["--padding", "0", "--crop", "[]", "--mode", "resize", "--overlap", "0"]
    assert run(data, *flags, "--window", "[[284,300]]", "--steps", "1") == 2
    error = capsys.readouterr().err
    assert "size of 100x116 at most, not 284x300" in error
    assert error.count("\n") == 1


def test_a_minute_of_training_beats_the_untrained_network(tmp_path):
    """On the committed image: one half to learn from, the other to measure on."""
    image = np.asarray(Image.open(FIXTURES / "img2d.tif"))
    labels = np.asarray(Image.open(FIXTURES / "mask2d.tif"))
    for index, (top, left) in enumerate(((0, 0), (256, 0), (0, 256), (256, 256))):
        cut = np.s_[top : top + 256, left : left + 256]
        for name, array in (("images", image), ("masks", labels)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array[cut].astype(np.uint16)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "held.txt").write_text("2\n3\n")
    flags = {
        "images": tmp_path / "images", "masks": tmp_path / "masks", "groups": "", "golden": "",
        "validation-list": tmp_path / "held.txt", "base-features": 8, "crop": "[96,96]",
        "batch-size": 4, "warmup": 10, "ema": 0.9, "learning-rate": 2e-3, "validate-every": 1000,
        "batch-norm": "false",
    }  # fmt: skip
    config = str(ROOT / "model/configs/nuclei.toml")
    options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    def report(out, *extra):
        assert cli.main(["train", config, "--out", str(tmp_path / out), *options, *extra]) == 0
        return json.loads((tmp_path / out / "report.json").read_text())

    untrained = report("untrained", "--steps", "1")["validation"]["dice"]
    trained = report("trained", "--steps", "120")["validation"]["dice"]
    lines = (tmp_path / "trained/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses[-1] < losses[0] - 0.2
    assert trained > untrained + 0.2
    assert trained > 0.6


def test_a_run_starts_from_a_narrower_checkpoint(data):
    assert run(data, "--steps", "4") == 0
    start = data / "run/drawn.safetensors"
    wider = ["--init-from", str(start), "--base-features", "8", "--batch-norm", "true"]
    assert run(data, *wider, "--steps", "1", "--learning-rate", "1e-9", out="wider") == 0
    reports = [json.loads((data / out / "report.json").read_text()) for out in ("run", "wider")]
    first, second = (report["validation"]["dice"] for report in reports)
    assert second == pytest.approx(first, abs=0.01)  # it begins where the narrow one ended
    checkpoint = load_checkpoint(data / "wider/drawn.safetensors")
    assert checkpoint.architecture.base_features == 8
    assert np.abs(np.float32(checkpoint.state["down_conv.0.first.bias"])).max() > 0
