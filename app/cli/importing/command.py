"""`unet import`: convert a network of another program to a self-describing checkpoint.

A file does not say how the image becomes numbers, and sometimes not how the network pads or what
its outputs are. The arguments do; where no answer is likely, the command asks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from app.cli.errors import CommandError, reading
from model.convert.bioimage_package import read_package
from model.files import check_regular

_WEIGHTS_FLAGS = ("weights", "base_features", "padding", "pooling", "half")
_GRAPH_FLAGS = ("layout", "output", "activation", "divisor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "foreign", type=Path, help="weights of torch or safetensors, or an ONNX graph"
    )
    parser.add_argument("--name", help="name of the model (default: that of the file)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("weights"),
        help="folder of the checkpoint, or its file (default: weights)",
    )
    _add_network_arguments(parser)
    _add_graph_arguments(parser)
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
        help="meaning of two output channels, which a file does not contain. softmax: background "
        "and foreground; border: foreground, and the border between touching objects, one sigmoid "
        "each",
    )


def _add_graph_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ONNX graph", "what is found in the graph is the default")
    group.add_argument("--layout", choices=("NCHW", "NHWC"), help="axes of the input")
    group.add_argument(
        "--output",
        nargs="+",
        metavar="NAME",
        help="output to use; the channels of several become one output, in this order",
    )
    group.add_argument(
        "--activation",
        choices=("logits", "sigmoid", "softmax"),
        help="what the output is: logits, or probabilities by a sigmoid or softmax in the graph",
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
    with reading(args.foreign):
        check_regular(args.foreign)
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
