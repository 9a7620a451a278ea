"""`unet train`: its flags and what it rejects before training."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from app import cli
from app.cli.train import add_arguments, recipe_flags
from model.config_base import fields_of
from model.training.recipe import SECTIONS


def parse(*flags: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return recipe_flags(parser.parse_args(["recipe.toml", *flags]))


def help_text() -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return " ".join(parser.format_help().split())


def test_help_describes_every_field_of_a_recipe() -> None:
    text = help_text()
    for section, kind in SECTIONS.items():
        assert f"[{section}]: " in text
        for name, field in fields_of(kind).items():
            assert f"--{name.replace('_', '-')} " in text
            assert field.description is not None
            assert field.description in text


def test_fields_of_all_sections_are_flags() -> None:
    flags = parse("--name", "a", "--images", "b", "--steps", "3", "--padding", "0")
    assert flags == {"name": "a", "images": "b", "steps": "3", "padding": "0"}


def test_old_keys_are_flags_but_not_in_the_help() -> None:
    flags = parse("--batch", "3", "--focus", "scores.json", "--start", "1.safetensors")
    assert flags == {
        "batch_size": "3",
        "difficulty_report": "scores.json",
        "init_from": "1.safetensors",
    }
    assert not {"--batch", "--focus", "--start"} & set(help_text().split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps", "many"], "steps must be a valid integer, not 'many'"),
        (["--schedule", "step"], "schedule must be 'cosine' or 'constant', not 'step'"),
        (["--lerning-rate", "1"], "unrecognized arguments: --lerning-rate 1 (see unet train"),
    ],
)
def test_invalid_flag_is_one_line(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[optim]\nsteps = 1")
    try:
        status = cli.main(["train", str(recipe), *flags])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
