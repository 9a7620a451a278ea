"""Read the arguments of `unet import` that apply to any network: name, classes, preprocessing.

Knows no torch.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.cli.errors import CommandError, writing
from model.arrays import AnyArray, Shape
from model.checkpoint import SUFFIX, Checkpoint, git_revision, save_checkpoint, update_manifest
from model.config import PreprocessConfig, check_name
from model.golden import draw_synthetic_image
from model.training.images import read_image

_PALETTE = ((0, 0, 0), (255, 255, 255), (230, 75, 60), (60, 160, 230), (240, 190, 60),
            (90, 190, 110), (160, 100, 210), (240, 130, 40))  # fmt: skip


def choose_path(args: argparse.Namespace) -> Path:
    """The path of the checkpoint.

    Raises:
        CommandError: a file is there already.
        ConfigError: the name is not a valid model name.
    """
    folder, name = args.out, args.name or args.foreign.stem
    if args.out.suffix == SUFFIX:
        folder, name = args.out.parent, args.name or args.out.stem
    check_name(name)
    path: Path = folder / f"{name}{SUFFIX}"
    if path.exists() and not args.force:
        raise CommandError(f"{path} exists; use another --name, or --force to replace it")
    return path


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


def choose_golden_image(args: argparse.Namespace, channels: int) -> AnyArray:
    """The image of the golden pair: that of the arguments, or a drawn one.

    Raises:
        CommandError: it does not have the channels of the network.
    """
    if args.golden is None:
        return draw_synthetic_image(channels)
    image = read_image(args.golden)
    found = image.shape[2] if image.ndim == 3 else 1
    if found not in (1, channels) and channels != 1:
        raise CommandError(f"{args.golden} has {found} channels, the network takes {channels}")
    return image


def make_preprocess(
    args: argparse.Namespace, channels: int, outputs: int, windows: dict[str, Any]
) -> PreprocessConfig:
    """The preprocessing that the arguments describe.

    Args:
        channels: of the input.
        outputs: channels of the probabilities.
        windows: fields `window` and `overlap`.

    Raises:
        CommandError, ConfigError: the arguments contradict each other or the network.
    """
    classes = _class_names(args, outputs)
    values = dict(windows)
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


def read_windows(args: argparse.Namespace) -> tuple[Shape, ...]:
    """The windows of the arguments, (height, width) each; empty if there are none.

    Raises:
        CommandError: one is not HEIGHTxWIDTH.
    """
    return tuple(_parse_shape(text) for text in args.window or ())


def choose_overlap(windows: Sequence[Shape]) -> int:
    """The overlap of these windows: the default, or half of the smallest side."""
    return min(PreprocessConfig().overlap, min(min(window) for window in windows) // 2)


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
