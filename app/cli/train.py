"""`unet train`: train a network from two folders or a recipe, and write a checkpoint."""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.errors import CommandError
from app.cli.flags import add_flags, explicit_flags
from model.cuda import choose_device
from model.training.data import open_dataset
from model.training.recipe import SECTIONS, Recipe
from model.training.split import split_dataset

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "unet train IMAGES MASKS [--out FOLDER] [--KEY VALUE ...]\n"
        "       unet train RECIPE [--out FOLDER] [--KEY VALUE ...]"
    )
    parser.epilog = (
        "Flags override the recipe, or what was understood from the folders. Defaults apply to "
        "keys that neither of them sets."
    )
    parser.add_argument(
        "data",
        type=Path,
        nargs="+",
        metavar="IMAGES MASKS | RECIPE",
        help="two folders (or one that contains both), or a TOML file such as "
        "model/configs/nuclei.toml",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of the run, which is resumed if it exists (default: runs/NAME)",
    )
    add_flags(parser, Recipe, ["name"])
    for section, kind in SECTIONS.items():
        summary = (kind.__doc__ or "").partition("\n")[0]
        add_flags(parser.add_argument_group(f"[{section}]", summary), kind)


def main(args: argparse.Namespace) -> int:
    from model.training.loop import train  # here, so that --help needs no torch

    logging.basicConfig(format="%(message)s")
    flags = recipe_flags(args)
    text = ""
    if args.data[0].is_dir():
        recipe, text = _understand(args.data, flags, args.out)
    elif len(args.data) == 1:
        recipe = Recipe.read(args.data[0], flags)
    else:
        raise CommandError(f"{args.data[0]} is not a folder; give IMAGES MASKS, or one RECIPE")
    folder = args.out or Path("runs") / recipe.name
    path = train(recipe, folder, shlex.join(["unet", *sys.argv[1:]]), text)
    print(f"{path}  (the whole run: {folder}/report.json)")
    return 0


def _understand(
    folders: Sequence[Path], flags: Mapping[str, str], out: Path | None
) -> tuple[Recipe, str]:
    """Make a recipe for folders of images and masks; print what was understood.

    Returns:
        The recipe, and the text of its file.
    """
    import torch

    from model.training.pace import measure_step
    from model.training.proposal import describe_split, propose_recipe

    if len(folders) > 2:
        raise CommandError(f"give two folders, IMAGES and MASKS, not {len(folders)}")
    device = torch.device(choose_device(flags.get("device", "auto")))
    recipe, proposal = propose_recipe(folders[0], folders[-1], device.type, flags)
    training, validation = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    pace = measure_step(recipe, device)
    findings = [
        *proposal.findings,
        ("split", describe_split(recipe, training, validation)),
        ("network", _describe_network(recipe)),
        ("device", _describe_device(device)),
        ("length", _describe_length(recipe, len(training), pace)),
        ("recipe", f"{out or Path('runs') / recipe.name}/recipe.toml"),
    ]
    for name, finding in findings:
        print(f"{name:9} {finding}")
    sys.stdout.flush()
    return recipe, proposal.to_toml()


def _describe_network(recipe: Recipe) -> str:
    network = recipe.network
    outputs = "output" if network.out_channels == 1 else "outputs"
    return f"{network.base_features} base features, {network.out_channels} {outputs}"


def _describe_device(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _describe_length(recipe: Recipe, images: int, pace: float) -> str:
    """Describe how long a run takes, at `pace` seconds per step without validation."""
    optim = recipe.optim
    steps = optim.steps or math.ceil(optim.epochs * images / optim.batch_size)
    if not steps or (optim.minutes and steps * pace > 60 * optim.minutes):
        steps = max(1, round(60 * optim.minutes / pace))
    seconds = steps * pace
    time = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    text = f"about {steps} steps, {time} ({pace:.2f} s per step) and validation"
    if optim.stop_after:
        text += f"; less if {optim.stop_after} validations of the second half bring no better score"
    return text


def recipe_flags(args: argparse.Namespace) -> dict[str, str]:
    """Field name -> text of the recipe's flags that the user gave."""
    flags = explicit_flags(args, Recipe)
    for kind in SECTIONS.values():
        flags |= explicit_flags(args, kind)
    return flags
