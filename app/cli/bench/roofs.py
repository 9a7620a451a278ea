"""The roof: how fast this machine multiplies matrices, by the library that the engine uses.

A convolution is a matrix product with some copying around it, so no engine is faster than this.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from app.cli.bench.timing import timed
from model.arrays import FloatArray

_CHAINS = {1024: 8, 2048: 2}
"""Side of the matrices -> products one behind the other, so that what goes in and comes out is not
felt. The smaller ones fit the caches of a CPU better, the larger ones give more cores work."""
_CUDA_SIDE = 8192


def roof(backend: str, device: str, precision: str, threads: int, seconds: float) -> float:
    """Operations a second, 2 for each multiply-add, of products of square matrices.

    Args:
        backend, device, precision: as an engine has them (`app.engine.base.Engine`).
        threads: of the CPU.
        seconds: to measure for.
    """
    if backend == "openvino":
        return max(_openvino(side, precision, threads, seconds / len(_CHAINS)) for side in _CHAINS)
    if device == "cpu":
        return max(
            _torch(side, device, precision, threads, seconds / len(_CHAINS)) for side in _CHAINS
        )
    return _torch(_CUDA_SIDE, device, precision, threads, seconds)


def _openvino(side: int, precision: str, threads: int, seconds: float) -> float:
    import openvino as ov

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    graph = _chain(side, precision == "int8")
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()
    inputs = [np.random.default_rng(0).random((side, side), np.float32)]
    median = timed(lambda: request.infer(inputs, share_inputs=True), seconds)
    return _CHAINS[side] * 2 * side**3 / median


def _chain(side: int, int8: bool) -> Any:
    """(side, side) float32 times a chain of constant matrices; the sum of what comes out."""
    import openvino as ov
    import openvino.opset13 as ops

    rng = np.random.default_rng(0)
    low, high = np.float32(0), np.float32(1)
    matrix = rng.integers(-127, 128, (side, side)).astype(np.int8)
    scale: FloatArray = np.full((1, side), 1 / (64 * side), np.float32)
    given = ops.parameter([side, side], np.float32)
    x = given
    for _ in range(_CHAINS[side]):
        if int8:
            x = ops.fake_quantize(x, low, high, low, high, 256)
            weight = ops.multiply(ops.convert(ops.constant(matrix), "f32"), ops.constant(scale))
        else:
            weight = ops.constant(matrix * scale)
        x = ops.matmul(x, weight, False, False)
    return ov.Model([ops.reduce_sum(x, np.array([0, 1]))], [given], "roof")


def _torch(side: int, device: str, precision: str, threads: int, seconds: float) -> float:
    import torch

    if device == "cpu":
        torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    # Convolutions in fp32 use TF32 unless told otherwise, products do not: the same for both.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")

    def multiply() -> None:
        torch.mm(left, right, out=out)
        if device != "cpu":
            torch.cuda.synchronize(device)

    try:
        return 2 * side**3 / timed(multiply, seconds)
    finally:
        torch.set_float32_matmul_precision(before)
