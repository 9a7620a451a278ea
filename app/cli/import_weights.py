"""`unet import`: a foreign state dict becomes a self-describing checkpoint."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from model.checkpoint import SUFFIX, Checkpoint, git_revision, save_checkpoint, update_manifest
from model.config import PreprocessConfig, UNetConfig, check_name
from model.convert.import_weights import (
    choose_precision,
    draw_synthetic_image,
    infer_architecture,
    read_state,
    softmax_as_sigmoid,
    to_unet_state_dict,
)
from model.errors import ConfigError
from model.predict import attach_golden
from model.training.data import read_image

_COLOURS = ((0, 0, 0), (255, 255, 255), (230, 75, 60), (60, 160, 230), (240, 190, 60),
            (90, 190, 110), (160, 100, 210), (240, 130, 40))  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("foreign", type=Path, help="a state dict: .pth, .pt or .safetensors")
    parser.add_argument("--name", help="of the model (the file's own)")
    parser.add_argument(
        "--out", type=Path, default=Path("weights"), help="folder (weights), or a file"
    )
    parser.add_argument("--base-features", type=int, help="checked against the file")
    parser.add_argument("--padding", type=int, choices=(0, 1), default=1, help="(1)")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="the background may be omitted (foreground; of several, class 1, class 2, ...)",
    )
    parser.add_argument(
        "--two-outputs",
        choices=("softmax", "border"),
        help="what two outputs are: background and foreground under a softmax, or foreground and "
        "the border between touching objects, a sigmoid each; the file does not say",
    )
    parser.add_argument("--mode", choices=("native", "resize"), default="native")
    parser.add_argument(
        "--window", nargs="+", metavar="HxW", help="shapes; 'resize' takes one (the defaults)"
    )
    parser.add_argument("--mean", nargs="+", type=float, help="a channel, of values 0..1 (0)")
    parser.add_argument("--std", nargs="+", type=float, help="a channel, of values 0..1 (1)")
    parser.add_argument("--intensity", choices=("range", "percentile"), default="range")
    parser.add_argument(
        "--percentiles",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="of an image's values, that become 0 and 1 (1 99.8); 0 100 is from least to greatest",
    )
    parser.add_argument("--golden", type=Path, help="image for the golden pair (a drawn one)")
    parser.add_argument("--licence", default="unknown", help="of the weights")
    parser.add_argument("--data", default="unknown", help="what they were trained on")
    parser.add_argument(
        "--half", action="store_true", help="round the weights to 16 bits: half the size"
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint of that name")


def main(args: argparse.Namespace) -> int:
    state = to_unet_state_dict(read_state(args.foreign))
    found = infer_architecture(state)
    if found.out_channels == 2:
        if args.two_outputs is None:
            raise ConfigError(
                f"{args.foreign} has two outputs: background and foreground (--two-outputs "
                "softmax), or foreground and the border between objects (--two-outputs border)?"
            )
        if args.two_outputs == "softmax":
            state = softmax_as_sigmoid(state)
            found = infer_architecture(state)
    if args.base_features not in (None, found.base_features):
        raise ConfigError(
            f"--base-features {args.base_features}: the file has {found.base_features}"
        )
    architecture = UNetConfig(
        found.in_channels, found.out_channels, found.base_features, args.padding
    )
    folder, name = args.out, args.name or args.foreign.stem
    if args.out.suffix == SUFFIX:
        folder, name = args.out.parent, args.name or args.out.stem
    check_name(name)
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
    path: Path = folder / f"{name}{SUFFIX}"
    if path.exists() and not args.force:
        raise ConfigError(f"{path} exists; give another --name, or --force to replace it")
    image = (
        read_image(args.golden) if args.golden else draw_synthetic_image(architecture.in_channels)
    )
    folder.mkdir(parents=True, exist_ok=True)
    saved = save_checkpoint(path, attach_golden(checkpoint, image))
    update_manifest(path)
    print(f"{path}: {saved.id}, serve it with: unet serve --model {saved.name}")
    return 0


def _preprocess(args: argparse.Namespace, architecture: UNetConfig) -> PreprocessConfig:
    channels, outputs = architecture.in_channels, architecture.out_channels
    classes = tuple(name for part in args.classes or () for name in part.split(",") if name)
    expected = max(2, outputs)
    if not classes:
        names = [f"class {index}" for index in range(1, outputs)]
        classes = tuple(names if outputs > 2 else ["foreground"])
    if len(classes) == expected - 1:
        classes = ("background", *classes)
    palette = tuple(_COLOURS[index % len(_COLOURS)] for index in range(len(classes)))
    values: dict[str, Any] = {}
    if args.window:
        values["window"] = tuple(_shape(text) for text in args.window)
    elif args.mode == "resize":
        values["window"] = ((512, 512),) if architecture.padding else ((572, 572),)
    elif not architecture.padding:
        values |= {"window": ((380, 380), (572, 572)), "overlap": 0}
    if args.mode == "resize":
        values["overlap"] = 0  # there is one window
    if args.percentiles:
        if args.intensity != "percentile":
            raise ConfigError("--percentiles needs --intensity percentile")
        values["percentiles"] = tuple(args.percentiles)
    return PreprocessConfig(
        mode=args.mode,
        intensity=args.intensity,
        mean=tuple(args.mean or (0.0,) * channels),
        std=tuple(args.std or (1.0,) * channels),
        classes=classes,
        palette=palette,
        **values,
    )


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ConfigError(f"--window {text}: a shape is HEIGHTxWIDTH, 512x512 for one")
    return int(match[1]), int(match[2])
