"""`unet export`: a checkpoint widened, or with what int8 needs, measured; or an OpenVINO graph.

`--base-features` gives the same function to a network with room to learn more. `--calibrate` looks
at the activations of the reference on training images, builds the int8 engine from their ranges,
and measures on validation images what it costs. All of it goes into the checkpoint, and the service
takes int8 by itself only where it was proven.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from app.engine.calibrate import calibrate
from model.checkpoint import load_checkpoint, save_checkpoint, update_manifest
from model.training.data import open_dataset, split_dataset
from model.training.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--base-features", type=int, metavar="N", help="widen to so many; masks stay the same"
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="RECIPE", help="on the data of this recipe, for int8"
    )
    parser.add_argument(
        "--images", type=int, default=40, help="training images to look at (40)", metavar="N"
    )
    parser.add_argument("--out", type=Path, help="checkpoint to write (the same, in place)")
    parser.add_argument(
        "--openvino", type=Path, metavar="FILE.xml", help="write the fp32 graph for other programs"
    )


def main(args: argparse.Namespace) -> int:
    if not (args.base_features or args.calibrate or args.openvino):
        raise ValueError(
            "say what to export: --base-features N, --calibrate RECIPE, or --openvino FILE.xml"
        )
    checkpoint = load_checkpoint(args.checkpoint)
    if args.base_features:
        from model.convert.widen import widen_checkpoint
        from model.predict import attach_golden

        image = checkpoint.golden.image
        checkpoint = attach_golden(widen_checkpoint(checkpoint, args.base_features), image)
    if args.calibrate:
        recipe = Recipe.read(args.calibrate)
        dataset = open_dataset(recipe.data, checkpoint.preprocess)
        training, validation = split_dataset(dataset, recipe.data)
        calibration = calibrate(checkpoint, training, validation, args.images)
        checkpoint = dataclasses.replace(checkpoint, calibration=calibration)
    if args.base_features or args.calibrate:
        path = args.out or args.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = save_checkpoint(path, checkpoint)
        update_manifest(path)
        print(f"{path}: {checkpoint.id}", end="")
        if found := checkpoint.calibration:
            default = "int8" if found.validated else "fp32"
            print(f"; {found}; {default} is its default on a CPU", end="")
        print()
    if args.openvino:
        import openvino as ov

        from app.engine.openvino import build_graph

        graph = build_graph(checkpoint.architecture, checkpoint.preprocess, checkpoint.state)
        ov.save_model(graph, args.openvino)
        known = checkpoint.architecture
        lost = f" - {2 * known.margin}" if known.margin else ""
        print(
            f"{args.openvino}: image, uint8 (N, H, W, {known.in_channels}), to probabilities, "
            f"float32 (N, {known.out_channels}, H{lost}, W{lost})"
        )
    return 0
