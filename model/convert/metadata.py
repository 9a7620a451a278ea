"""Text about a checkpoint for the metadata of files that other programs read.

Knows no file format and no torch.
"""

from __future__ import annotations

import json
from typing import Any

from model.checkpoint import Checkpoint


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    """List everything about a checkpoint that its network does not say.

    Returns:
        The preprocessing field by field, the meaning of the outputs, licence, data, and the sha256
        of the checkpoint's file. Text is plain, everything else JSON.
    """
    fields: dict[str, Any] = {
        "name": checkpoint.name,
        "outputs": name_outputs(checkpoint),
        **checkpoint.preprocess.to_json(),
        "licence": checkpoint.card.get("licence", "unknown"),
        "data": checkpoint.card.get("data", "unknown"),
        "checkpoint_sha256": checkpoint.sha256,
    }
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in fields.items()
    }


def name_outputs(checkpoint: Checkpoint) -> list[str]:
    """Name the channels of the probabilities."""
    classes = list(checkpoint.preprocess.classes)
    if not checkpoint.preprocess.binary:
        return classes
    return [classes[1], "border"][: checkpoint.architecture.out_channels]
