"""Convert a checkpoint to files of other programs: an ONNX graph or a state dict.

The graph is compared with the reference. Results are bytes; the caller writes them. Knows no
command line.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np

from model.arrays import AnyArray, ByteArray, FloatArray
from model.checkpoint import Checkpoint
from model.convert.metadata import describe_checkpoint
from model.convert.onnx import INPUT, Pixels, build_onnx
from model.errors import ExportError
from model.sliding_window import sliding_window_inference

MAX_DIFFERENCE = 1e-4
"""Most by which a probability of an exported graph may differ from the reference."""


def export_onnx(checkpoint: Checkpoint, pixels: Pixels = "uint8") -> tuple[bytes, float]:
    """Build the ONNX file of a checkpoint, and compare it with the reference on the golden image.

    Returns:
        The file, and the largest difference of its probabilities from those of the reference.

    Raises:
        ExportError: the weights are too large, or a probability differs by more than
            `MAX_DIFFERENCE`.
    """
    content = build_onnx(checkpoint, pixels).SerializeToString()
    difference = _measure_difference(checkpoint, load_onnx(content, pixels))
    if not difference <= MAX_DIFFERENCE:  # true for NaN
        raise ExportError(
            f"{checkpoint.name}: the probabilities of ONNX Runtime differ from the reference by up "
            f"to {difference:.1e} on the golden image; at most {MAX_DIFFERENCE} is accepted"
        )
    return content, difference


def load_onnx(content: bytes, pixels: Pixels) -> Callable[[ByteArray], FloatArray]:
    """Load a graph of `build_onnx` into ONNX Runtime.

    Returns:
        A function that runs it: (N, H, W, C) uint8 -> (N, out_channels, H', W').
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of GPUs that it does not find
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

    def compute(window: AnyArray) -> FloatArray:
        if pixels == "float32":
            window = np.ascontiguousarray(window.transpose(0, 3, 1, 2), np.float32)
        (result,) = session.run(None, {INPUT: window})
        return np.asarray(result, np.float32)

    return compute


def _measure_difference(
    checkpoint: Checkpoint, compute: Callable[[ByteArray], FloatArray]
) -> float:
    """Largest difference from the reference's probabilities of the golden image."""
    from model.predict import Predictor

    image = checkpoint.golden.image
    found = sliding_window_inference(image, checkpoint.unet, checkpoint.preprocess, compute)
    return float(np.abs(found - Predictor.of(checkpoint)(image)).max())


def export_state_dict(checkpoint: Checkpoint, suffix: str) -> bytes:
    """Build a state dict in fp32 under the names of the annotated implementation (labml.ai).

    Args:
        suffix: ".safetensors", whose header gets the fields of `describe_checkpoint`; otherwise a
            file of `torch.save`.
    """
    if suffix == ".safetensors":
        from safetensors.numpy import save

        arrays = {
            name: np.ascontiguousarray(array, np.float32)
            for name, array in checkpoint.state.items()
        }
        return save(arrays, metadata={"format": "pt", **describe_checkpoint(checkpoint)})
    import torch

    from model.predict import load_tensors

    buffer = io.BytesIO()
    torch.save(load_tensors(checkpoint), buffer)
    return buffer.getvalue()
