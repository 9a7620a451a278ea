"""Examine a CUDA device in a minute: `python -m benchmarks.cuda_probe`.

Needs torch, NumPy and this project. It answers, in this order: what the card is and how fast its
matrix products and its bus are; whether the engine captures a graph for every batch size, and
serves a new thread as fast as the first; how far each precision is from fp32; which form of the
network is fastest (plain, fused layers, compiled, two streams); where the time of a window goes, by
layer and by kernel; and what another thread's synchronization does to a capture.

`--device cpu --quick` tries the program itself on a small network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from app.engine.torch_network import FusedUNet
from benchmarks.gpu_engine import captured_sizes, create_engine, draw_checkpoint, run_batch
from benchmarks.gpu_timing import Replay, measure_device_seconds, measure_products, synchronize
from benchmarks.results import Results
from model.convert.flops import count_flops
from model.predict import build_network
from model.transforms import normalize, probabilities
from model.unet import UNet

_BUS_BYTES = 1 << 28
_PROFILED_KERNELS = 30
_CAPTURE_SCRIPT = """
import threading, torch
x = torch.zeros(1 << 20, device="cuda")
torch.cuda.synchronize()
stream, found = torch.cuda.Stream(), []
def synchronize():
    try:
        torch.cuda.synchronize()
        found.append("another thread synchronized")
    except RuntimeError as error:
        found.append("another thread could not synchronize: " + str(error).splitlines()[0])
try:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        x.add_(1)
        other = threading.Thread(target=synchronize)
        other.start()
        other.join()
    found.append("the capture succeeded")
except RuntimeError as error:
    found.append("the capture failed: " + str(error).splitlines()[0])
side = torch.cuda.Stream()
before = torch.cuda.memory_stats()["num_device_alloc"]
for _ in range(20):
    with torch.cuda.stream(side):
        y = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
    y.record_stream(torch.cuda.default_stream())
    del y
    torch.cuda.synchronize()
count = torch.cuda.memory_stats()["num_device_alloc"] - before
found.append(f"20 buffers used on two streams took {count} allocations (1 if all is well)")
print("; ".join(found))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu (cuda:0)")
    parser.add_argument("--quick", action="store_true", help="a small network and short times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    probe = Probe(torch.device(args.device), Results(args.json), quick=args.quick)
    for step in (
        probe.describe,
        probe.measure_bus,
        probe.check_engine,
        probe.check_precisions,
        probe.compare_networks,
        probe.measure_layers,
        probe.profile_kernels,
        probe.check_capture,
        probe.compile_network,
    ):
        probe.results.attempt(step.__name__, step)
    return probe.results.exit_status


class Probe:
    """The questions to a device.

    Args:
        device: to examine.
        results: receives the answers.
        quick: small sizes, to try the program.
    """

    def __init__(self, device: torch.device, results: Results, *, quick: bool) -> None:
        self.device = device
        self.results = results
        self.quick = quick
        self.features = 8 if quick else 64
        self.side = 64 if quick else 544
        self.seconds = 0.02 if quick else 0.25
        self.peak = 0.0

    def describe(self) -> None:
        """Describe card and software, and measure matrix products."""
        versions = {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version[:6]}
        self.results.add("versions", versions)
        if self.device.type == "cuda":
            card = torch.cuda.get_device_properties(self.device)
            self.results.add(
                "card",
                {
                    "name": card.name,
                    "capability": f"{card.major}.{card.minor}",
                    "memory_mib": card.total_memory >> 20,
                    "processors": card.multi_processor_count,
                    "cudnn": torch.backends.cudnn.version(),
                    "kernels": torch.cuda.get_arch_list(),
                    "driver": _read_driver(),
                },
            )
        for precision in ("fp32", "fp16", "bf16"):
            rate = measure_products(
                self.device, precision, 256 if self.quick else 8192, self.seconds
            )
            self.results.add(f"products_{precision}", rate, f"{rate / 1e12:.2f} TFLOP/s")
        self.peak = rate

    def measure_bus(self) -> None:
        """Measure copies to the device, from it, and on it (bytes read plus bytes written)."""
        size = _BUS_BYTES >> (6 if self.quick else 0)
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        copies: dict[str, tuple[int, Callable[[], object]]] = {
            "to_device": (1, lambda: there.copy_(host, non_blocking=True)),
            "to_host": (1, lambda: host.copy_(there, non_blocking=True)),
            "on_device": (2, there.clone),
        }
        for name, (factor, copy) in copies.items():
            each = measure_device_seconds(self.device, copy, self.seconds)
            self.results.add(
                f"bytes_per_second_{name}",
                factor * size / each,
                f"{factor * size / each / 1e9:.0f} GB/s",
            )

    def check_engine(self) -> None:
        """Count captured graphs, and compare the first batches of two threads."""
        checkpoint = draw_checkpoint((self.side, self.side), self.features)
        engine = create_engine(checkpoint, self.device, "bf16", max_batch=4)
        start = time.perf_counter()
        engine.warm()
        self.results.add("warm_seconds", time.perf_counter() - start)
        graphs = captured_sizes(engine, (self.side, self.side))
        self.results.add("graphs", graphs, f"batches of {graphs}; must have 1, 2 and 4")
        staged = engine.stage((self.side, self.side), 4)
        staged[:] = np.random.default_rng(0).integers(0, 256, staged.shape)
        here, elsewhere = _time_calls(lambda: run_batch(engine, staged)), []
        other = threading.Thread(
            target=lambda: elsewhere.extend(_time_calls(lambda: run_batch(engine, staged)))
        )
        other.start()
        other.join()
        self.results.add("batch_seconds_same_thread", here)
        self.results.add("batch_seconds_new_thread", elsewhere)
        engine.close()

    @torch.inference_mode()
    def check_precisions(self) -> None:
        """Measure how far the engine's probabilities are from fp32 without TF32."""
        checkpoint = draw_checkpoint((self.side, self.side), self.features)
        windows = np.random.default_rng(1).integers(0, 256, (2, self.side, self.side, 3))
        windows = windows.astype(np.uint8)
        network = build_network(checkpoint).eval().to(self.device)
        allowed = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        pixels = torch.from_numpy(windows).to(self.device)
        exact = (
            probabilities(network(normalize(pixels, checkpoint.preprocess)), checkpoint.preprocess)
            .cpu()
            .numpy()
        )
        torch.backends.cudnn.allow_tf32 = allowed
        for precision in ("fp32", "fp16", "bf16"):
            engine = create_engine(checkpoint, self.device, precision, max_batch=2)
            engine.warm()
            staged = engine.stage((self.side, self.side), 2)
            staged[:] = windows
            error = np.abs(run_batch(engine, staged) - exact)
            self.results.append(
                "errors_of_precisions",
                {
                    "precision": precision,
                    "largest": float(error.max()),
                    "mean": float(error.mean()),
                },
            )
            engine.close()

    @torch.inference_mode()
    def compare_networks(self) -> None:
        """Measure forms of the network without anything around it."""
        network = self._build_network()
        sizes = (1, 2) if self.quick else (1, 2, 4, 8, 16)
        forms: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
            "plain": (network, sizes)
        }
        if self.device.type == "cuda":
            forms["fused"] = (FusedUNet(network), sizes[1:])
            forms["fused, products"] = (FusedUNet(network, grow_by_product=True), sizes[1:])
            maxima = FusedUNet(network, grow_by_product=True, pool_by_maxima=True)
            forms["fused, products, maxima"] = (maxima, sizes[1:])
        for name, (function, batches) in forms.items():
            for batch in batches:
                self.results.attempt(
                    f"{name} {batch}",
                    lambda n=name, f=function, b=batch: self._measure_network(network, n, f, b),
                )
        self.results.attempt("two streams", lambda: self._measure_two_streams(network, 4))

    @torch.inference_mode()
    def profile_kernels(self) -> None:
        """Measure the kernels of the fused network, with a batch of 8. The slowest come first."""
        if self.device.type != "cuda":
            return
        plain, inputs = self._build_network(), self._draw_inputs(8)
        network = FusedUNet(plain, grow_by_product=True, pool_by_maxima=True)
        for _ in range(3):
            network(inputs)
        synchronize(self.device)
        activity = torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[activity]) as profile:
            network(inputs)
            synchronize(self.device)
        kernels = sorted(profile.key_averages(), key=lambda each: -each.self_device_time_total)
        for kernel in kernels[:_PROFILED_KERNELS]:
            self.results.append(
                "kernels",
                {
                    "kernel": kernel.key[:100],
                    "calls": kernel.count,
                    "microseconds": kernel.self_device_time_total / len(inputs),
                },
            )

    @torch.inference_mode()
    def compile_network(self) -> None:
        """Measure the compiled network. The last step: compiling takes a minute, or fails."""
        if self.device.type == "cuda":
            network = self._build_network()
            self._measure_network(network, "compiled", torch.compile(network, dynamic=False), 8)

    def _build_network(self) -> UNet:
        network = build_network(draw_checkpoint((self.side, self.side), self.features)).eval()
        return network.to(self.device, torch.bfloat16, memory_format=torch.channels_last)

    def _measure_network(
        self, plain: UNet, name: str, function: Callable[[Tensor], Tensor], batch: int
    ) -> None:
        inputs = self._draw_inputs(batch)
        replay = Replay(function, inputs)
        seconds = measure_device_seconds(self.device, replay, self.seconds)
        work = batch * count_flops(plain.config, self.side, self.side)
        difference = 0.0
        if function is not plain:
            difference = float((plain(inputs).float() - replay.outputs.float()).abs().max())
        self.results.append(
            "networks",
            {
                "form": name,
                "batch": batch,
                "images_per_second": batch / seconds,
                "of_products": work / seconds / self.peak,
                "largest_difference": difference,
            },
        )

    def _measure_two_streams(self, network: UNet, batch: int) -> None:
        """Measure two graphs that run at the same time."""
        replays = [Replay(network, self._draw_inputs(batch)) for _ in range(2)]
        streams: list[torch.cuda.Stream | None] = [None, None]
        if self.device.type == "cuda":
            streams = [torch.cuda.Stream(self.device) for _ in replays]

        def both() -> None:
            for replay, stream in zip(replays, streams, strict=True):
                with torch.cuda.stream(stream):  # does nothing without a stream
                    replay()

        seconds = measure_device_seconds(self.device, both, self.seconds)
        work = 2 * batch * count_flops(network.config, self.side, self.side)
        self.results.append(
            "networks",
            {
                "form": "two streams",
                "batch": batch,
                "images_per_second": 2 * batch / seconds,
                "of_products": work / seconds / self.peak,
            },
        )

    def _draw_inputs(self, batch: int) -> Tensor:
        inputs = torch.randn(batch, 3, self.side, self.side, device=self.device)
        return inputs.to(torch.bfloat16, memory_format=torch.channels_last)

    @torch.inference_mode()
    def measure_layers(self) -> None:
        """Measure the convolutions of the network one by one, with a batch of 4."""
        features, side = self.features, self.side
        layers = [
            ("first", 3, features, side, 3),
            ("first, 8 channels", 8, features, side, 3),
            ("top, second", features, features, side, 3),
            ("top, after the skip", 2 * features, features, side, 3),
            ("level 1, second", 2 * features, 2 * features, side // 2, 3),
            ("level 1, after the skip", 4 * features, 2 * features, side // 2, 3),
            ("level 2, after the skip", 8 * features, 4 * features, side // 4, 3),
            ("level 3, after the skip", 16 * features, 8 * features, side // 8, 3),
            ("middle, second", 16 * features, 16 * features, side // 16, 3),
            ("last", features, 1, side, 1),
            ("last, 8 channels", features, 8, side, 1),
        ]
        for layer in layers:
            self.results.attempt(layer[0], lambda each=layer: self._measure_layer(*each))

    def _measure_layer(self, name: str, inputs: int, outputs: int, side: int, kernel: int) -> None:
        batch, like = 4, {"device": self.device, "dtype": torch.bfloat16}
        x = torch.randn(batch, inputs, side, side, **like)
        weight = torch.randn(outputs, inputs, kernel, kernel, **like)
        x, weight = (each.to(memory_format=torch.channels_last) for each in (x, weight))
        bias = torch.zeros(outputs, **like)

        def microseconds(call: Callable[[], object]) -> float:
            return measure_device_seconds(self.device, call, self.seconds / 4) / batch * 1e6

        plain = microseconds(lambda: F.conv2d(x, weight, None, padding=kernel // 2))
        row: dict[str, Any] = {
            "layer": name,
            "inputs": inputs,
            "outputs": outputs,
            "side": side,
            "microseconds": plain,
            "flops_per_second": 2 * inputs * outputs * kernel**2 * side**2 / plain * 1e6,
        }
        if self.device.type == "cuda":
            row["microseconds_fused_with_bias_and_relu"] = microseconds(
                lambda: torch.cudnn_convolution_relu(
                    x, weight, bias, (1, 1), (kernel // 2,) * 2, (1, 1), 1
                )
            )
        y = F.conv2d(x, weight, bias, padding=kernel // 2)
        row["microseconds_of_relu_alone"] = microseconds(lambda: F.relu(y))
        self.results.append("layers", row)

    def check_capture(self) -> None:
        """Try, in a process of its own, what another thread does to a capture."""
        if self.device.type != "cuda":
            return
        done = subprocess.run(
            [sys.executable, "-c", _CAPTURE_SCRIPT], capture_output=True, text=True, timeout=60
        )
        self.results.add("capture", done.stdout.strip() or done.stderr.strip()[-300:])


def _time_calls(call: Callable[[], object]) -> list[float]:
    """Return the seconds of three calls."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _read_driver() -> str:
    """Read the version of the driver; empty where nvidia-smi is missing."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    sys.exit(main())
