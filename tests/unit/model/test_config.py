"""Configurations: what is wrong is named."""

from __future__ import annotations

import json

import pytest

from model.config import PreprocessConfig, UNetConfig, check_together
from model.errors import ConfigError


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


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"mode": "stretch"}, "mode"),
        ({"window": []}, "window"),
        ({"mode": "resize", "window": [[64, 64], [32, 32]]}, "exactly one"),
        ({"overlap": 256}, "overlap"),
        ({"std": [0.1, 0.1, 0]}, "std"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"classes": ["background"]}, "classes"),
        ({"windows": [[64, 64]]}, "no 'windows'"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        PreprocessConfig.from_json(values)


@pytest.mark.parametrize(
    ("architecture", "preprocess", "word"),
    [
        (UNetConfig(in_channels=1), PreprocessConfig(), "mean"),
        (UNetConfig(out_channels=3), PreprocessConfig(), "output channels"),
        (UNetConfig(), PreprocessConfig(window=((250, 256),)), "divisible by 16"),
        (UNetConfig(padding=0), PreprocessConfig(window=((256, 256),)), "204"),
        (UNetConfig(padding=0), PreprocessConfig(window=((188, 188),)), "at least 204"),
    ],
)
def test_contradictions_are_named(
    architecture: UNetConfig, preprocess: PreprocessConfig, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        check_together(architecture, preprocess)


def test_a_padding_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="padding"):
        UNetConfig(padding=2)


def test_what_fits_together() -> None:
    check_together(UNetConfig(), PreprocessConfig())
    check_together(UNetConfig(out_channels=2), PreprocessConfig())
    check_together(UNetConfig(padding=0), PreprocessConfig(window=((572, 572),)))
