"""`unet serve` with an engine that fails on a window that is all white, as FAULT says.

hang: never returns · lost: the device is gone · nan: not a number · error: it raises ·
memory: out of memory for more than two windows at once · slow: 0.1 s per batch, for all windows ·
load: loading a model never ends
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from app import cli
from app.engine.openvino import OpenVinoEngine
from app.errors import DeviceLost, EngineError, OutOfMemory

FAULT = os.environ["FAULT"]
run = OpenVinoEngine.run


def faulty(self: OpenVinoEngine, windows: np.ndarray) -> Any:
    if FAULT == "slow":
        time.sleep(0.1)
    if FAULT == "memory" and len(windows) > 2:
        raise OutOfMemory("no room for more than two")
    result = run(self, windows)
    if any(window.min() == 255 for window in windows):
        match FAULT:
            case "hang":
                time.sleep(3600)
            case "lost":
                raise DeviceLost("an illegal memory access was encountered")
            case "error":
                raise EngineError("secret of the engine")
            case "nan":
                result = np.full_like(result, np.nan)
    return result


def never_warm(self: OpenVinoEngine) -> None:
    time.sleep(3600)


OpenVinoEngine.run = faulty  # type: ignore[method-assign]
if FAULT == "load":
    OpenVinoEngine.warm = never_warm  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(cli.main())
