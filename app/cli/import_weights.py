"""`unet import`: convert a state dict from elsewhere to a self-describing checkpoint."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from app.cli.errors import CommandError, writing
from model.arrays import AnyArray
from model.checkpoint import SUFFIX, Checkpoint, git_revision, save_checkpoint, update_manifest
from model.config import PreprocessConfig, UNetConfig, check_name
from model.convert.import_weights import (
    State,
    choose_precision,
    draw_synthetic_image,
    infer_architecture,
    read_state,
    softmax_as_sigmoid,
    to_unet_state_dict,
)
from model.predict import attach_golden
from model.training.data import read_image

_PALETTE = ((0, 0, 0), (255, 255, 255), (230, 75, 60), (60, 160, 230), (240, 190, 60),
            (90, 190, 110), (160, 100, 210), (240, 130, 40))  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("foreign", type=Path, help="a state dict: .pth, .pt or .safetensors")
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
        "--base-features", type=int, metavar="N", help="checked against the file, which has it too"
    )
    group.add_argument(
        "--padding", type=int, choices=(0, 1), default=1, help="of the convolutions (default: 1)"
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
    state = _read_weights(args)
    architecture = _infer_architecture(args, state)
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
    print(f"{path}: {saved.id}, serve it with: unet serve --model {saved.name}")
    return 0


def _read_weights(args: argparse.Namespace) -> State:
    """The state dict under this project's names; a softmax over two outputs becomes a sigmoid.

    Raises:
        CheckpointError: the file cannot be read or mapped.
        CommandError: the file has two outputs, and the arguments do not say what they are.
    """
    state = to_unet_state_dict(read_state(args.foreign))
    if infer_architecture(state).out_channels != 2:
        return state
    if args.two_outputs is None:
        raise CommandError(
            f"{args.foreign} has two outputs: set --two-outputs softmax (background and "
            "foreground) or --two-outputs border (foreground, and the border between objects)"
        )
    return softmax_as_sigmoid(state) if args.two_outputs == "softmax" else state


def _infer_architecture(args: argparse.Namespace, state: State) -> UNetConfig:
    found = infer_architecture(state)
    if args.base_features not in (None, found.base_features):
        raise CommandError(
            f"--base-features {args.base_features}: the file has {found.base_features}"
        )
    return UNetConfig(found.in_channels, found.out_channels, found.base_features, args.padding)


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
    elif args.mode == "resize":
        values["window"] = ((512, 512),) if architecture.padding else ((572, 572),)
    elif not architecture.padding:
        values = {"window": ((380, 380), (572, 572)), "overlap": 0}
    if args.mode == "resize":
        values["overlap"] = 0  # there is one window
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
