"""Write a checkpoint as a package of bioimage.io, and let bioimageio.core test it.

The package has the ONNX graph, its description (`rdf.yaml`), test tensors of the golden image, a
cover, and a README. Its format is version 0.5 of the model description:
https://bioimage-io.github.io/spec-bioimage-io/. Knows no arguments of the command.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from app.cli.errors import CommandError, writing
from app.imaging.render import overlay
from model.arrays import AnyArray, ByteArray, FloatArray
from model.checkpoint import Checkpoint, write_atomically
from model.config import DIVISOR
from model.convert.export import export_onnx
from model.convert.metadata import describe_checkpoint, name_outputs
from model.convert.onnx import INPUT, OPSET, OUTPUT
from model.errors import ExportError
from model.predict import build_network
from model.transforms import normalize, prepare, probabilities, stretch_contrast
from model.windows import plan_windows

PAPER = {
    "text": "Ronneberger, O., Fischer, P., Brox, T.: U-Net: Convolutional Networks for Biomedical "
    "Image Segmentation. MICCAI 2015",
    "doi": "10.1007/978-3-319-24574-4_28",
}
_EPSILON = 1e-6
"""Added to the range between the percentiles by the operator `scale_range`."""
_OFFSET = 0.001
"""Added to values 0..255 between percentiles, so that halves are rounded up, as in the service. In
images of 8 bits, other values are at least 0.0019 below a half."""


def write_package(
    checkpoint: Checkpoint, path: Path, authors: Sequence[str], licence: str
) -> list[str]:
    """Write the package if it passes the test of bioimageio.core.

    Args:
        path: of the zip file.
        authors: of the weights.
        licence: of the weights, an id of SPDX.

    Returns:
        The names of the tests that passed.

    Raises:
        ExportError: the test fails; the message has the first error.
        CommandError: the file cannot be written.
    """
    image = _make_test_image(checkpoint)
    expected = compute_reference(checkpoint, image)
    onnx, _ = export_onnx(checkpoint, "float32")
    files = {
        "weights.onnx": onnx,
        "test_input.npy": _save_array(image.transpose(2, 0, 1)[None].astype(np.float32)),
        "test_output.npy": _save_array(expected),
        "cover.png": _draw_cover(checkpoint),
        "README.md": _write_readme(checkpoint).encode(),
        # JSON is YAML
        "rdf.yaml": json.dumps(_describe_model(checkpoint, authors, licence)).encode(),
    }
    content = _zip(files)
    passed = _test_package(content)
    with writing(path):
        write_atomically(path, content)
    return passed


def choose_licence(checkpoint: Checkpoint, licence: str | None) -> str:
    """Return the SPDX identifier of the weights' licence: `licence`, or what the card begins with.

    Raises:
        CommandError: it is not an identifier of SPDX.
    """
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    stated = str(checkpoint.card.get("licence", "unknown"))
    found = licence or re.split(r"[(;,]", stated)[0].strip()
    try:
        return canonicalize_license_expression(found)
    except InvalidLicenseExpression as error:
        if licence:
            message = f"--licence {licence}: not an identifier of SPDX, such as MIT or CC-BY-4.0"
        else:
            message = (
                "--bioimageio needs --licence ID, an identifier of SPDX such as MIT or CC-BY-4.0; "
                f"the checkpoint says {stated!r}"
            )
        raise CommandError(message) from error


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def _test_package(content: bytes) -> list[str]:
    """Run the test of bioimageio.core on a package.

    Returns:
        The tests that passed.

    Raises:
        ExportError: one failed.
    """
    from bioimageio.core import test_description
    from loguru import logger

    logger.disable("bioimageio")  # it logs each step to standard error
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # bioimageio.core does not close files
        with zipfile.ZipFile(io.BytesIO(content)) as package:
            package.extractall(folder)
        description = Path(folder) / "rdf.yaml"
        summary = test_description(description, expected_type="model", devices=["cpu"])
    if summary.status != "passed":
        (first, *_) = [error.msg for detail in summary.details for error in detail.errors]
        raise ExportError(f"the test of bioimageio.core fails: {first.strip().splitlines()[0]}")
    return [detail.name for detail in summary.details]


def _describe_model(checkpoint: Checkpoint, authors: Sequence[str], licence: str) -> dict[str, Any]:
    """The content of rdf.yaml."""
    classes = checkpoint.preprocess.classes
    return {
        "type": "model",
        "format_version": "0.5.12",
        "name": "U-Net " + re.sub(r"[^A-Za-z0-9_+\- ()]", "-", checkpoint.name),
        "description": f"U-Net that segments {', '.join(classes[1:])}. Takes values 0..255 and "
        "returns probabilities; normalization is inside.",
        "authors": [{"name": each} for each in authors],
        "license": licence,
        "cite": [PAPER],
        "tags": ["unet", "semantic-segmentation", "2d", *(each.lower() for each in classes[1:])],
        "covers": [{"source": "cover.png"}],
        "documentation": {"source": "README.md"},
        "inputs": [_describe_input(checkpoint)],
        "outputs": [_describe_output(checkpoint)],
        "weights": {"onnx": {"source": "weights.onnx", "opset_version": OPSET}},
        "config": {"unet_server": describe_checkpoint(checkpoint)},
    }


def _describe_input(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.preprocess
    channels = len(config.mean)
    names = ["red", "green", "blue"] if channels == 3 else [f"channel{i}" for i in range(channels)]
    shortest = [min(shape[axis] for shape in config.window) for axis in (0, 1)]
    sizes: list[Any] = [{"min": length, "step": DIVISOR} for length in shortest]
    if config.mode == "resize":
        sizes = shortest
    tensor: dict[str, Any] = {
        "id": INPUT,
        "description": "RGB; a grey image three times" if channels == 3 else "",
        "axes": [
            {"type": "batch"},
            {"type": "channel", "channel_names": names},
            *(
                {"type": "space", "id": axis, "size": size}
                for axis, size in zip("yx", sizes, strict=True)
            ),
        ],
        "data": {"type": "float32", "range": [0, 255]},
        "test_tensor": {"source": "test_input.npy"},
    }
    if config.intensity == "percentile":
        low, high = config.percentiles
        kwargs = {
            "axes": ["channel", "y", "x"],
            "min_percentile": low,
            "max_percentile": high,
            "eps": _EPSILON,
        }
        tensor["data"] = {"type": "float32"}
        tensor["preprocessing"] = [
            {"id": "scale_range", "kwargs": kwargs},
            {"id": "scale_linear", "kwargs": {"gain": 255.0, "offset": _OFFSET}},
        ]
    return tensor


def _describe_output(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tools that cut an image into tiles leave out a halo, as wide as half the overlap here."""
    margin = checkpoint.unet.margin
    halo = 0 if checkpoint.preprocess.mode == "resize" else checkpoint.preprocess.overlap // 2
    axes: list[dict[str, Any]] = []
    for axis in "yx":
        size = {"tensor_id": INPUT, "axis_id": axis, "offset": -2 * margin}
        axes.append({"type": "space", "id": axis, "size": size, **({"halo": halo} if halo else {})})
    return {
        "id": OUTPUT,
        "description": "sigmoid of each channel" if checkpoint.preprocess.binary else "softmax",
        "axes": [
            {"type": "batch"},
            {"type": "channel", "channel_names": name_outputs(checkpoint)},
            *axes,
        ],
        "data": {"type": "float32", "range": [0, 1]},
        "test_tensor": {"source": "test_output.npy"},
    }


def _make_test_image(checkpoint: Checkpoint) -> AnyArray:
    """Make the first window of the golden image, before percentiles: (H, W, C)."""
    config, image = checkpoint.preprocess, checkpoint.golden.image
    if config.intensity == "percentile" and config.mode == "native":
        pixels = image if image.ndim == 3 else image[:, :, None]
        pixels = np.broadcast_to(pixels, (*image.shape[:2], len(config.mean)))
    else:
        pixels = prepare(image, config)
    plan = plan_windows(pixels.shape[0], pixels.shape[1], checkpoint.unet, config)
    window = plan.windows[0]
    cut = np.empty((*window.shape, pixels.shape[2]), pixels.dtype)
    plan.cut(pixels, window, out=cut)
    return cut


def compute_reference(checkpoint: Checkpoint, image: AnyArray) -> FloatArray:
    """Compute what the package must return for an image (H, W, C), by torch: (1, C, H', W').

    Percentiles are those of the operator `scale_range`, which interpolates between values.
    """
    config = checkpoint.preprocess
    values = image.astype(np.float64)
    if config.intensity == "percentile":
        low, high = np.percentile(values, config.percentiles)
        values = (values - low) / (high - low + _EPSILON) * 255 + _OFFSET
    pixels = np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)
    with torch.inference_mode():
        logits = build_network(checkpoint).eval()(normalize(torch.from_numpy(pixels)[None], config))
        return probabilities(logits, config).numpy()


def _save_array(array: AnyArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    return buffer.getvalue()


def _draw_cover(checkpoint: Checkpoint) -> bytes:
    """Draw the golden image, and beside it the same with its mask, as PNG."""
    golden, config = checkpoint.golden, checkpoint.preprocess
    shown: ByteArray = golden.image
    if golden.image.dtype != np.uint8 or config.intensity == "percentile":
        shown = stretch_contrast(golden.image, config.percentiles)
    tinted = overlay(shown, golden.mask)
    plain = overlay(shown, np.zeros_like(golden.mask))
    cover = Image.fromarray(np.hstack([plain, tinted]))
    cover.thumbnail((1024, 512))
    buffer = io.BytesIO()
    cover.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write_readme(checkpoint: Checkpoint) -> str:
    """Write the README: what goes in and out, and the scores of the card."""
    fields = describe_checkpoint(checkpoint)
    lines = [
        f"# {checkpoint.name}",
        "",
        "The graph takes values 0..255 and returns probabilities. The description (`rdf.yaml`) has "
        "the steps before it.",
        "",
        *(f"- {name}: {value}" for name, value in fields.items()),
        "",
        "## Validation",
        "",
    ]
    metrics = checkpoint.card.get("metrics") or {}
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    lines += [f"- {name}: {value:.4g}" for name, value in numbers.items()]
    lines += [] if numbers else ["No scores are recorded."]
    return "\n".join(lines) + "\n"
