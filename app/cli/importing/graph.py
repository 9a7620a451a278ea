"""Import an ONNX graph: find out how it is used, and say what was found."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

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
from app.engine.inspection.facts import Finding, GraphOptions
from app.engine.inspection.inspect_graph import inspect_graph
from app.engine.predictor import engine_predictor
from app.engine.selection import build_engine, choose_engines
from model.arrays import Shape
from model.checkpoint import GRAPH_TENSOR, Checkpoint
from model.config import Activation, GraphConfig, PreprocessConfig
from model.convert.file_kinds import check_kind
from model.golden import draw_synthetic_image, make_golden
from model.graph import parse_graph, read_graph_file

_RESIZED: Shape = (512, 512)
"""Window of mode resize."""


def import_graph(args: argparse.Namespace, content: bytes | None = None) -> Path:
    """Make a checkpoint of the ONNX graph that the arguments name.

    Args:
        content: the graph, if the arguments name a package that contains it.

    Returns:
        The path of the checkpoint.

    Raises:
        UserError: the graph is not accepted, or the arguments do not fit.
    """
    path = choose_path(args)
    if args.divisor is not None and args.divisor < 1:
        raise CommandError(f"--divisor must be at least 1, not {args.divisor}")
    golden_image = read_golden_image(args)
    if content is None:
        check_kind(args.foreign)
        content = read_graph_file(args.foreign)
    model = parse_graph(content)
    finding = inspect_graph(
        model,
        content,
        _read_options(args),
        _default_windows(args),
        functools.partial(check_channels, args),
    )
    architecture, meaning = _choose_activation(args, finding)
    opset = max(each.version for each in model.opset_import)
    draft = Checkpoint(
        path.stem,
        architecture,
        make_preprocess(args, architecture, _window_values(args, finding)),
        {GRAPH_TENSOR: np.frombuffer(content, np.uint8)},
        card=make_card(args)
        | {"onnx": {"opset": opset, "sha256": hashlib.sha256(content).hexdigest()}},
    )
    (choice,) = choose_engines(device="cpu", engine="openvino", precision="fp32")
    predict = engine_predictor(build_engine(choice, draft), draft)
    if golden_image is None:
        golden_image = draw_synthetic_image(architecture.in_channels)
    golden = make_golden(golden_image, draft.preprocess, predict)
    line = save(path, dataclasses.replace(draft, golden=golden))
    producer = " ".join(filter(None, (model.producer_name, model.producer_version)))
    print(
        f"{args.foreign}: ONNX graph of {producer or 'an unnamed program'}, opset {opset}, "
        f"{len(model.graph.node)} nodes"
    )
    windows = _describe_windows(draft.preprocess)
    for note in (*finding.notes, meaning, windows, *describe_defaults(args)):
        print(note)
    print(line)
    return path


def _read_options(args: argparse.Namespace) -> GraphOptions:
    return GraphOptions(
        layout=args.layout,
        outputs=tuple(args.output or ()),
        values=args.activation,
        divisor=args.divisor,
        windows=read_windows(args),
    )


def _default_windows(args: argparse.Namespace) -> tuple[Shape, ...]:
    return (_RESIZED,) if args.mode == "resize" else PreprocessConfig().window


def _window_values(args: argparse.Namespace, finding: Finding) -> dict[str, Any]:
    """The windows, and their overlap."""
    has_seams = args.mode == "native" and not finding.config.margin
    overlap = choose_overlap(finding.windows) if has_seams else 0
    return {"window": finding.windows, "overlap": overlap}


def _choose_activation(args: argparse.Namespace, finding: Finding) -> tuple[GraphConfig, str]:
    """Choose what makes probabilities of the outputs.

    Returns:
        The description of the graph with it, and a line about it.

    Raises:
        CommandError: two channels can mean two things, and the arguments do not say which; or one
            channel cannot be what it is said to be.
    """
    config, values = finding.config, finding.values
    count = config.out_channels
    check_two_outputs(args, count)
    if count == 1 and values == "softmax":
        raise CommandError("a softmax over one channel is 1 everywhere; export the logits")
    if count == 2 and values != "softmax" and args.two_outputs is None:
        raise CommandError(
            f"{args.foreign} has two output channels: set --two-outputs softmax (background and "
            "foreground) or --two-outputs border (foreground, and the border between objects)"
        )
    if values == "softmax" and args.two_outputs == "border":
        raise CommandError("--two-outputs border: the outputs are a softmax, which are background "
                           "and foreground; leave it out")  # fmt: skip
    activation: Activation
    if count == 2 and (values == "softmax" or args.two_outputs == "softmax"):
        activation = "softmax" if values == "logits" else "none"
        config = dataclasses.replace(
            config, activation=activation, foreground_only=True, out_channels=1
        )
        return config, "probabilities: of the foreground, the second of two channels"
    if values != "logits":
        text = "probabilities: the output as it is"
        if count > 2 and values == "sigmoid":
            text += "; classes exclude each other here: a pixel's class is the largest output"
        return config, text
    activation = "sigmoid" if count <= 2 else "softmax"
    config = dataclasses.replace(config, activation=activation)
    return config, f"probabilities: {activation} of the output"


def _describe_windows(preprocess: PreprocessConfig) -> str:
    shapes = ", ".join(f"{height}x{width}" for height, width in preprocess.window)
    return f"windows: {shapes}; neighbours overlap by {preprocess.overlap} pixels"
