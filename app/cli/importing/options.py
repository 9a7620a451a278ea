"""Read and check the arguments of `unet import` that apply to any network: path, classes, values.

Knows no torch.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.cli.errors import CommandError, check_destination, writing
from app.cli.importing.normalization import check_normalization, count, write_flag
from app.engine.inspection.facts import MAX_SIDE
from model.arrays import AnyArray, Shape
from model.checkpoint import SUFFIX, Checkpoint, git_revision, save_checkpoint, update_manifest
from model.config import Architecture, PreprocessConfig, check_name
from model.errors import ConfigError, DataError
from model.pixels import SelectionError
from model.training.images import read_image

_PALETTE = ((0, 0, 0), (255, 255, 255), (230, 75, 60), (60, 160, 230), (240, 190, 60),
            (90, 190, 110), (160, 100, 210), (240, 130, 40))  # fmt: skip


def check_options(args: argparse.Namespace) -> None:
    """Check what does not depend on the network, before the file is read.

    Raises:
        CommandError, ConfigError: a value is not allowed, or two contradict each other.
    """
    choose_path(args)
    windows = read_windows(args)
    if args.mode == "resize" and len(windows) > 1:
        raise CommandError(f"--mode resize takes one --window, not {len(windows)}")
    if args.percentiles:
        if args.intensity != "percentile":
            raise CommandError("--percentiles needs --intensity percentile")
        PreprocessConfig(percentiles=tuple(args.percentiles))
    check_normalization(args)
    _read_class_names(args)


def choose_path(args: argparse.Namespace) -> Path:
    """The path of the checkpoint: --out if it ends with .safetensors, otherwise a file in it.

    Raises:
        CommandError: --out ends with another suffix, or contradicts --name; or the file exists, or
            cannot be written.
        ConfigError: the name is not a valid model name.
    """
    path = _read_path(args)
    check_destination(path, args.force)
    return path


def _read_path(args: argparse.Namespace) -> Path:
    """The path that --out and --name give, or the name of the file."""
    out: Path = args.out
    if out.suffix == SUFFIX:
        if args.name not in (None, out.stem):
            raise CommandError(f"--out {out} and --name {args.name} are two names; leave one out")
        check_name(out.stem)
        return out
    with writing(out):
        if out.suffix and not out.is_dir():
            raise CommandError(
                f"--out {out}: the file's name ends with {SUFFIX}, for example "
                f"{out.with_suffix(SUFFIX)}; a folder of this name must exist already"
            )
    name = args.foreign.stem if args.name is None else args.name
    check_name(name)
    return out / f"{name}{SUFFIX}"


def make_card(args: argparse.Namespace) -> dict[str, Any]:
    """Facts for people about an imported checkpoint."""
    return {
        "metrics": {},
        "data": args.data,
        "licence": args.licence,
        "imported_from": args.foreign.name,
        "revision": git_revision(),
    }


def save(path: Path, checkpoint: Checkpoint) -> str:
    """Write a checkpoint and its entry in the manifest.

    Returns:
        A line that says how to serve it.

    Raises:
        CommandError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = save_checkpoint(path, checkpoint)
        update_manifest(path)
    return f"{path}: {saved.id}, serve it with: {_serve_command(path)}"


def _serve_command(path: Path) -> str:
    words = ["unet", "serve", "--model", path.stem]
    if path.parent != Path("weights"):
        words += ["--weights-dir", str(path.parent)]
    return shlex.join(words)


def read_golden_image(args: argparse.Namespace) -> AnyArray | None:
    """The image of the golden pair; None if the arguments have none.

    Raises:
        CommandError: it is a stack, or has channels to choose from.
        DataError: it cannot be read.
    """
    if args.golden is None:
        return None
    try:
        return read_image(args.golden)
    except DataError as error:
        if isinstance(error.__cause__, SelectionError):
            raise CommandError(
                f"--golden {args.golden}: {error.__cause__}; save one page with 1 or 3 channels as "
                "a file of its own"
            ) from error
        raise


def check_channels(args: argparse.Namespace, architecture: Architecture) -> None:
    """Check that the network takes grey or RGB images, and the arguments have values for each
    channel.

    Raises:
        CommandError: it does not, or they have another number.
    """
    channels = architecture.in_channels
    if channels not in (1, 3):
        raise CommandError(
            f"{args.foreign}: the network takes {channels} channels; only 1 (grey) and 3 (RGB) are "
            "supported"
        )
    for flag, given in (("--mean", args.mean), ("--std", args.std)):
        if given and len(given) != channels:
            raise CommandError(
                f"{write_flag(flag, given)}: the network takes {count(channels, 'channel')}; give "
                f"{count(channels, 'value')}, not {len(given)}"
            )


def make_preprocess(
    args: argparse.Namespace, architecture: Architecture, windows: dict[str, Any]
) -> PreprocessConfig:
    """The preprocessing that the arguments describe, checked against the network.

    Args:
        architecture: accepted by `check_channels`.
        windows: fields `window` and `overlap`.

    Raises:
        CommandError, ConfigError: the arguments do not fit the network.
    """
    _check_windows(windows.get("window", ()), architecture)
    channels = architecture.in_channels
    classes = _name_classes(args, architecture.out_channels)
    values = dict(windows)
    if args.percentiles:
        values["percentiles"] = tuple(args.percentiles)
    return PreprocessConfig(
        mode=args.mode,
        intensity=args.intensity,
        mean=tuple(args.mean or (0.0,) * channels),
        std=tuple(args.std or (1.0,) * channels),
        classes=classes,
        palette=tuple(_PALETTE[index % len(_PALETTE)] for index in range(len(classes))),
        **values,
    )


def check_two_outputs(args: argparse.Namespace, outputs: int) -> None:
    """Check that --two-outputs is only set for a network of two outputs.

    Raises:
        CommandError: it has another number.
    """
    if args.two_outputs is not None and outputs != 2:
        raise CommandError(
            f"--two-outputs {args.two_outputs}: {args.foreign} has {count(outputs, 'output')}; "
            "leave it out"
        )


def read_windows(args: argparse.Namespace) -> tuple[Shape, ...]:
    """The windows of the arguments, (height, width) each; empty if there are none.

    Raises:
        CommandError: one is not HEIGHTxWIDTH, or a side has no pixels or too many.
    """
    return tuple(_parse_shape(text) for text in args.window or ())


def choose_overlap(windows: Sequence[Shape]) -> int:
    """The overlap of these windows: the default, or half of the smallest side."""
    return min(PreprocessConfig().overlap, min(min(window) for window in windows) // 2)


def _check_windows(windows: Sequence[Shape], architecture: Architecture) -> None:
    """Check that the network accepts the windows.

    Raises:
        CommandError: it does not. The message has the next larger window that it accepts.
    """
    for height, width in windows:
        try:
            architecture.check_window(height, width)
        except ConfigError as error:
            sides = [_find_accepted_side(side, architecture) for side in (height, width)]
            hint = "" if None in sides else f"; use {sides[0]}x{sides[1]}, for example"
            raise CommandError(f"{error}{hint}") from error


def _find_accepted_side(least: int, architecture: Architecture) -> int | None:
    """The smallest side of a square window, from `least` on, that the network accepts."""
    for side in range(least, MAX_SIDE + 1):
        try:
            architecture.check_window(side, side)
        except ConfigError:
            continue
        return side
    return None


def _name_classes(args: argparse.Namespace, outputs: int) -> tuple[str, ...]:
    """The names of all classes, the background first.

    Raises:
        CommandError: the network has another number of classes.
    """
    names, wanted = _read_class_names(args), max(2, outputs)
    if not names and outputs > 2:
        names = [f"class {index}" for index in range(1, outputs)]
    if not names:
        names = ["foreground"]
    has_background = "background" in map(str.lower, names)
    if len(names) == wanted - 1 and not has_background:
        names.insert(0, "background")
    if len(names) != wanted:
        raise CommandError(
            f"--classes has {count(len(names), 'name')}; a network with "
            f"{count(outputs, 'output')} has {wanted} classes: name all, or all but the background"
        )
    return tuple(names)


def _read_class_names(args: argparse.Namespace) -> list[str]:
    """The names in the arguments, with or without the background; empty if there are none.

    Raises:
        CommandError: the names are empty, or one occurs twice.
    """
    parts = (name.strip() for part in args.classes or () for name in part.split(","))
    names = [name for name in parts if name]
    if args.classes is not None and not names:
        raise CommandError("--classes: give at least one name")
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"--classes: {name!r} is given twice; each class needs its own name")
    return names


def _parse_shape(text: str) -> Shape:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise CommandError(f"--window {text}: a shape is HEIGHTxWIDTH, for example 512x512")
    height, width = int(match[1]), int(match[2])
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise CommandError(f"--window {text}: a window has sides of 1 to {MAX_SIDE} pixels")
    return height, width
