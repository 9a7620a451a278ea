"""The engines of one device as the batcher sees them."""

from __future__ import annotations

import math
from typing import Any

from app.engine.base import Engine
from app.engine.device_engines import DeviceEngines


class Measured(Engine):
    """An engine that only knows how much memory is in use."""

    def __init__(self, used: float) -> None:
        self.used = used

    def check(self) -> float:
        return self.used


def test_two_batches_are_in_flight_on_cuda_only() -> None:
    assert DeviceEngines("cuda:1").depth == 2
    assert DeviceEngines("cpu").depth == 1


def test_memory_is_that_of_the_last_check() -> None:
    device = DeviceEngines("cuda:0")
    device.check()
    assert math.isnan(device.used_bytes)  # no engine knows it yet
    engines: dict[str, Any] = {"a": Measured(70.0), "b": Measured(80.0)}
    device.engines = engines
    device.check()
    assert device.used_bytes == 70
