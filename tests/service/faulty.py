"""`unet serve` with an engine that fails. The variable FAULT names the fault.

For windows that are all white: hang (it never returns), lost (the device is gone), nan (the result
is not a number), error (it raises). For all windows: memory (out of memory for batches of more than
two), slow (a tenth of a second per batch). For a device that has been idle for a second: idle loss,
idle hang. For the start: load (loading a model never ends), no room (the device cannot hold the
model). For the end: stuck (like hang, and a thread that the event loop waits for does not end
either).
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from app import cli
from app.engine.base import check_finite
from app.engine.openvino import OpenVinoEngine
from app.errors import DeviceLost, EngineError, OutOfMemory
from app.inference.service import Service

FAULT = os.environ["FAULT"]
collect = OpenVinoEngine.collect
last_batch = math.inf


def collect_with_fault(self: OpenVinoEngine, windows: np.ndarray) -> Any:
    global last_batch
    last_batch = time.monotonic()
    if FAULT == "slow":
        time.sleep(0.1)
    if FAULT == "memory" and len(windows) > 2:
        raise OutOfMemory("not enough memory for more than two windows")
    result = collect(self, windows)
    if any(window.min() == 255 for window in windows):
        match FAULT:
            case "hang" | "stuck":
                time.sleep(3600)
            case "lost":
                raise DeviceLost("an illegal memory access was encountered")
            case "error":
                raise EngineError("secret of the engine")
            case "nan":
                check_finite(np.full_like(result, np.nan))
    return result


async def stop_never(self: Service) -> None:
    await asyncio.to_thread(time.sleep, 3600)


def warm_forever(self: OpenVinoEngine) -> Iterator[Callable[[], None]]:
    yield lambda: time.sleep(3600)


def build_without_room(self: OpenVinoEngine, *_: object, **__: object) -> None:
    raise OutOfMemory("cuda:0: CUDA out of memory. Tried to allocate 62.00 MiB.")


def check_with_fault(self: OpenVinoEngine) -> float:
    if time.monotonic() < last_batch + 1:
        return 0.0
    if FAULT == "idle hang":
        time.sleep(3600)
    raise DeviceLost("cuda:0: CUDA error: the device fell off the bus")


if FAULT == "no room":
    OpenVinoEngine.__init__ = build_without_room  # type: ignore[method-assign]
if FAULT in ("idle loss", "idle hang"):
    OpenVinoEngine.check = check_with_fault  # type: ignore[method-assign]
OpenVinoEngine.collect = collect_with_fault  # type: ignore[method-assign]
if FAULT == "load":
    OpenVinoEngine.warm_steps = warm_forever  # type: ignore[method-assign]
if FAULT == "stuck":
    Service.stop = stop_never  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(cli.main())
