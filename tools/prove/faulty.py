"""`unet serve` with an engine that fails: the test hook of `docs/reliability.md`.

    FAULT=hang python -m tools.prove.faulty serve [FLAGS OF unet serve]

It passes its engines as `wrap_engine` to the service. No setting, flag or variable of `unet serve`
can do so: only a program that calls `app.cli.serve.main` itself.

| FAULT | when | what |
|---|---|---|
| error | a window of one value | the engine raises an `EngineError` with a secret |
| bug | a window of one value | it raises a `KeyError` with a secret |
| nan | a window of one value | it returns NaN |
| short | a window of one value | it returns a result too few |
| host-memory | a window of one value | it raises a `MemoryError` |
| lost | a window of one value | the device is gone |
| hang | a window of one value | it never returns |
| crash | a window of one value | the process gets a segmentation fault |
| memory | a batch of more than two windows | out of memory |
| slow | every batch | it takes a tenth of a second more |
| idle loss | a device idle for a second | it is gone |
| idle hang | a device idle for a second | it does not respond |
| load | the start | warming up never ends |
| no room | the start | the device cannot hold the model |
| stuck | a window of one value, and the end | it never returns, and stopping does not either |
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from app.cli import serve
from app.engine.base import Engine, check_finite
from app.errors import DeviceLost, EngineError, OutOfMemory
from app.inference.service import Service
from model.arrays import ByteArray, Probabilities, Shape

FAULTS = (
    "error", "bug", "nan", "short", "host-memory", "lost", "hang", "crash", "memory", "slow",
    "idle loss", "idle hang", "load", "no room", "stuck",
)  # fmt: skip
_FOREVER = 3600


class FaultyEngine:
    """An engine that fails on windows whose pixels all have one value.

    See `app.engine.base.Engine`.

    Args:
        engine: computes the other windows.
        fault: one of `FAULTS`.
    """

    def __init__(self, engine: Engine, fault: str) -> None:
        if fault == "no room":
            raise OutOfMemory("cuda:0: CUDA out of memory. Tried to allocate 62.00 MiB.")
        self.shapes = engine.shapes
        self.max_batch = engine.max_batch
        self._engine = engine
        self._fault = fault
        self._last_batch = math.inf

    def stage(self, shape: Shape, count: int) -> ByteArray:
        return self._engine.stage(shape, count)

    def submit(self, windows: ByteArray) -> Any:
        fails = any(window.min() == window.max() for window in windows)
        return self._engine.submit(windows), len(windows), fails

    def collect(self, submitted: Any) -> Probabilities:
        self._last_batch = time.monotonic()
        batch, count, fails = submitted
        if self._fault == "slow":
            time.sleep(0.1)
        if self._fault == "memory" and count > 2:
            raise OutOfMemory("not enough memory for more than two windows")
        result = self._engine.collect(batch)
        return self._fail(result) if fails else result

    def warm_steps(self) -> Iterator[Callable[[], None]]:
        if self._fault == "load":
            yield lambda: time.sleep(_FOREVER)
        yield from self._engine.warm_steps()

    def warm(self) -> None:
        self._engine.warm()

    def check(self) -> float:
        if self._fault.startswith("idle") and time.monotonic() > self._last_batch + 1:
            if self._fault == "idle hang":
                time.sleep(_FOREVER)
            raise DeviceLost("cuda:0: CUDA error: the device fell off the bus")
        return self._engine.check()

    def close(self) -> None:
        self._engine.close()

    def _fail(self, result: Probabilities) -> Probabilities:
        match self._fault:
            case "error":
                raise EngineError("secret of the engine")
            case "bug":
                raise KeyError("secret of the engine")
            case "nan":
                check_finite(np.full(np.shape(result), np.nan, np.float32))
            case "short":
                return result[:-1]
            case "host-memory":
                raise MemoryError("secret of the engine")
            case "lost":
                raise DeviceLost("an illegal memory access was encountered")
            case "hang" | "stuck":
                time.sleep(_FOREVER)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
        return result


async def _stop_never(self: Service) -> None:
    await asyncio.to_thread(time.sleep, _FOREVER)


def main() -> None:
    """Serve with the fault that the variable FAULT names."""
    fault = os.environ["FAULT"]
    if fault not in FAULTS or sys.argv[1:2] != ["serve"]:
        sys.exit(__doc__)
    if fault == "stuck":
        Service.stop = _stop_never  # type: ignore[method-assign]
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    serve.main(parser.parse_args(sys.argv[2:]), lambda engine: FaultyEngine(engine, fault))


if __name__ == "__main__":
    main()
