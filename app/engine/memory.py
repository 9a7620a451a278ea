"""Memory in use on a CUDA device. Imports torch only when called."""

from __future__ import annotations

import math


def used_bytes(device: str) -> float:
    """Read how many bytes all processes use on "cuda:N"; NaN when the device is lost."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # one metric must not make the others fail
        return math.nan
    return float(total - free)
