"""Array and shape types: the words in which every signature speaks of pixels. Knows NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
"""Decoded images: (H, W) or (H, W, 3), uint8 or uint16; or any array."""
BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]
"""Windows (N, h, w, C), and masks (H, W)."""
UInt16Array = npt.NDArray[np.uint16]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
LabelArray = npt.NDArray[np.integer[Any]]
"""(H, W): 0 is background; class indices, or 1..n, one per object."""
FloatArray = npt.NDArray[np.float32]
"""Probabilities (C, H, W), and what is computed from them."""
Probabilities = FloatArray | UInt16Array
"""(..., C, h, w) from an engine: float32 in 0..1, or uint16 in 0..65535, which halves the bytes and
keeps the mask at a threshold of 0.5 exactly: 0.5 lies between two of its values."""

Shape = tuple[int, int]
"""(height, width) in pixels."""
Color = tuple[int, int, int]
"""Red, green and blue, 0..255 each."""
