"""Print how long each layer of the network takes in OpenVINO: `python -m benchmarks.layers`.

One window on one compiled model, with OpenVINO's own counters, the mean of several runs. The
convolutions are the matrix products; the last line is their share of the time. What lies between
them is why int8 on AMX stays below the rate of a bare product.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import openvino as ov

from app.engine.openvino import build_graph
from app.engine.selection import cpu_quota
from model.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
PRODUCTS = ("Convolution", "ConvolutionBackpropData", "Deconvolution")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/nuclei.safetensors")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="int8")
    parser.add_argument("--side", type=int, default=544, help="of the window (544)")
    parser.add_argument("--threads", type=int, default=cpu_quota(), help="default: all CPUs")
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.weights)
    ranges = None
    if args.precision == "int8":
        if checkpoint.calibration is None:
            raise SystemExit(f"{args.weights} has no calibration; int8 needs one")
        ranges = checkpoint.calibration.ranges
    graph = build_graph(checkpoint.architecture, checkpoint.preprocess, checkpoint.state, ranges)
    options = {
        "INFERENCE_NUM_THREADS": args.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if args.precision == "bf16" else "f32",
        "PERF_COUNT": True,
    }
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()
    channels = checkpoint.architecture.in_channels
    window = np.zeros((1, args.side, args.side, channels), np.uint8)
    milliseconds: dict[tuple[str, str, str], float] = defaultdict(float)
    request.infer([window])  # generates the kernels
    for _ in range(args.runs):
        request.infer([window])
        for layer in request.get_profiling_info():
            spent = layer.real_time.total_seconds() * 1e3 / args.runs
            milliseconds[layer.node_name, layer.node_type, layer.exec_type] += spent
    total = sum(milliseconds.values())
    for (name, kind, implementation), spent in milliseconds.items():
        if spent >= total / 1000:
            share = f"{100 * spent / total:5.1f} %"
            print(f"{spent:9.3f} ms {share}  {kind:<24}{implementation:<26}{name}")
    products = sum(spent for (_, kind, _), spent in milliseconds.items() if kind in PRODUCTS)
    print(f"{total:9.3f} ms in all, of which {100 * products / total:.1f} % in convolutions")


if __name__ == "__main__":
    main()
