"""`unet train`: a recipe and a data set in, a checkpoint out."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path

from model.training.loop import train
from model.training.recipe import Recipe, add_flags, given_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a recipe, model/configs/nuclei.toml for one")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/NAME); resumed if there")
    add_flags(parser)


def main(args: argparse.Namespace) -> int:
    logging.basicConfig(format="%(message)s")
    recipe = Recipe.read(args.config, given_flags(args))
    folder = args.out or Path("runs") / recipe.name
    path = train(recipe, folder, shlex.join(["unet", *sys.argv[1:]]))
    print(f"{path}  (the whole run: {folder}/report.json)")
    return 0
