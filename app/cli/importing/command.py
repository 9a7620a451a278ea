"""`unet import`: convert a network of another program to a self-describing checkpoint.

A file does not say how the image becomes numbers, and sometimes not how the network pads or what
its outputs are. The arguments do; where no answer is likely, the command asks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from app.cli.errors import CommandError, reading
from app.cli.importing.options import check_options
from model.convert.bioimage_package import read_package
from model.files import check_regular

_WEIGHTS_FLAGS = ("weights", "base_features", "padding", "pooling", "half")
_GRAPH_FLAGS = ("layout", "output", "activation", "divisor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "foreign",
        type=Path,
        metavar="FILE",
        help="weights of torch or safetensors, an ONNX graph, or a package of bioimage.io",
    )
    parser.add_argument("--name", help="name of the model (default: that of --out, or of FILE)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("weights"),
        metavar="PATH",
        help="folder for the checkpoint, or the checkpoint itself, FILE.safetensors (default: "
        "weights)",
    )
    _add_network_arguments(parser)
    _add_graph_arguments(parser)
    _add_preprocessing_arguments(parser)
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="IMAGE",
        help="a typical image. The checkpoint contains it with its mask, which every engine must "
        "reproduce before it serves (default: a drawn image)",
    )
    parser.add_argument(
        "--licence", default="unknown", help="licence of the weights (default: unknown)"
    )
    parser.add_argument(
        "--data", default="unknown", help="origin of the training data (default: unknown)"
    )
    parser.add_argument(
        "--half", action="store_true", help="round the weights to fp16; this halves the file"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint of the same name"
    )


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--weights",
        metavar="KEYS",
        help="the network to import from a file that has several; the error message lists them "
        "(default: the running average, if there is exactly one)",
    )
    group.add_argument(
        "--base-features",
        type=int,
        metavar="N",
        help="the expected width of the network; another one in the file is an error",
    )
    group.add_argument(
        "--padding",
        type=int,
        choices=(0, 1),
        help="padding of the convolutions; 0 for the network of the paper (default: 1; required "
        "for jvanvugt/pytorch-unet)",
    )
    group.add_argument(
        "--pooling",
        choices=("max", "average"),
        help="how the network pools; required for jvanvugt/pytorch-unet, whose versions differ. "
        "Average pooling cannot be converted",
    )
    group.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="names of the classes, with or without the background (default: foreground, or class "
        "1, class 2, ... if there are several)",
    )
    group.add_argument(
        "--two-outputs",
        choices=("softmax", "border"),
        help="meaning of two output channels; the file does not say it. softmax: background and "
        "foreground; border: foreground, and the border between touching objects, with a sigmoid "
        "each",
    )


def _add_graph_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ONNX graph", "Found in the graph unless they are set.")
    group.add_argument("--layout", choices=("NCHW", "NHWC"), help="order of the input's axes")
    group.add_argument(
        "--output",
        nargs="+",
        metavar="NAME",
        help="name of the output to use; the channels of several are joined in this order",
    )
    group.add_argument(
        "--activation",
        choices=("logits", "sigmoid", "softmax"),
        help="values of the output: logits, or probabilities from a sigmoid or softmax inside the "
        "graph",
    )
    group.add_argument(
        "--divisor",
        type=int,
        metavar="N",
        help="height and width of every window must be multiples of N",
    )


def _add_preprocessing_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preprocessing")
    group.add_argument(
        "--mode",
        choices=("native", "resize"),
        default="native",
        help="native: windows at the image's own resolution; resize: the whole image is resized to "
        "one window (default: native)",
    )
    group.add_argument(
        "--window",
        nargs="+",
        metavar="HxW",
        help="heights and widths of the windows; only one with --mode resize",
    )
    group.add_argument(
        "--mean",
        nargs="+",
        type=float,
        metavar="X",
        help="mean of values in 0..1, for each channel, which is subtracted (default: 0)",
    )
    group.add_argument(
        "--std",
        nargs="+",
        type=float,
        metavar="X",
        help="standard deviation of values in 0..1, for each channel, which divides the result "
        "(default: 1)",
    )
    group.add_argument(
        "--intensity",
        choices=("range", "percentile"),
        default="range",
        help="what is scaled to 0..1. range: the range of the data type; percentile: the range "
        "between two percentiles of the image (default: range)",
    )
    group.add_argument(
        "--percentiles",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="percentiles that become 0 and 1 (default: 1 99.8). 0 100 are minimum and maximum",
    )


def main(args: argparse.Namespace) -> int:
    with reading(args.foreign):
        check_regular(args.foreign)
    check_options(args)
    package = read_package(args.foreign)
    if package is not None:
        _reject_flags(args, _WEIGHTS_FLAGS, "does not apply to an ONNX graph")
        from app.cli.importing.package import import_package

        import_package(args, package)
    elif _is_graph(args.foreign):
        _reject_flags(args, _WEIGHTS_FLAGS, "does not apply to an ONNX graph")
        from app.cli.importing.graph import import_graph

        import_graph(args)
    else:
        _reject_flags(args, _GRAPH_FLAGS, "applies to ONNX graphs alone")
        from app.cli.importing.weights import import_weights

        import_weights(args)
    return 0


def _is_graph(path: Path) -> bool:
    """Whether a file is an ONNX graph, by its name or its first bytes.

    A graph is a protocol buffer: field 1 (the version of the format), then one of the fields 2, 5,
    7 or 8. The ninth byte of a safetensors file is a brace.
    """
    with reading(path), path.open("rb") as file:
        start = file.read(9)
    if path.suffix.lower() == ".onnx":
        return True
    return len(start) == 9 and start[0] == 0x08 and start[2] in b"\x12\x28\x3a\x42" != start[8:]


def _reject_flags(args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """Raise CommandError if one of the flags is set."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False:
            raise CommandError(f"--{name.replace('_', '-')} {reason}")
