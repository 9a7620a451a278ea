"""`unet export`: change a checkpoint's width, calibrate it, or write it for other programs.

`--base-features` widens or narrows the network without changing what it computes. `--calibrate`
scales the channels of a U-Net, which does not change it either, and records the ranges of
activations on training images. It builds the int8 engine from them, and measures on validation
images how far its masks differ from fp32. Weights, ranges and measurements go into the checkpoint.
By default the service uses int8 only where these measurements validate it.
`app.cli.export.formats` writes the formats of other programs.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from app.cli.errors import CommandError, check_destination, writing
from app.cli.export.formats import add_format_arguments, plan_exports
from app.engine.calibrate import calibrate
from model.checkpoint import (
    SUFFIX,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
    update_manifest,
)
from model.config import UNetConfig, check_name
from model.training.data import PairedDataset, open_dataset
from model.training.recipe import Recipe
from model.training.sections import DataConfig
from model.training.split import split_dataset

_EQUALIZE_IMAGES = 12
"""Images on which the size of each channel is measured. They only need to show which is small."""
_VALIDATION_SHARE = 0.5
"""Share of the images of a folder on which int8 is compared with fp32."""


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
        metavar="RECIPE | IMAGES",
        help="calibrate and validate int8: on the training and validation images of a recipe, or "
        "on one half and the other of a folder of images (with --masks)",
    )
    parser.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="folder of the masks of --calibrate IMAGES"
    )
    parser.add_argument(
        "--images",
        type=_parse_positive,
        default=40,
        metavar="N",
        help="number of images on which --calibrate measures ranges (default: 40)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.safetensors",
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
    if args.out is not None:
        _check_out(args)
    if args.masks and not (args.calibrate and args.calibrate.is_dir()):
        raise CommandError("--masks needs --calibrate with the folder of the images")
    checkpoint = load_checkpoint(args.checkpoint)
    if exports:
        _ = checkpoint.unet  # an error for an ONNX graph, before it is calibrated
    data = _choose_data(checkpoint, args) if args.calibrate else None
    if args.base_features:
        checkpoint = _change_width(checkpoint, args.base_features)
    if data:
        checkpoint = _calibrate(checkpoint, data, args.images)
    if changes:
        checkpoint = _save(checkpoint, args.out or args.checkpoint)
    for write in exports:
        write(checkpoint)
    return 0


def _check_out(args: argparse.Namespace) -> None:
    """Check --out before a long computation.

    Raises:
        CommandError: no checkpoint is written, its name has another suffix, or it cannot be
            written or would replace another file without --force.
        ConfigError: its name is not a valid model name.
    """
    if not (args.base_features or args.calibrate):
        raise CommandError("--out needs --base-features or --calibrate")
    if args.out.suffix != SUFFIX:
        raise CommandError(f"--out {args.out}: the file's name ends with {SUFFIX}")
    check_name(args.out.stem)
    with writing(args.out):
        is_replaced = args.out.exists() and args.out.samefile(args.checkpoint)
    check_destination(args.out, args.force or is_replaced)


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


def _choose_data(checkpoint: Checkpoint, args: argparse.Namespace) -> DataConfig:
    """The data of the recipe, or of the folders, of which one half is for validation.

    Raises:
        CommandError: the folder of the masks is not set.
    """
    if not args.calibrate.is_dir():
        return Recipe.read(args.calibrate).data
    if args.masks is None:
        raise CommandError(
            f"--calibrate {args.calibrate}: set the folder of the masks too, --masks FOLDER"
        )
    return DataConfig(
        images=str(args.calibrate),
        masks=str(args.masks),
        labels="binary" if checkpoint.preprocess.binary else "classes",
        validation_share=_VALIDATION_SHARE,
    )


def _calibrate(checkpoint: Checkpoint, data: DataConfig, images: int) -> Checkpoint:
    """Attach a calibration to a checkpoint; the channels of a U-Net are scaled for int8 before."""
    training, validation = split_dataset(open_dataset(data, checkpoint.preprocess), data)
    if isinstance(checkpoint.architecture, UNetConfig):
        checkpoint = _scale_channels(checkpoint, training)
    calibration = calibrate(checkpoint, training, validation, images)
    return dataclasses.replace(checkpoint, calibration=calibration)


def _scale_channels(checkpoint: Checkpoint, training: PairedDataset) -> Checkpoint:
    from model.convert.equalize import equalize_channels, measure_channels
    from model.predict import Predictor, attach_golden

    samples = training.spread_sources(_EQUALIZE_IMAGES)
    highs = measure_channels(Predictor.of(checkpoint), (sample.image for sample in samples))
    state = equalize_channels(checkpoint.state, highs)
    return attach_golden(dataclasses.replace(checkpoint, state=state), checkpoint.golden.image)


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
