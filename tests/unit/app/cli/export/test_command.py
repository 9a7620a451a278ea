"""`unet export --base-features`: another width, the same masks; and `--calibrate`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app import cli
from app.cli.export import command
from model.checkpoint import (
    Checkpoint,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    update_manifest,
)
from model.config import Calibration
from model.predict import Predictor, attach_golden
from model.unet import UNet
from tests.conftest import nuclei, write_tiny
from tests.onnx_networks import Net, export


def test_widened_checkpoint_gives_the_same_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = tmp_path / "narrow.safetensors"
    write_tiny(narrow)
    calibration = Calibration({"down_conv.0.first": (0.0, 1.0)}, 3, 0.999, 0.0, 1.0)
    card = {"licence": "MIT", "training": {"steps": 3}}
    before = dataclasses.replace(load_checkpoint(narrow), card=card, calibration=calibration)
    save_checkpoint(narrow, before)
    update_manifest(narrow)
    features = before.architecture.base_features
    out = tmp_path / "new" / "wide.safetensors"
    arguments = ["export", str(narrow), "--out", str(out), "--base-features"]
    assert cli.main([*arguments, str(2 * features)]) == 0
    wide = load_checkpoint(out)
    assert wide.id in capsys.readouterr().out
    assert wide.architecture.base_features == 2 * features
    assert wide.state["final_conv.weight"].dtype == before.state["final_conv.weight"].dtype
    assert wide.card["licence"] == "MIT"
    assert wide.card["training"] == {
        "steps": 3, "widened": f"from base_features {features}, without further training"
    }  # fmt: skip
    assert wide.calibration is None  # ranges are by layer, but the int8 weights differ
    assert read_manifest(out.parent).keys() == {"wide.safetensors"}
    image = nuclei(90, 70)[0]
    difference = Predictor.of(wide)(image) - Predictor.of(before)(image)
    assert np.abs(difference).max() < 1e-4
    assert np.array_equal(wide.golden.image, before.golden.image)
    assert cli.main([*arguments, str(2 * features + 1), "--force"]) == 2
    assert "multiple" in capsys.readouterr().err
    assert load_checkpoint(narrow).calibration == calibration


def test_widened_checkpoint_is_narrowed_to_the_same_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, wide = tmp_path / "first.safetensors", tmp_path / "wide.safetensors"
    write_tiny(first)
    before = in_fp16(first)
    features = before.architecture.base_features
    export = ["export", str(first), "--out", str(wide), "--base-features", str(2 * features)]
    assert cli.main(export) == 0
    calibration = Calibration({"down_conv.0.first": (0.0, 1.0)}, 3, 0.999, 0.0, 1.0)
    save_checkpoint(wide, dataclasses.replace(load_checkpoint(wide), calibration=calibration))
    update_manifest(wide)

    narrow = tmp_path / "narrow.safetensors"
    export = ["export", str(wide), "--out", str(narrow), "--base-features", str(features)]
    assert cli.main(export) == 0
    after = load_checkpoint(narrow)
    assert after.id in capsys.readouterr().out
    assert after.architecture == before.architecture
    assert after.card["training"] == {
        "widened": f"from base_features {features}, without further training",
        "narrowed": f"from base_features {2 * features}, without further training",
    }
    assert after.calibration is None
    for name, array in before.state.items():
        assert after.state[name].dtype == array.dtype
        np.testing.assert_array_max_ulp(after.state[name], array, maxulp=1)
    image = nuclei(90, 70)[0]
    difference = Predictor.of(after)(image) - Predictor.of(before)(image)
    assert np.abs(difference).max() < 1e-3
    assert np.array_equal(after.golden.image, before.golden.image)


def test_checkpoint_that_was_not_widened_cannot_be_narrowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    before = path.read_bytes()
    features = load_checkpoint(path).architecture.base_features
    assert cli.main(["export", str(path), "--base-features", str(features // 2)]) == 2
    error = capsys.readouterr().err
    assert f"tiny cannot be narrowed to base_features {features // 2}" in error
    assert path.read_bytes() == before


def test_width_that_a_checkpoint_already_has_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    before = load_checkpoint(path)
    features = before.architecture.base_features
    assert cli.main(["export", str(path), "--base-features", str(features)]) == 0
    after = load_checkpoint(path)
    assert (after.architecture, after.card) == (before.architecture, before.card)
    assert all(np.array_equal(after.state[name], array) for name, array in before.state.items())


def in_fp16(path: Path) -> Checkpoint:
    """Round the weights of the checkpoint at `path` to fp16, as training stores them."""
    checkpoint = load_checkpoint(path)
    state = {name: array.astype(np.float16) for name, array in checkpoint.state.items()}
    checkpoint = attach_golden(
        dataclasses.replace(checkpoint, state=state), checkpoint.golden.image
    )
    saved = save_checkpoint(path, checkpoint)
    update_manifest(path)
    return saved


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--base-features N, --calibrate RECIPE, --onnx FILE, --openvino"),
        (["--base-features", "8", "--out", "/dev/null/x.safetensors"], "cannot be written"),
        (["--base-features", "8", "--out", "wide.pt"], "wide.pt: the file's name ends with .safe"),
        (["--base-features", "8", "--out", "wide"], "wide: the file's name ends with .safetensors"),
        (["--base-features", "8", "--out", "é.safetensors"], "invalid model name 'é'"),
        (["--base-features", "8", "--out", f"{'x' * 300}.safetensors"], "File name too long"),
        (["--base-features", "8", "--out", "{other}"], "other.safetensors exists; choose another"),
        (
            ["--out", "w.safetensors", "--state-dict", "{other}.pt"],
            "--out needs --base-features or --calibrate",
        ),
        (["--calibrate", "none.toml"], "none.toml: cannot be read: No such file"),
        (["--calibrate", "."], "--calibrate .: set the folder of the masks too, --masks FOLDER"),
        (["--calibrate", ".", "--masks", "none"], "none"),
        (["--calibrate", "none.toml", "--masks", "."], "--masks needs --calibrate with the folder"),
        (["--base-features", "8", "--masks", "."], "--masks needs --calibrate with the folder"),
    ],
)
def test_mistake_is_one_line_before_the_network_runs(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, other = tmp_path / "tiny.safetensors", tmp_path / "other.safetensors"
    write_tiny(path)
    write_tiny(other)
    arguments = [each.format(other=other) for each in arguments]
    monkeypatch.setattr(UNet, "forward", None)
    assert cli.main(["export", str(path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unet: error: ")
    assert says in line


def write_pairs(folder: Path) -> list[str]:
    """Write six images with masks, and return the flags that calibrate on them."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for seed in range(6):
        image, labels = nuclei(96, 96, seed)
        Image.fromarray(image).save(folder / f"images/{seed}.png")
        Image.fromarray(np.uint8(255 * (labels > 0))).save(folder / f"masks/{seed}.png")
    return ["--calibrate", str(folder / "images"), "--masks", str(folder / "masks")]


def test_network_is_calibrated_on_one_half_of_a_folder_and_compared_on_the_other(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    assert cli.main(["export", str(path), *write_pairs(tmp_path)]) == 0
    calibration = load_checkpoint(path).calibration
    assert calibration is not None
    assert len(calibration.ranges) == 22
    assert calibration.images == 3


def test_checkpoint_may_be_named_as_its_own_destination(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    assert cli.main(["export", str(path), "--base-features", "8", "--out", str(path)]) == 0
    assert load_checkpoint(path).unet.base_features == 8


def test_graph_is_not_calibrated_for_a_format_that_it_cannot_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.onnx").write_bytes(export(Net()))
    assert cli.main(["import", str(tmp_path / "theirs.onnx"), "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(command, "calibrate", None)
    flags = [*write_pairs(tmp_path), "--onnx", str(tmp_path / "new.onnx")]
    assert cli.main(["export", str(tmp_path / "theirs.safetensors"), *flags]) == 2
    assert "theirs is an ONNX graph; this works with U-Nets" in capsys.readouterr().err


def test_graph_without_the_package_that_calibrates_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.onnx").write_bytes(export(Net()))
    assert cli.main(["import", str(tmp_path / "theirs.onnx"), "--out", str(tmp_path)]) == 0
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.delitem(sys.modules, "app.engine.graph_ranges", raising=False)
    path = tmp_path / "theirs.safetensors"
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        cli.main(["export", str(path), *write_pairs(tmp_path)])
    expected = "export needs nncf, which is not installed; install it with: pip install "
    assert f"{expected}'unet-server[quantize]'" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("flag", ["--base-features", "--images"])
@pytest.mark.parametrize("value", ["0", "-4", "many"])
def test_number_must_be_positive(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export", "tiny.safetensors", f"{flag}={value}"])
    assert f"'{value}' is not a whole number above 0" in capsys.readouterr().err
