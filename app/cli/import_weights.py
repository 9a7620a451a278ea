"""`unet import`: convert the weights of another program to a self-describing checkpoint.

A file of weights does not say how the image becomes numbers, and sometimes not how the network
pads. The arguments do; where no answer is likely, the command asks.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from app.cli.errors import CommandError, writing
from model.arrays import AnyArray
from model.checkpoint import SUFFIX, Checkpoint, git_revision, save_checkpoint, update_manifest
from model.config import PreprocessConfig, UNetConfig, check_name
from model.convert.foreign_networks import Family, State, softmax_as_sigmoid
from model.convert.import_weights import (
    Finding,
    choose_precision,
    draw_synthetic_image,
    find_network,
    infer_architecture,
)
from model.errors import CheckpointError
from model.predict import attach_golden
from model.training.data import read_image

_PALETTE = ((0, 0, 0), (255, 255, 255), (230, 75, 60), (60, 160, 230), (240, 190, 60),
            (90, 190, 110), (160, 100, 210), (240, 130, 40))  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("foreign", type=Path, help="weights of torch or safetensors")
    parser.add_argument("--name", help="name of the model (default: that of the file)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("weights"),
        help="folder of the checkpoint, or its file (default: weights)",
    )
    _add_network_arguments(parser)
    _add_preprocessing_arguments(parser)
    parser.add_argument(
        "--golden", type=Path, metavar="IMAGE", help="image of the golden pair (default: synthetic)"
    )
    parser.add_argument(
        "--licence", default="unknown", help="licence of the weights (default: unknown)"
    )
    parser.add_argument("--data", default="unknown", help="training data (default: unknown)")
    parser.add_argument(
        "--half", action="store_true", help="round the weights to fp16, which halves the file"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint of the same name"
    )


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--weights",
        metavar="KEYS",
        help="which network, if the file has several, as the message lists them (default: a "
        "running average, if there is exactly one)",
    )
    group.add_argument(
        "--base-features", type=int, metavar="N", help="checked against the file, which has it too"
    )
    group.add_argument(
        "--padding",
        type=int,
        choices=(0, 1),
        help="of the convolutions (default: 1; jvanvugt/pytorch-unet has no default)",
    )
    group.add_argument(
        "--pooling",
        choices=("max", "average"),
        help="needed for jvanvugt/pytorch-unet, of which there are versions with either; average "
        "cannot be converted",
    )
    group.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names, with or without the background (default: foreground; for several "
        "classes class 1, class 2, ...)",
    )
    group.add_argument(
        "--two-outputs",
        choices=("softmax", "border"),
        help="meaning of two output channels, which the file does not contain. softmax: background "
        "and foreground; border: foreground, and the border between touching objects, one sigmoid "
        "each",
    )


def _add_preprocessing_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preprocessing")
    group.add_argument(
        "--mode",
        choices=("native", "resize"),
        default="native",
        help="native: windows at the image's own resolution; resize: the whole image is resized "
        "(default: native)",
    )
    group.add_argument(
        "--window", nargs="+", metavar="HxW", help="window shapes; one for mode resize"
    )
    group.add_argument(
        "--mean",
        nargs="+",
        type=float,
        metavar="X",
        help="subtracted from values in 0..1, per channel (default: 0)",
    )
    group.add_argument(
        "--std",
        nargs="+",
        type=float,
        metavar="X",
        help="divides the values after that, per channel (default: 1)",
    )
    group.add_argument(
        "--intensity",
        choices=("range", "percentile"),
        default="range",
        help="what becomes 0..1: the range of the data type, or the range between two percentiles "
        "of the image (default: range)",
    )
    group.add_argument(
        "--percentiles",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="percentiles that become 0 and 1 (default: 1 99.8); 0 100: minimum and maximum",
    )


def main(args: argparse.Namespace) -> int:
    finding = find_network(args.foreign, args.weights)
    family = finding.network.family
    padding = _choose_padding(args, family)
    state = _convert(args, finding)
    architecture = _infer_architecture(args, state, padding)
    folder, name = args.out, args.name or args.foreign.stem
    if args.out.suffix == SUFFIX:
        folder, name = args.out.parent, args.name or args.out.stem
    check_name(name)
    path: Path = folder / f"{name}{SUFFIX}"
    if path.exists() and not args.force:
        raise CommandError(f"{path} exists; use another --name, or --force to replace it")
    checkpoint = Checkpoint(
        name,
        architecture,
        _preprocess(args, architecture),
        choose_precision(state, args.half),
        card={
            "metrics": {},
            "data": args.data,
            "licence": args.licence,
            "imported_from": args.foreign.name,
            "revision": git_revision(),
        },
    )
    checkpoint = attach_golden(checkpoint, _golden_image(args, architecture.in_channels))
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        saved = save_checkpoint(path, checkpoint)
        update_manifest(path)
    _print_finding(args.foreign, finding, architecture)
    print(f"{path}: {saved.id}, serve it with: {_serve_command(path)}")
    return 0


def _choose_padding(args: argparse.Namespace, family: Family) -> int:
    """The padding of the convolutions.

    Raises:
        CommandError: the code of this network cannot have it, or does not pool by maximum, or the
            file says neither and the arguments do not.
    """
    if args.pooling == "average":
        raise CommandError("--pooling average: this network pools by maximum, so weights that were "
                           "trained with average pooling cannot be converted")  # fmt: skip
    padding: int | None = family.default_padding if args.padding is None else args.padding
    missing = []
    if padding is None:
        missing.append("--padding 0 (padding=False, its default) or --padding 1")
    if family.pooling_varies and args.pooling is None:
        missing.append("--pooling max (F.max_pool2d) or --pooling average (F.avg_pool2d)")
    if padding is None or missing:
        raise CommandError(
            f"{args.foreign} is a network of {family.name}, and does not say what its code does: "
            f"set {', and '.join(missing)}"
        )
    if padding not in family.paddings:
        raise CommandError(
            f"--padding {padding}: {family.name} pads its convolutions; leave --padding out"
        )
    return padding


def _convert(args: argparse.Namespace, finding: Finding) -> State:
    """The state dict under this project's names; a softmax over two outputs becomes a sigmoid.

    Raises:
        CheckpointError: the network cannot be converted.
        CommandError: the network has two outputs, and the arguments do not say what they are.
    """
    try:
        state = finding.network.convert()
    except CheckpointError as error:
        others = ", ".join(map(repr, finding.others))
        hint = f"; --weights can choose another network: {others}" if others else ""
        raise CheckpointError(f"{args.foreign}: {error}{hint}") from error
    if infer_architecture(state).out_channels != 2:
        return state
    if args.two_outputs is None:
        raise CommandError(
            f"{args.foreign} has two outputs: set --two-outputs softmax (background and "
            "foreground) or --two-outputs border (foreground, and the border between objects)"
        )
    return softmax_as_sigmoid(state) if args.two_outputs == "softmax" else state


def _infer_architecture(args: argparse.Namespace, state: State, padding: int) -> UNetConfig:
    found = infer_architecture(state)
    if args.base_features not in (None, found.base_features):
        raise CommandError(
            f"--base-features {args.base_features}: the file has {found.base_features}"
        )
    return UNetConfig(found.in_channels, found.out_channels, found.base_features, padding)


def _print_finding(path: Path, finding: Finding, architecture: UNetConfig) -> None:
    """Print which network was imported, and what was left out or differs."""
    network = finding.network
    where = f", at {network.location!r}" if network.location else ""
    kind = ", a running average" if network.is_average else ""
    print(f"{path}: {network.family.name}{where}{kind}")
    if finding.others:
        print(f"not imported: {', '.join(map(repr, finding.others))}; choose with --weights")
    for location in finding.unread_averages:
        print(
            f"not imported: {location!r} looks like a running average, but its tensors do not have "
            "the names of a network"
        )
    if network.family.output == "sigmoid" and architecture.out_channels > 2:
        print(
            f"{network.family.name} applies a sigmoid to each output; here classes exclude each "
            "other (softmax): a pixel's class is the output with the largest value"
        )


def _serve_command(path: Path) -> str:
    words = ["unet", "serve", "--model", path.stem]
    if path.parent != Path("weights"):
        words += ["--weights-dir", str(path.parent)]
    return shlex.join(words)


def _golden_image(args: argparse.Namespace, channels: int) -> AnyArray:
    if args.golden is None:
        return draw_synthetic_image(channels)
    image = read_image(args.golden)
    found = image.shape[2] if image.ndim == 3 else 1
    if found not in (1, channels) and channels != 1:
        raise CommandError(f"{args.golden} has {found} channels, the network takes {channels}")
    return image


def _preprocess(args: argparse.Namespace, architecture: UNetConfig) -> PreprocessConfig:
    """The preprocessing that the arguments describe.

    Raises:
        CommandError, ConfigError: the arguments contradict each other or the network.
    """
    channels = architecture.in_channels
    classes = _class_names(args, architecture.out_channels)
    values: dict[str, Any] = _window_values(args, architecture)
    if args.percentiles:
        if args.intensity != "percentile":
            raise CommandError("--percentiles needs --intensity percentile")
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


def _window_values(args: argparse.Namespace, architecture: UNetConfig) -> dict[str, Any]:
    """The windows and their overlap, where they differ from the defaults."""
    values: dict[str, Any] = {}
    if args.window:
        values["window"] = tuple(_parse_shape(text) for text in args.window)
        smallest = min(min(shape) for shape in values["window"])
        values["overlap"] = min(PreprocessConfig().overlap, smallest // 2)
    elif args.mode == "resize":
        values["window"] = ((512, 512),) if architecture.padding else ((572, 572),)
    elif not architecture.padding:
        values["window"] = ((380, 380), (572, 572))
    if args.mode == "resize" or not architecture.padding:
        values["overlap"] = 0  # there is one window, or no zero padding distorts its edge
    return values


def _class_names(args: argparse.Namespace, outputs: int) -> tuple[str, ...]:
    """The names of all classes, the background first."""
    names = [name for part in args.classes or () for name in part.split(",") if name]
    if not names and outputs > 2:
        names = [f"class {index}" for index in range(1, outputs)]
    if not names:
        names = ["foreground"]
    if len(names) == max(2, outputs) - 1:
        names.insert(0, "background")
    return tuple(names)


def _parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise CommandError(f"--window {text}: a shape is HEIGHTxWIDTH, for example 512x512")
    return int(match[1]), int(match[2])
