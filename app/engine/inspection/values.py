"""Find out what the values of an ONNX graph's outputs are: logits, or probabilities.

The last operators say it, and the values of random pixels must agree. Knows no shapes of windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto

from app.engine.inspection.facts import GraphOptions, Values
from app.engine.inspection.running import TOLERANCE
from model.arrays import FloatArray
from model.config import GraphConfig
from model.errors import CheckpointError

_KEEPS_RANGE = {"Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Reshape", "Slice",
                "Resize", "Upsample", "Concat"}  # fmt: skip
"""Operators that leave probabilities probabilities."""
_LINEAR = {"Conv", "ConvTranspose", "Add", "MatMul", "Gemm", "BatchNormalization"}
"""Operators whose values are logits, also where all of them happen to lie between 0 and 1."""
_ENDINGS: dict[str, Values] = {
    "Sigmoid": "sigmoid",
    "HardSigmoid": "sigmoid",
    "Softmax": "softmax",
}


def find_values(
    model: ModelProto, config: GraphConfig, outputs: Sequence[FloatArray], options: GraphOptions
) -> tuple[Values, str]:
    """Find out what the outputs are, and how that is known.

    Raises:
        CheckpointError: they are not what the user says, or it is not clear what they are.
    """
    low = min(float(each.min()) for each in outputs)
    high = max(float(each.max()) for each in outputs)
    if not math.isfinite(low) or not math.isfinite(high):
        raise CheckpointError("the graph returns values that are not finite for random pixels")
    seen = f"{low:.3g} to {high:.3g} for random pixels"
    are_probabilities = low >= -TOLERANCE and high <= 1 + TOLERANCE
    endings = {_find_ending(model, name) for name in config.outputs}
    if options.values is not None:
        if options.values != "logits" and not are_probabilities:
            raise CheckpointError(
                f"--activation {options.values}: the values are {seen}, which are not probabilities"
            )
        return options.values, f"as set; {seen}"
    ending = min(endings)
    if len(endings) > 1:
        raise CheckpointError(f"the outputs end in {', '.join(sorted(endings))}; set --activation")
    if ending == "Softmax" and not _sum_to_one(outputs, config):
        raise CheckpointError(
            "the graph ends in a softmax that is not over its channels; set --activation"
        )
    if ending in _ENDINGS and are_probabilities:
        return _ENDINGS[ending], f"the graph ends in {ending}; {seen}"
    if ending not in _LINEAR and are_probabilities:
        raise CheckpointError(
            f"the values of the output are {seen}, but the graph does not end in a sigmoid or "
            "softmax; set --activation to logits, sigmoid or softmax"
        )
    return "logits", f"the graph ends in {ending}; {seen}"


def _sum_to_one(outputs: Sequence[FloatArray], config: GraphConfig) -> bool:
    """Whether the values of each pixel have a sum of 1."""
    if "C" not in config.output_layout:
        return False
    axis = config.output_layout.index("C")
    sums = np.concatenate(outputs, axis).sum(axis)
    return bool(np.abs(sums - 1).max() < TOLERANCE)


def _find_ending(model: ModelProto, name: str) -> str:
    """The last operator that changes the values of an output."""
    makers = {output: node for node in model.graph.node for output in node.output}
    for _ in range(len(model.graph.node)):
        node = makers.get(name)
        if node is None:
            break
        if node.op_type not in _KEEPS_RANGE or not node.input:
            return str(node.op_type)
        name = node.input[0]
    return "Identity"
