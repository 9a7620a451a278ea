"""Measure the peak: how fast this machine multiplies matrices, in the library of the engine.

A convolution is a matrix product with additional copies, so an engine cannot be much faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from app.cli.bench.timing import measure_seconds
from model.arrays import FloatArray

CHAIN_LENGTHS = {1024: 8, 2048: 2}
"""Side of the matrices -> products in a row, so that copying input and output weighs little. The
smaller matrices fit the caches of a CPU better, the larger ones occupy more cores."""
_CUDA_SIDE = 8192


def measure_peak(backend: str, device: str, precision: str, threads: int, seconds: float) -> float:
    """Return the FLOP/s of square matrix products, 2 operations per multiply-add.

    Args:
        backend, device, precision: as in `app.engine.selection.EngineChoice`.
        threads: of the CPU.
        seconds: to measure for.
    """
    if device != "cpu":
        return _torch_peak(_CUDA_SIDE, device, precision, threads, seconds)
    each = seconds / len(CHAIN_LENGTHS)
    if backend == "openvino":
        return max(_openvino_peak(side, precision, threads, each) for side in CHAIN_LENGTHS)
    return max(_torch_peak(side, device, precision, threads, each) for side in CHAIN_LENGTHS)


def _openvino_peak(side: int, precision: str, threads: int, seconds: float) -> float:
    from app.engine.openvino_core import shared_core

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    graph = _build_chain(side, precision == "int8")
    request = shared_core().compile_model(graph, "CPU", options).create_infer_request()
    inputs = [np.random.default_rng(0).random((side, side), np.float32)]
    median = measure_seconds(lambda: request.infer(inputs, share_inputs=True), seconds)
    return CHAIN_LENGTHS[side] * 2 * side**3 / median


def _build_chain(side: int, int8: bool) -> Any:
    """Build a chain of products of a (side, side) float32 input with constant matrices.

    The output is one number, the sum of the last product.
    """
    import openvino as ov
    import openvino.opset13 as ops

    rng = np.random.default_rng(0)
    low, high = np.float32(0), np.float32(1)
    matrix = rng.integers(-127, 128, (side, side)).astype(np.int8)
    scale: FloatArray = np.full((1, side), 1 / (64 * side), np.float32)
    source = ops.parameter([side, side], np.float32)
    x = source
    for _ in range(CHAIN_LENGTHS[side]):
        if int8:
            x = ops.fake_quantize(x, low, high, low, high, 256)
            weight = ops.multiply(ops.convert(ops.constant(matrix), "f32"), ops.constant(scale))
        else:
            weight = ops.constant(matrix * scale)
        x = ops.matmul(x, weight, False, False)
    return ov.Model([ops.reduce_sum(x, np.array([0, 1]))], [source], "peak")


def _torch_peak(side: int, device: str, precision: str, threads: int, seconds: float) -> float:
    import torch

    if device == "cpu":
        torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    # By default torch uses TF32 in fp32 convolutions but not in products: use it in both or neither
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")

    def multiply() -> None:
        torch.mm(left, right, out=out)
        if device != "cpu":
            torch.cuda.synchronize(device)

    try:
        return 2 * side**3 / measure_seconds(multiply, seconds)
    finally:
        torch.set_float32_matmul_precision(before)
