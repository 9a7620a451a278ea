"""How much memory of a CUDA device is in use. Imports torch only when asked."""

from __future__ import annotations

import math


def used_bytes(device: str) -> float:
    """In use on "cuda:N", by whomever, as the driver counts; NaN when the device is lost."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # a metric must not take the others with it
        return math.nan
    return float(total - free)
