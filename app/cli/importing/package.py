"""Import a package of bioimage.io with an ONNX graph: its description answers for the flags.

A flag that is set wins over the description.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from app.cli.importing.graph import import_graph
from app.engine.predictor import engine_predictor
from app.engine.selection import build_engine, choose_engines
from model.checkpoint import Checkpoint, load_checkpoint
from model.config import GraphConfig
from model.convert.bioimage_package import Package, read_own_field
from model.errors import CheckpointError


def import_package(args: argparse.Namespace, package: Package) -> None:
    """Make a checkpoint of a package, and compare it with the package's test output.

    Raises:
        UserError: the graph is not accepted, or neither the description nor the arguments say how
            its values are made.
    """
    _set_preprocessing(args, package)
    _set_shapes(args, package)
    _set_outputs(args, package)
    if args.licence == "unknown":
        args.licence = package.licence
    if args.data == "unknown":
        args.data = package.data
    with tempfile.TemporaryDirectory() as folder:
        if args.golden is None and package.image is not None:
            args.golden = Path(folder) / "golden.npy"
            np.save(args.golden, package.image)
        path = import_graph(args, package.graph)
    _print_comparison(load_checkpoint(path), package)


def _set_preprocessing(args: argparse.Namespace, package: Package) -> None:
    """Set --intensity, --percentiles, --mean and --std, unless one of them is set."""
    if args.mean or args.std or args.percentiles or args.intensity != "range":
        return
    steps = package.preprocessing
    if steps.problem:
        raise CheckpointError(
            f"{args.foreign}: {steps.problem}, which cannot be converted; to use another "
            "preprocessing, set --mean and --std, or --intensity percentile"
        )
    args.mean, args.std = list(steps.mean), list(steps.std)
    if steps.percentiles:
        args.intensity, args.percentiles = "percentile", list(steps.percentiles)


def _set_shapes(args: argparse.Namespace, package: Package) -> None:
    if read_own_field(package.own, "mode") is None and package.own.get("mode") == "resize":
        args.mode = "resize"
    windows = read_own_field(package.own, "window")
    if args.window is None and windows:
        args.window = [f"{height}x{width}" for height, width in windows]
    elif args.window is None and package.size:
        args.window = ["{}x{}".format(*package.size)]
    if args.divisor is None:
        args.divisor = package.divisor
    if args.layout is None and package.channel_last:
        args.layout = "NHWC"


def _set_outputs(args: argparse.Namespace, package: Package) -> None:
    if args.activation is None and package.is_activated:
        args.activation = "logits"
    classes = read_own_field(package.own, "classes")
    if args.classes is None:
        args.classes = classes or list(package.classes) or None
    outputs = read_own_field(package.own, "outputs")
    if args.two_outputs is None and outputs is not None and len(outputs) == 2:
        args.two_outputs = "border"


def _print_comparison(checkpoint: Checkpoint, package: Package) -> None:
    """Print how far the probabilities of the test input are from the test output."""
    expected, image = package.expected, package.image
    if expected is None or image is None or expected.shape[1:] != image.shape[:2]:
        return
    if expected.min() < 0 or expected.max() > 1:
        return  # not probabilities
    assert isinstance(checkpoint.architecture, GraphConfig)
    if checkpoint.architecture.foreground_only:
        expected = expected[1:]
    (choice,) = choose_engines(device="cpu", engine="openvino", precision="fp32")
    found = engine_predictor(build_engine(choice, checkpoint), checkpoint)(image)
    if found.shape != expected.shape:
        return
    difference = np.abs(found - expected)
    print(
        f"test tensors of the package: probabilities differ by {difference.mean():.1e} on average, "
        f"by {difference.max():.1e} at most"
    )
