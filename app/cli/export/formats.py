"""Write a checkpoint for other programs: ONNX, OpenVINO, a state dict, a bioimage.io package.

Every file is complete and checked before it gets its name, so a failure leaves none.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from app.cli.errors import CommandError, check_destination, writing
from model.arrays import ByteArray, FloatArray
from model.checkpoint import Checkpoint, write_atomically
from model.config import GOLDEN_IOU, UNetConfig


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the formats."""
    group = parser.add_argument_group("formats of other programs")
    group.add_argument(
        "--onnx", type=Path, metavar="FILE.onnx", help="write the graph as ONNX, in fp32"
    )
    group.add_argument(
        "--pixels",
        choices=("uint8", "float32"),
        help="input of the ONNX graph: uint8 (N, H, W, C), or float32 (N, C, H, W) with values "
        "0..255 (default: uint8)",
    )
    group.add_argument(
        "--openvino",
        type=Path,
        metavar="FOLDER",
        help="write the graph for OpenVINO to FOLDER/NAME.xml and .bin, or to FILE.xml",
    )
    group.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        help="precision of the weights in the OpenVINO graph; fp16 halves the file (default: fp32)",
    )
    group.add_argument(
        "--state-dict",
        type=Path,
        metavar="FILE",
        help="write the state dict in fp32, as .safetensors, or as .pt or .pth of torch",
    )
    group.add_argument(
        "--bioimageio",
        type=Path,
        metavar="FILE.zip",
        help="write a package of bioimage.io with the ONNX graph; it must pass the test of "
        "bioimageio.core",
    )
    group.add_argument(
        "--author", nargs="+", metavar="NAME", help="authors of the weights (--bioimageio)"
    )
    group.add_argument(
        "--licence",
        metavar="ID",
        help="licence of the weights as an SPDX identifier (--bioimageio; default: that of the "
        "checkpoint)",
    )


def plan_exports(args: argparse.Namespace) -> list[Callable[[Checkpoint], None]]:
    """Check what the arguments ask to write, before a long computation.

    Returns:
        A function for each file.

    Raises:
        CommandError: a name has another ending, or a file exists and may not be replaced.
        ModuleNotFoundError: a package is not installed.
    """
    if args.pixels and not args.onnx:
        raise CommandError("--pixels needs --onnx FILE")
    if args.precision and not args.openvino:
        raise CommandError("--precision needs --openvino FOLDER")
    if (args.author or args.licence) and not args.bioimageio:
        raise CommandError("--author and --licence need --bioimageio FILE.zip")
    exports: list[tuple[Path, Callable[..., None], dict[str, Any]]] = []
    if args.onnx:
        _check_ending("--onnx", args.onnx, ".onnx")
        importlib.import_module("onnxruntime")
        exports.append((args.onnx, write_onnx, {"pixels": args.pixels or "uint8"}))
    if args.openvino:
        path = _find_graph_path(args.openvino, (args.out or args.checkpoint).stem)
        exports.append((path, write_openvino, {"precision": args.precision or "fp32"}))
    if args.state_dict:
        _check_ending("--state-dict", args.state_dict, ".safetensors", ".pt", ".pth")
        exports.append((args.state_dict, write_state_dict, {}))
    if args.bioimageio:
        _check_ending("--bioimageio", args.bioimageio, ".zip")
        if not args.author:
            raise CommandError("--bioimageio needs --author NAME, who made the weights")
        for package in ("onnxruntime", "bioimageio.core"):
            importlib.import_module(package)
        options = {"authors": args.author, "licence": args.licence}
        exports.append((args.bioimageio, write_bioimageio, options))
    for path, _, _ in exports:
        _check_file(path, args)
        folder = path.parent
        if path.suffix == ".xml":
            _check_file(path.with_suffix(".bin"), args)
            folder = folder if folder.exists() else folder.parent  # one folder may be missing
        if not folder.is_dir():
            raise CommandError(f"{path} cannot be written: {folder} is not a folder")
    return [functools.partial(write, path=path, **options) for path, write, options in exports]


def _check_ending(flag: str, path: Path, *endings: str) -> None:
    if path.suffix not in endings:
        raise CommandError(f"{flag} {path}: the file's name ends with {' or '.join(endings)}")


def _find_graph_path(path: Path, name: str) -> Path:
    """The .xml file to write: `path` itself, or NAME.xml in the folder `path`."""
    if path.suffix == ".xml":
        return path
    if path.suffix in (".onnx", ".bin") or path.is_file():
        raise CommandError(
            f"--openvino {path}: give a folder, or a file that ends with .xml (and .bin beside it)"
        )
    return path / f"{name}.xml"


def _check_file(path: Path, args: argparse.Namespace) -> None:
    """Check that an export does not replace a file without --force, and the checkpoint never."""
    with writing(path):
        if path.exists() and path.samefile(args.checkpoint):
            raise CommandError(f"{path} is the checkpoint itself; choose another name")
    check_destination(path, args.force)


def write_onnx(checkpoint: Checkpoint, path: Path, pixels: Literal["uint8", "float32"]) -> None:
    """Write the ONNX graph, and print the shapes of its tensors."""
    from model.convert.export import export_onnx

    content, difference = export_onnx(checkpoint, pixels)
    with writing(path):
        write_atomically(path, content)
    print(
        f"{path}: {_describe_tensors(checkpoint.unet, pixels)}; weights in fp32; within "
        f"{difference:.1e} of the reference in ONNX Runtime"
    )


def write_openvino(checkpoint: Checkpoint, path: Path, precision: Literal["fp32", "fp16"]) -> None:
    """Write the graph for OpenVINO with weights in `precision`, and print its tensors.

    The .xml is written last: a program that waits for it finds the .bin.
    """
    import openvino as ov

    from app.engine.openvino import build_graph
    from model.convert.metadata import describe_checkpoint

    graph = build_graph(checkpoint.unet, checkpoint.preprocess, checkpoint.state)
    graph.outputs[0].get_tensor().set_names({"probabilities"})
    for key, value in describe_checkpoint(checkpoint).items():
        graph.set_rt_info(value, ["unet", key])
    with writing(path):
        if not path.parent.exists() and path.parent.parent.is_dir():
            path.parent.mkdir()
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        part = Path(folder) / path.name
        try:
            # the default rounds the weights to fp16
            ov.save_model(graph, part, compress_to_fp16=precision == "fp16")
        except RuntimeError as error:
            raise OSError(f"OpenVINO: {str(error).strip().splitlines()[-1]}") from error
        iou = _check_openvino(checkpoint, part, precision)
        part.with_suffix(".bin").replace(path.with_suffix(".bin"))
        part.replace(path)
    print(
        f"{path}: {_describe_tensors(checkpoint.unet, 'uint8')}; weights in {precision}; "
        f"golden mask with IoU {iou:.4f}"
    )


def write_state_dict(checkpoint: Checkpoint, path: Path) -> None:
    """Write the state dict in fp32."""
    from model.convert.export import export_state_dict

    architecture = checkpoint.unet
    content = export_state_dict(checkpoint, path.suffix)
    with writing(path):
        write_atomically(path, content)
    print(
        f"{path}: {len(checkpoint.state)} tensors in fp32 with the names of the annotated "
        f"implementation, for UNet({architecture.in_channels}, {architecture.out_channels}) with "
        f"{architecture.base_features} base features"
    )


def write_bioimageio(
    checkpoint: Checkpoint, path: Path, authors: Sequence[str], licence: str | None
) -> None:
    """Write the package of bioimage.io, and print what bioimageio.core tested."""
    from app.cli.export.bioimage import choose_licence, write_package

    licence = choose_licence(checkpoint, licence)
    passed = write_package(checkpoint, path, authors, licence)
    print(
        f"{path}: package of bioimage.io with ONNX weights in fp32, licence {licence}; it passes "
        f"the {len(passed)} tests of bioimageio.core"
    )


def _check_openvino(
    checkpoint: Checkpoint, path: Path, precision: Literal["fp32", "fp16"]
) -> float:
    """Run a written graph on the golden image.

    Returns:
        The IoU with the golden mask.

    Raises:
        CommandError: it is less than an engine needs.
    """
    from app.engine.openvino_core import shared_core
    from model.evaluation.metrics import Overlap
    from model.sliding_window import sliding_window_inference
    from model.transforms import to_mask

    core = shared_core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def compute(window: ByteArray) -> FloatArray:
        (result,) = compiled([window]).values()
        return np.array(result, np.float32)

    golden = checkpoint.golden
    found = sliding_window_inference(golden.image, checkpoint.unet, checkpoint.preprocess, compute)
    iou = Overlap.of_classes(to_mask(found, checkpoint.preprocess), golden.mask).iou
    if iou < GOLDEN_IOU:
        hint = "; try --precision fp32" if precision == "fp16" else ""
        raise CommandError(
            f"{checkpoint.name} in {precision} does not reproduce its golden mask: IoU {iou:.3f}, "
            f"at least {GOLDEN_IOU} is required{hint}"
        )
    return iou


def _describe_tensors(architecture: UNetConfig, pixels: Literal["uint8", "float32"]) -> str:
    """Name the tensors of a graph, with type and shape."""
    channels = architecture.in_channels
    layout = f"(N, H, W, {channels})" if pixels == "uint8" else f"0..255 (N, {channels}, H, W)"
    lost = f" - {2 * architecture.margin}" if architecture.margin else ""
    return (
        f"image, {pixels} {layout}, to probabilities, float32 "
        f"(N, {architecture.out_channels}, H{lost}, W{lost})"
    )
