"""`unet export`: change a checkpoint's width, calibrate it, or write it for other programs.

`--base-features` widens or narrows the network without changing what it computes. `--calibrate`
scales channels, which does not change it either, and records the ranges of activations in the
reference network on training images. It builds the int8 engine from them, and measures on
validation images how far its masks differ from fp32. Weights, ranges and measurements go into the
checkpoint. By default the service uses int8 only where these measurements validate it.
`app.cli.export.formats` writes the formats of other programs.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from app.cli.errors import CommandError, writing
from app.cli.export.formats import add_format_arguments, plan_exports
from app.engine.calibrate import calibrate
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, update_manifest
from model.training.data import open_dataset
from model.training.recipe import Recipe
from model.training.split import split_dataset

_EQUALIZE_IMAGES = 12
"""Images on which the size of each channel is measured. They only need to show which is small."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="the checkpoint to read")
    parser.add_argument(
        "--base-features",
        type=_parse_positive,
        metavar="N",
        help="widen the network to N base features, or narrow a widened one; its masks stay the "
        "same",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="RECIPE",
        help="calibrate and validate int8 on the data of this recipe",
    )
    parser.add_argument(
        "--images",
        type=_parse_positive,
        default=40,
        metavar="N",
        help="number of training images for --calibrate (default: 40)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="checkpoint to write after --base-features or --calibrate (default: replace the one "
        "that was read)",
    )
    parser.add_argument("--force", action="store_true", help="replace files of the same name")
    add_format_arguments(parser)


def main(args: argparse.Namespace) -> int:
    changes = args.base_features or args.calibrate
    exports = plan_exports(args)
    if not (changes or exports):
        raise CommandError(
            "set what to export: --base-features N, --calibrate RECIPE, --onnx FILE, "
            "--openvino FOLDER, --state-dict FILE or --bioimageio FILE"
        )
    checkpoint = load_checkpoint(args.checkpoint)
    if args.base_features:
        checkpoint = _change_width(checkpoint, args.base_features)
    if args.calibrate:
        checkpoint = _calibrate(checkpoint, args.calibrate, args.images)
    if changes:
        checkpoint = _save(checkpoint, args.out or args.checkpoint)
    for write in exports:
        write(checkpoint)
    return 0


def _change_width(checkpoint: Checkpoint, base_features: int) -> Checkpoint:
    """Widen or narrow a checkpoint, and attach a new golden pair of the same image.

    Raises:
        ConfigError: neither number of features is a multiple of the other, or the checkpoint would
            have to be narrowed and was not widened from `base_features`.
    """
    from model.convert.widen import narrow_checkpoint, widen_checkpoint
    from model.predict import attach_golden

    before = checkpoint.unet.base_features
    if base_features == before:
        return checkpoint
    change = widen_checkpoint if base_features > before else narrow_checkpoint
    return attach_golden(change(checkpoint, base_features), checkpoint.golden.image)


def _calibrate(checkpoint: Checkpoint, path: Path, images: int) -> Checkpoint:
    """Scale the channels of a checkpoint for int8, and attach its calibration."""
    from model.convert.equalize import equalize_channels, measure_channels
    from model.predict import Predictor, attach_golden

    recipe = Recipe.read(path)
    dataset = open_dataset(recipe.data, checkpoint.preprocess)
    training, validation = split_dataset(dataset, recipe.data)
    samples = training.spread_sources(_EQUALIZE_IMAGES)
    highs = measure_channels(Predictor.of(checkpoint), (sample.image for sample in samples))
    state = equalize_channels(checkpoint.state, highs)
    checkpoint = attach_golden(
        dataclasses.replace(checkpoint, state=state), checkpoint.golden.image
    )
    calibration = calibrate(checkpoint, training, validation, images)
    return dataclasses.replace(checkpoint, calibration=calibration)


def _save(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Write the checkpoint, record it in the manifest, print its id, and return it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = save_checkpoint(path, checkpoint)
        update_manifest(path)
    line = f"{path}: {saved.id}"
    if calibration := saved.calibration:
        default = "int8" if calibration.validated else "fp32"
        line += f"; {calibration}; {default} is its default on a CPU"
    print(line)
    return saved


def _parse_positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value
