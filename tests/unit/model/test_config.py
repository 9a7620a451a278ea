"""Configurations in checkpoints: fields are checked, and errors name them in one line."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from model.checkpoint import load_checkpoint
from model.config import (
    Architecture,
    Calibration,
    GraphConfig,
    PreprocessConfig,
    UNetConfig,
    check_name,
    check_together,
    read_architecture,
)
from model.config_base import ConfigBase, fields_of
from model.errors import ConfigError
from tests.conftest import ROOT


def test_round_trip_through_json() -> None:
    config = PreprocessConfig(
        mode="resize",
        window=((384, 256),),
        intensity="percentile",
        classes=("background", "a", "b"),
        palette=((0, 0, 0), (1, 2, 3), (4, 5, 6)),
    )
    assert PreprocessConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert UNetConfig.from_json(UNetConfig(1, 2, 3, 0).to_json()) == UNetConfig(1, 2, 3, 0)
    unmeasured = Calibration({"down_conv.0.first": (0.0, 5.5)})
    assert Calibration.from_json(json.loads(json.dumps(unmeasured.to_json()))) == unmeasured


def test_keys_in_checkpoints_stay_the_same() -> None:
    assert list(UNetConfig().to_json()) == [
        "in_channels", "out_channels", "base_features", "padding",
    ]  # fmt: skip
    assert list(PreprocessConfig().to_json()) == [
        "mode", "window", "size", "overlap", "interpolation", "intensity", "percentiles", "mean",
        "std", "threshold", "classes", "palette",
    ]  # fmt: skip
    assert list(Calibration({}).to_json()) == [
        "ranges", "images", "iou", "dice_loss", "golden_iou",
    ]  # fmt: skip


def test_header_without_later_keys_is_still_read() -> None:
    """As written before percentiles and size existed."""
    old = {"mode": "native", "window": [[256, 256]], "overlap": 64, "mean": [0, 0, 0]}
    config = PreprocessConfig.from_json(old | {"std": [1, 1, 1]})
    assert config.window == ((256, 256),)
    assert (config.percentiles, config.size) == ((1.0, 99.8), ())


@pytest.mark.parametrize("name", ["nuclei", "person"])
def test_shipped_checkpoints_are_read(name: str) -> None:
    checkpoint = load_checkpoint(ROOT / f"weights/{name}.safetensors")
    check_together(checkpoint.architecture, checkpoint.preprocess)
    assert checkpoint.calibration is not None
    assert checkpoint.calibration.validated


def test_configs_are_frozen_values_that_can_be_copied() -> None:
    config = UNetConfig(3, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.padding = 0  # type: ignore[misc]
    wider = dataclasses.replace(config, base_features=96)
    assert wider == UNetConfig(3, 1, 96) == pickle.loads(pickle.dumps(wider))
    assert len({config, wider, UNetConfig()}) == 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"mode": "stretch"}, "mode must be 'native' or 'resize', not 'stretch'"),
        ({"window": []}, "window must have at least 1 item"),
        ({"window": [64, 64]}, "window[0] must be a list, not 64"),
        ({"window": [[64, 64, 3]]}, "window[0] must have at most 2 items"),
        ({"window": [[64, 0]]}, "window[0][1] must be greater than or equal to 1, not 0"),
        ({"mode": "resize", "window": [[64, 64], [32, 32]]}, "exactly one window, not 2"),
        ({"size": [64, 64]}, "needs mode 'resize'"),
        ({"overlap": 256}, "overlap must be smaller than every window, not 256"),
        ({"overlap": 1.5}, "overlap must be a valid integer, not 1.5"),
        ({"overlap": True}, "overlap must be a valid integer, not True"),
        ({"std": [0.1, 0.1, 0]}, "std[2] must be greater than 0, not 0"),
        ({"std": [0.1]}, "mean and std need one value per channel, not 3 and 1"),
        ({"mean": [float("nan"), 0, 0]}, "mean[0] must be a finite number, not nan"),
        ({"threshold": 1.5}, "threshold must be less than or equal to 1, not 1.5"),
        ({"threshold": float("nan")}, "threshold must be a finite number, not nan"),
        ({"threshold": "high"}, "threshold must be a valid number, not 'high'"),
        ({"percentiles": [1]}, "percentiles[1] is missing"),
        ({"percentiles": [9, 1]}, "percentiles must be two numbers in 0..100"),
        ({"classes": ["background"]}, "classes must have at least 2 items"),
        ({"palette": [[0, 0, 0]]}, "palette needs one color per class, 2, not 1"),
        ({"palette": [[0, 0, 256], [0, 0, 0]]}, "palette[0][2] must be less than or equal to 255"),
        ({"windows": [[64, 64]]}, "unknown key 'windows' (did you mean window?)"),
    ],
)
def test_error_names_field_value_and_what_is_allowed(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PreprocessConfig.from_json(values)
    (line,) = str(caught.value).splitlines()
    assert says in line


def test_positional_argument_is_reported_by_its_name() -> None:
    with pytest.raises(ConfigError, match="padding must be less than or equal to 1, not 2"):
        UNetConfig(3, 1, 64, 2)


@pytest.mark.parametrize("model", [UNetConfig, GraphConfig, PreprocessConfig, Calibration])
def test_every_field_has_a_description(model: type[ConfigBase]) -> None:
    assert all(field.description for field in fields_of(model).values())


@pytest.mark.parametrize(
    ("architecture", "preprocess", "word"),
    [
        (UNetConfig(in_channels=1), PreprocessConfig(), "mean"),
        (UNetConfig(out_channels=3), PreprocessConfig(), "output channels"),
        (UNetConfig(), PreprocessConfig(window=((250, 256),)), "divisible by 16"),
        (UNetConfig(padding=0), PreprocessConfig(window=((256, 256),)), "204"),
        (UNetConfig(padding=0), PreprocessConfig(window=((188, 188),)), "at least 204"),
        (GraphConfig(size=(64, 64)), PreprocessConfig(), "the graph accepts 64x64 alone"),
        (GraphConfig(divisor=12), PreprocessConfig(), "window 256x256 is not divisible by 12"),
        (GraphConfig(margin=120), PreprocessConfig(), "sides of at least 272"),
        (GraphConfig(out_channels=4), PreprocessConfig(), "output channels"),
    ],
)
def test_contradictions_are_named(
    architecture: Architecture, preprocess: PreprocessConfig, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        check_together(architecture, preprocess)


def test_matching_configs_are_accepted() -> None:
    check_together(UNetConfig(), PreprocessConfig())
    check_together(UNetConfig(out_channels=2), PreprocessConfig())
    check_together(UNetConfig(padding=0), PreprocessConfig(window=((572, 572),)))


@pytest.mark.parametrize("config", [UNetConfig(1, 2, 8), GraphConfig(size=(64, 96), divisor=8)])
def test_architecture_is_read_as_it_was_written(config: Architecture) -> None:
    assert read_architecture(json.loads(json.dumps(config.to_json()))) == config


def test_size_of_a_graph_has_two_sides() -> None:
    with pytest.raises(ConfigError, match=r"size must be \[height, width\] or empty, not \[64\]"):
        GraphConfig(size=(64,))


@pytest.mark.parametrize(("divisor", "grid"), [(1, 32), (8, 32), (12, 36), (32, 32), (48, 48)])
def test_grid_is_the_least_multiple_of_the_divisor_from_32_on(divisor: int, grid: int) -> None:
    assert GraphConfig(divisor=divisor).grid == grid


@pytest.mark.parametrize("name", ["", ".hidden", " x", "a/b", "клетка", "new\nline"])
def test_invalid_model_name_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="invalid model name") as caught:
        check_name(name)
    assert "\n" not in str(caught.value)
