"""`unet train`: train a network from a recipe and a data set, and write a checkpoint."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path

from app.cli.flags import add_flags, explicit_flags
from model.training.recipe import SECTIONS, Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "unet train RECIPE [--out FOLDER] [--KEY VALUE ...]"
    parser.epilog = "Flags override the recipe. Defaults apply to keys that neither of them sets."
    parser.add_argument(
        "config", type=Path, metavar="RECIPE", help="a TOML file, e.g. model/configs/nuclei.toml"
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
    recipe = Recipe.read(args.config, recipe_flags(args))
    folder = args.out or Path("runs") / recipe.name
    path = train(recipe, folder, shlex.join(["unet", *sys.argv[1:]]))
    print(f"{path}  (the whole run: {folder}/report.json)")
    return 0


def recipe_flags(args: argparse.Namespace) -> dict[str, str]:
    """Field name -> text of the recipe's flags that the user gave."""
    flags = explicit_flags(args, Recipe)
    for kind in SECTIONS.values():
        flags |= explicit_flags(args, kind)
    return flags
