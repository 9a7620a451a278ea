"""Import weights: find the network in a file, convert it, and say what was found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from app.cli.errors import CommandError
from app.cli.importing.normalization import describe_defaults
from app.cli.importing.options import (
    check_channels,
    check_two_outputs,
    choose_overlap,
    choose_path,
    make_card,
    make_preprocess,
    read_golden_image,
    read_windows,
    save,
)
from model.checkpoint import Checkpoint
from model.config import UNetConfig
from model.convert.foreign_networks import Family, State, replace_softmax
from model.convert.import_weights import (
    Finding,
    choose_precision,
    find_network,
    infer_architecture,
)
from model.errors import CheckpointError
from model.golden import draw_synthetic_image
from model.predict import attach_golden


def import_weights(args: argparse.Namespace) -> None:
    """Convert the weights that the arguments name to a checkpoint.

    Raises:
        UserError: they cannot be converted, or the arguments do not fit.
    """
    golden_image = read_golden_image(args)
    finding = find_network(args.foreign, args.weights)
    family = finding.network.family
    padding = _choose_padding(args, family)
    state = _convert(args, finding)
    architecture = _infer_architecture(args, state, padding)
    check_channels(args, architecture)
    path = choose_path(args)
    checkpoint = Checkpoint(
        path.stem,
        architecture,
        make_preprocess(args, architecture, _window_values(args, architecture)),
        choose_precision(state, args.half),
        card=make_card(args),
    )
    if golden_image is None:
        golden_image = draw_synthetic_image(architecture.in_channels)
    checkpoint = attach_golden(checkpoint, golden_image)
    line = save(path, checkpoint)
    _print_finding(args.foreign, finding, architecture)
    for note in describe_defaults(args):
        print(note)
    print(line)


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
    outputs = infer_architecture(state).out_channels
    family = finding.network.family
    if family.output == "softmax" and args.two_outputs == "border":
        raise CommandError(
            f"--two-outputs border: {family.name} applies a softmax to two outputs; leave it out"
        )
    if family.output != "softmax":  # otherwise two outputs have become one
        check_two_outputs(args, outputs)
    if outputs != 2:
        return state
    if args.two_outputs is None:
        raise CommandError(
            f"{args.foreign} has two outputs: set --two-outputs softmax (background and "
            "foreground) or --two-outputs border (foreground, and the border between objects)"
        )
    return replace_softmax(state) if args.two_outputs == "softmax" else state


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


def _window_values(args: argparse.Namespace, architecture: UNetConfig) -> dict[str, Any]:
    """The windows and their overlap, where they differ from the defaults."""
    values: dict[str, Any] = {}
    if args.window:
        values["window"] = read_windows(args)
        values["overlap"] = choose_overlap(values["window"])
    elif args.mode == "resize":
        values["window"] = ((512, 512),) if architecture.padding else ((572, 572),)
    elif not architecture.padding:
        values["window"] = ((380, 380), (572, 572))
    if args.mode == "resize" or not architecture.padding:
        values["overlap"] = 0  # there is one window, or no zero padding distorts its edge
    return values
