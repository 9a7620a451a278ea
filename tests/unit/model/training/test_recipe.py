import argparse
import json

import pytest

from model.errors import ConfigError
from model.training.recipe import OLD_KEYS, SECTIONS, Recipe, add_flags, given_flags
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "model/configs").glob("*.toml"))


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    assert Recipe.read(path).name == path.stem


def test_the_copy_in_a_run_folder_is_a_recipe_too(tmp_path):
    path = tmp_path / "config.json"
    for config in CONFIGS:
        recipe = Recipe.read(config)
        path.write_text(json.dumps(recipe.to_json()))
        assert Recipe.read(path) == recipe
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        Recipe.read(path)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[optim]\nsteps = 3", "utf-8-sig")
    assert Recipe.read(path).optim.steps == 3


def test_text_is_taken_as_it_is_typed():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(["--images", "2024_05", "--name", "7", "--groups", "", "--steps", "3"])
    given = given_flags(args)
    assert given == {"images": "2024_05", "name": "7", "groups": "", "steps": 3}


def test_the_carvana_recipe_keeps_the_annotated_experiment():
    carvana = Recipe.read(CONFIGS[0].parent / "carvana.toml")
    assert (carvana.network.in_channels, carvana.network.out_channels) == (3, 1)
    assert carvana.optim.optimiser == "adam"
    assert carvana.optim.learning_rate == 2.5e-4
    assert (carvana.optim.batch_size, carvana.optim.epochs, carvana.run.previews_per_epoch) == (
        1,
        4,
        50,
    )
    assert carvana.loss.dice_weight == 0
    assert min(carvana.preprocess.resized) == 572
    assert carvana.preprocess.window == ((576, 864),)


def test_field_names_are_unique_over_the_sections():
    names = [name for kind in SECTIONS.values() for name in kind.__dataclass_fields__]
    assert len(names) == len(set(names))


def test_every_value_is_a_flag_and_a_flag_wins(tmp_path):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    line = (
        "--learning-rate 1e-3 --steps 7 --flip false --crop [32,48] --images some/folder "
        "--validation-list 12 --name 2024"
    )
    args = parser.parse_args(line.split(" "))
    read = Recipe.read(write(tmp_path, "[optim]\nsteps = 9\nbatch_size = 3"), given_flags(args))
    assert read.optim.learning_rate == 1e-3
    assert (read.optim.steps, read.optim.batch_size) == (7, 3)
    assert read.augment.flip is False
    assert read.augment.crop == (32, 48)
    assert read.data.images == "some/folder"
    assert read.data.validation_list == "12"
    assert read.name == "2024"


OLD_RECIPE = """
[data]
focus = "scores.json"
[augment]
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


def test_old_keys_are_still_read_from_recipes(tmp_path):
    recipe = Recipe.read(write(tmp_path, OLD_RECIPE))
    assert recipe.data.difficulty_report == "scores.json"
    assert recipe.augment.unresampled == 0.25
    assert recipe.optim.init_from == "a.safetensors"
    assert (recipe.optim.grad_clip, recipe.optim.batch_size) == (0.5, 3)
    assert (recipe.run.validate_every, recipe.run.previews_per_epoch) == (7, 2)


def test_old_keys_are_still_flags_but_not_listed():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(["--batch", "3", "--focus", "scores.json", "--start", "1.safetensors"])
    assert given_flags(args) == {
        "batch_size": 3,
        "difficulty_report": "scores.json",
        "init_from": "1.safetensors",
    }
    listed = parser.format_help().split()
    for keys in OLD_KEYS.values():
        assert not {f"--{old}" for old in keys} & set(listed)


def test_value_under_old_and_new_key_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="'batch_size' twice; its old key is 'batch'"):
        Recipe.read(write(tmp_path, "[optim]\nsteps = 1\nbatch_size = 1\nbatch = 2"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[optim]\nlerning_rate = 1", "did you mean 'learning_rate'"),
        ("[optimiser]\nsteps = 1", r"unknown section \[optimiser\]; did you mean 'optim'"),
        ("steps = 1", "unknown section"),
        ("optim = 3", "is a section"),
        ("[optim]\nsteps = 'many'", "steps must be a whole number, not 'many'"),
        ("[optim]\nsteps = true", "steps must be a whole number"),
        ("[optim]\nsteps = 0", "say how long"),
        ("[optim]\nsteps = 1\nschedule = 'step'", "schedule must be one of cosine, constant"),
        ("[optim]\nsteps = 1\nema = 1.0", "ema must lie in 0..1"),
        ("[optim]\nsteps = 1\nbatch_size = 0", "must be above 0"),
        ("[optim]\nsteps = 1\n[augment]\ncrop = [100, 100]", "multiples of 16"),
        ("[optim]\nsteps = 1\n[augment]\ncrop = []", "needs mode 'resize'"),
        ("[optim]\nsteps = -5\nepochs = 4.0", "steps must be 0 or more, and finite, not -5"),
        ("[optim]\nsteps = 1\ngrad_clip = -1", "grad_clip must be 0 or more"),
        ("[optim]\nsteps = 1\n[data]\nbalance = nan", "balance must be 0 or more, and finite"),
        ("[optim]\nepochs = inf", "epochs must be 0 or more, and finite"),
        ("[optim]\nsteps = 1\n[loss]\nborder_sigma = 0", "border_sigma must be above 0"),
        ("[optim]\nsteps = 1\n[preprocess]\nmean = [nan, 0, 0]", "mean and std are finite"),
        (
            "[optim]\nsteps = 1\n[preprocess]\nwindow = [112, 112]",
            "window must be a list, in which",
        ),
        ("[optim]\nsteps = 1\n[augment]\ncrop = ['a', 'b']", "crop must be a list, in which each"),
        ("[optim]\nsteps = 1\n[run]\ndevice = 'foo'", "device must be auto, cpu, cuda"),
        (
            "[optim]\nsteps = 1\n[augment]\nunresampled = 50",
            "unresampled is a share of the crops, 0..1",
        ),
        ("[optim]\nsteps = 1\n[augment]\nzoom = [0, 2]", "zoom must be .least, most."),
        ("[optim]\nsteps = 1\n[network]\nout_channels = 2", "needs labels 'instances'"),
        ("[optim]\nsteps = 1\n[data]\nlabels = 'classes'", "more than two names"),
        ("[optim]\nsteps = 1\n[data]\nvalidation_share = 1.5", "validation_share"),
        ("[optim\n", "is not TOML"),
    ],
)
def test_a_wrong_recipe_is_named_in_one_line(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        Recipe.read(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "recipe.toml" in str(caught.value)
