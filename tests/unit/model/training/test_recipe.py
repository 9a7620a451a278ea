"""Recipes: read from TOML and JSON, overridden by flags, checked in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.config_base import fields_of
from model.errors import ConfigError
from model.training.recipe import SECTIONS, Recipe
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "model/configs").glob("*.toml"))

# The names that released recipes, run folders and scripts use.
OLD_KEYS = {
    "colours": "colors",
    "focus": "difficulty_report",
    "colour": "color",
    "exact": "unresampled",
    "start": "init_from",
    "clip": "grad_clip",
    "batch": "batch_size",
    "every": "validate_every",
    "pictures": "previews_per_epoch",
}

OLD_RECIPE = """
[data]
colours = [[0, 0, 0], [255, 0, 0]]
focus = "scores.json"
[augment]
colour = 0.2
exact = 0.25
[optim]
start = "a.safetensors"
clip = 0.5
batch = 3
steps = 1
[run]
every = 7
pictures = 2
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert Recipe.read(path).name == path.stem


def test_config_of_a_run_folder_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for config in CONFIGS:
        recipe = Recipe.read(config)
        path.write_text(json.dumps(recipe.to_json()))
        assert Recipe.read(path) == recipe
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: is not JSON"):
        Recipe.read(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object, not list"):
        Recipe.read(path)


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[optim]\nsteps = 3", "utf-8-sig")
    assert Recipe.read(path).optim.steps == 3


@pytest.mark.parametrize(("name", "says"), [("none.toml", "No such file"), (".", "Is a directory")])
def test_unreadable_recipe_is_a_user_error(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be read: {says}"):
        Recipe.read(tmp_path / name)


def test_carvana_recipe_keeps_the_annotated_experiment() -> None:
    carvana = Recipe.read(ROOT / "model/configs/carvana.toml")
    assert (carvana.network.in_channels, carvana.network.out_channels) == (3, 1)
    assert carvana.optim.optimiser == "adam"
    assert carvana.optim.learning_rate == 2.5e-4
    assert (carvana.optim.batch_size, carvana.optim.epochs) == (1, 4)
    assert carvana.run.previews_per_epoch == 50
    assert carvana.loss.dice_weight == 0
    assert min(carvana.preprocess.resized) == 572
    assert carvana.preprocess.window == ((576, 864),)


def test_field_names_are_unique_over_the_sections() -> None:
    names = [name for kind in SECTIONS.values() for name in fields_of(kind)]
    assert len(names) == len(set(names))
    assert not set(names) & OLD_KEYS.keys()


def test_every_field_has_a_description() -> None:
    for kind in SECTIONS.values():
        assert all(field.description for field in fields_of(kind).values()), kind


def test_flags_override_the_file(tmp_path: Path) -> None:
    recipe = Recipe.read(
        write(tmp_path, "[optim]\nsteps = 9\nbatch_size = 3\n[augment]\ncrop = 'wrong'"),
        {"learning_rate": "1e-3", "steps": "7", "flip": "false", "crop": "[32,48]"},
    )
    assert recipe.optim.learning_rate == 1e-3
    assert (recipe.optim.steps, recipe.optim.batch_size) == (7, 3)
    assert recipe.augment.flip is False
    assert recipe.augment.crop == (32, 48)


def test_text_of_a_flag_is_taken_literally(tmp_path: Path) -> None:
    flags = {"images": "2024_05", "name": "7", "groups": "", "source": "[1]", "labels": "binary"}
    recipe = Recipe.read(write(tmp_path, "[optim]\nsteps = 1"), flags)
    assert (recipe.data.images, recipe.name, recipe.data.groups) == ("2024_05", "7", "")
    assert recipe.data.source == "[1]"


def test_number_is_accepted_as_text_in_a_file(tmp_path: Path) -> None:
    recipe = Recipe.read(write(tmp_path, "name = 2024\n[optim]\nsteps = 1"))
    assert recipe.name == "2024"


def test_old_keys_are_still_read_from_recipes(tmp_path: Path) -> None:
    recipe = Recipe.read(write(tmp_path, OLD_RECIPE))
    assert recipe.data.difficulty_report == "scores.json"
    assert recipe.data.colors == ((0, 0, 0), (255, 0, 0))
    assert (recipe.augment.unresampled, recipe.augment.color) == (0.25, 0.2)
    assert recipe.optim.init_from == "a.safetensors"
    assert (recipe.optim.grad_clip, recipe.optim.batch_size) == (0.5, 3)
    assert (recipe.run.validate_every, recipe.run.previews_per_epoch) == (7, 2)
    assert not OLD_KEYS.keys() & {name for kind in recipe.to_json().values() for name in kind}


def test_old_keys_are_still_read_from_the_config_of_a_run(tmp_path: Path) -> None:
    recipe = Recipe.read(write(tmp_path, OLD_RECIPE))
    text = json.dumps(recipe.to_json())
    for old, new in OLD_KEYS.items():
        assert f'"{new}":' in text
        text = text.replace(f'"{new}":', f'"{old}":')
    path = tmp_path / "config.json"
    path.write_text(text)
    assert Recipe.read(path) == recipe


def test_flag_overrides_an_old_key(tmp_path: Path) -> None:
    recipe = Recipe.read(write(tmp_path, OLD_RECIPE), {"batch_size": "9"})
    assert recipe.optim.batch_size == 9


def test_value_under_old_and_new_key_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[optim\] has 'batch_size' twice"):
        Recipe.read(write(tmp_path, "[optim]\nsteps = 1\nbatch_size = 1\nbatch = 2"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[optim]\nlerning_rate = 1",
            r"unknown key 'lerning_rate' \(did you mean learning_rate\?\)",
        ),
        ("[optimiser]\nsteps = 1", r"unknown section \[optimiser\] \(did you mean optim\?\)"),
        ("steps = 1", "unknown section"),
        ("optim = 3", r"optim must be a section, \[optim\], not 3"),
        ("[optim]\nsteps = 'many'", r"\[optim\] steps must be a valid integer, not 'many'"),
        ("[optim]\nsteps = '5'", "steps must be a valid integer, not '5'"),
        ("[optim]\nsteps = true", "steps must be a valid integer"),
        ("[optim]\nsteps = 1.0", "steps must be a valid integer"),
        ("[optim]\nbatch_norm = 1", r"batch_norm must be a boolean \(true or false\)"),
        ("[optim]\nsteps = 0", "set steps, epochs or minutes"),
        ("[optim]\nsteps = 1\nschedule = 'step'", "schedule must be 'cosine' or 'constant'"),
        ("[optim]\nsteps = 1\nema = 1.0", "ema must be less than 1, not 1.0"),
        ("[optim]\nsteps = 1\nbatch_size = 0", "must be greater than or equal to 1, not 0"),
        ("[optim]\nsteps = 1\nlearning_rate = 0", "learning_rate must be greater than 0"),
        ("[optim]\nsteps = 1\nseed = -1", "seed must be greater than or equal to 0"),
        ("[optim]\nsteps = 1\n[run]\nvalidate_every = -1", "validate_every must be greater than"),
        ("[optim]\nsteps = 1\n[augment]\ncrop = [100, 100]", "multiples of 16"),
        ("[optim]\nsteps = 1\n[augment]\ncrop = [160]", r"must be \[height, width\]"),
        ("[optim]\nsteps = 1\n[augment]\ncrop = []", "needs mode 'resize'"),
        ("[optim]\nsteps = -5\nepochs = 4.0", "steps must be greater than or equal to 0, not -5"),
        ("[optim]\nsteps = 1\ngrad_clip = -1", "grad_clip must be greater than or equal to 0"),
        ("[optim]\nsteps = 1\nclip = -1", "grad_clip must be greater than or equal to 0"),
        ("[optim]\nsteps = 1\n[data]\nbalance = nan", "balance must be a finite number, not nan"),
        ("[optim]\nepochs = inf", "epochs must be a finite number, not inf"),
        ("[optim]\nsteps = 1\n[loss]\nborder_sigma = 0", "border_sigma must be greater than 0"),
        ("[optim]\nsteps = 1\n[preprocess]\nmean = [nan, 0, 0]", r"mean\[0\] must be a finite"),
        ("[optim]\nsteps = 1\n[preprocess]\nwindow = [112, 112]", r"window\[0\] must be a list"),
        ("[optim]\nsteps = 1\n[augment]\ncrop = ['a', 'b']", r"crop\[0\] must be a valid integer"),
        ("[optim]\nsteps = 1\n[run]\ndevice = 'foo'", "device must be auto, cpu, cuda or cuda:N"),
        ("[optim]\nsteps = 1\n[augment]\nunresampled = 50", "unresampled must be less than or"),
        ("[optim]\nsteps = 1\n[augment]\nzoom = [0, 2]", r"zoom\[0\] must be greater than 0"),
        ("[optim]\nsteps = 1\n[augment]\nzoom = [2, 1]", r"zoom must be \[smallest, largest\]"),
        ("[optim]\nsteps = 1\n[network]\nout_channels = 2", "needs labels 'instances'"),
        ("[optim]\nsteps = 1\n[data]\nlabels = 'classes'", "more than two names"),
        ("[optim]\nsteps = 1\n[data]\nvalidation_share = 1.5", "validation_share must be less"),
        (
            "[optim]\nsteps = 1\n[data]\nkind = 'coco'",
            "kind must be 'paired', 'named' or 'carvana'",
        ),
        ("name = 'a/b'\n[optim]\nsteps = 1", "invalid model name 'a/b'"),
        ("[optim\n", "is not TOML"),
    ],
)
def test_invalid_recipe_is_reported_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Recipe.read(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "recipe.toml" in str(caught.value)


def test_invalid_flag_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe.toml with the flags: .* not 'many'"):
        Recipe.read(write(tmp_path, "[optim]\nsteps = 1"), {"steps": "many"})
