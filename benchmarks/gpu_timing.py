"""Measure calls on a device, and the rate of matrix products to which engines are compared.

Everything runs on a CPU too, so that a run on a borrowed GPU can be tried without one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BURN_IN_RUNS = 3
_ROUNDS = 5


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_device_seconds(
    device: torch.device, call: Callable[[], object], seconds: float
) -> float:
    """Return the seconds of a call that only launches work, in a row of such calls.

    Args:
        seconds: to measure for.
    """
    for _ in range(_BURN_IN_RUNS):
        call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    single = max(time.perf_counter() - start, 1e-6)
    runs = max(1, int(seconds / _ROUNDS / single))
    rounds: list[float] = []
    end = time.perf_counter() + 2 * seconds
    while not rounds or (len(rounds) < _ROUNDS and time.perf_counter() < end):
        start = time.perf_counter()
        for _ in range(runs):
            call()
        synchronize(device)
        rounds.append((time.perf_counter() - start) / runs)
    return statistics.median(rounds)


def measure_products(device: torch.device, precision: str, side: int, seconds: float) -> float:
    """Return the FLOP/s of products of two (side, side) matrices of random numbers.

    fp32 uses TF32 on CUDA, as convolutions do by default.
    """
    kind = DTYPES[precision]
    left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    out = torch.empty_like(left)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")
    try:
        each = measure_device_seconds(device, lambda: torch.mm(left, right, out=out), seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * side**3 / each


class Replay:
    """A function of a tensor as one CUDA graph; on a CPU it is called.

    Args:
        function: allocates nothing but its result.
        inputs: on the device; it is read at each call.

    Attributes:
        outputs: of the last call.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> None:
        self._function, self._inputs = function, inputs
        self._graph: torch.cuda.CUDAGraph | None = None
        self.outputs = function(inputs)
        if inputs.is_cuda:
            stream = torch.cuda.Stream(inputs.device)
            stream.wait_stream(torch.cuda.current_stream(inputs.device))
            with torch.cuda.stream(stream):
                for _ in range(_BURN_IN_RUNS):
                    function(inputs)
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self.outputs = function(inputs)

    def __call__(self) -> None:
        if self._graph is None:
            self.outputs = self._function(self._inputs)
        else:
            self._graph.replay()
