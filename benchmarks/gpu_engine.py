"""Measure the torch engine on a CUDA device: `python -m benchmarks.gpu_engine PART`.

- `table`: windows/s for each precision, window and batch size, over the device's own matrix
  products; the graphs that were captured; and how far masks are from those of fp32.
- `service`: the bare network against the engine, with one batch and with two in flight, and
  against the service's batcher with the engine behind it.
- `http`: the service over HTTP against that engine. Needs the packages of requirements/serve.txt.

The first two need torch, NumPy and this project. `--device cpu --quick` tries the program itself.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from app.batching.batcher import Batcher
from app.engine.base import Engine
from app.engine.device_engines import BatchKey, DeviceEngines, WindowJob
from app.engine.predictor import engine_predictor
from app.engine.selection import EngineChoice, build_engine
from app.engine.torch_network import FusedUNet, WindowNetwork
from benchmarks.gpu_timing import Replay, measure_device_seconds, measure_products
from benchmarks.results import Results
from model.arrays import ByteArray, FloatArray, Probabilities, Shape
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.convert.flops import count_flops
from model.predict import Predictor, attach_golden
from model.transforms import prepare, to_mask
from model.windows import plan_windows
from tests.drawing import drawn_weights, nuclei

WINDOWS = ((544, 1), (512, 1), (572, 0), (256, 1))
"""(side, padding) of the windows in the table. 572 with padding 0 is the network of the paper."""
_SERVICE_BATCH = 8
_REQUESTS = 12
"""Requests at the same time, in windows of a whole batch each. Their turns alternate: with few of
them all end together, and the device waits for the next ones."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("table", "service", "http"))
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu (cuda:0)")
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("weights/nuclei.safetensors"),
        help="checkpoint whose masks are compared, if the file exists",
    )
    parser.add_argument("--quick", action="store_true", help="a small network and short times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    results = Results(args.json)
    device = torch.device(args.device)
    if args.part == "table":
        if args.weights.exists() and not args.quick:
            checkpoint = load_checkpoint(args.weights)
            images = [nuclei(500, 500, seed=seed)[0] for seed in range(4)]
            compare_masks(checkpoint, images, device, results)
        measure_table(device, results, quick=args.quick)
    elif args.part == "service":
        measure_service_engine(device, results, quick=args.quick)
    else:
        measure_http(device, results, quick=args.quick)
    return results.exit_status


def draw_checkpoint(shape: Shape, features: int, padding: int = 1) -> Checkpoint:
    """Make a network with random weights and one window, for measuring speed."""
    architecture = UNetConfig(3, 1, features, padding)
    preprocess = PreprocessConfig(window=(shape,), overlap=16 if padding else 0)
    weights = drawn_weights(architecture, seed=0)
    return Checkpoint(f"drawn-{shape[0]}", architecture, preprocess, weights)


def create_engine(
    checkpoint: Checkpoint, device: torch.device, precision: str, max_batch: int
) -> Engine:
    """Create the engine of a checkpoint as the service does; `warm` is not called yet."""
    choice = EngineChoice("torch", str(device), precision, torch.get_num_threads(), max_batch, "")
    return build_engine(choice, checkpoint)


def run_batch(engine: Engine, staged: ByteArray) -> FloatArray:
    """Compute one batch, from bytes in memory to probabilities in memory."""
    found = engine.collect(engine.submit(staged))
    return found / np.float32(65535) if found.dtype == np.uint16 else found


def captured_sizes(engine: Engine, shape: Shape) -> list[int]:
    """List the batch sizes of a window that have a CUDA graph."""
    captured = engine.captured() if hasattr(engine, "captured") else set()
    return sorted(size for window, size in captured if window == shape)


def measure_table(device: torch.device, results: Results, *, quick: bool) -> None:
    """Measure every precision, window and batch size. The most important rows come first.

    In fp32 batches are at most 8: tuning one more size takes seconds.
    """
    features = 8 if quick else 64
    seconds = 0.02 if quick else 0.25
    windows = ((64, 1), (204, 0)) if quick else WINDOWS
    largest = {"bf16": 32, "fp16": 32, "fp32": 8}
    for precision, most in largest.items():
        products = measure_products(device, precision, 256 if quick else 8192, seconds)
        results.add(f"products_{precision}", products, f"{products / 1e12:.2f} TFLOP/s")
        for side, padding in windows:
            checkpoint = draw_checkpoint((side, side), features, padding)
            results.attempt(
                f"{precision} {side}",
                lambda c=checkpoint, p=precision, m=2 if quick else most, r=products: (
                    _measure_engine(c, device, p, m, r, seconds, results)
                ),
            )
        again = measure_products(device, precision, 256 if quick else 8192, seconds)
        results.add(f"products_{precision}_afterwards", again, f"{again / 1e12:.2f} TFLOP/s")


def _measure_engine(
    checkpoint: Checkpoint,
    device: torch.device,
    precision: str,
    most: int,
    products: float,
    seconds: float,
    results: Results,
) -> None:
    (shape,) = checkpoint.preprocess.window
    engine = create_engine(checkpoint, device, precision, most)
    start = time.perf_counter()
    engine.warm()
    sizes = [1 << power for power in range(most.bit_length())]
    graphs = captured_sizes(engine, shape)
    results.append(
        "warmed",
        {
            "precision": precision,
            "side": shape[0],
            "seconds": time.perf_counter() - start,
            "graphs": graphs,
            "without_a_graph": [size for size in sizes if size not in graphs],
        },
    )
    work = count_flops(checkpoint.architecture, *shape)
    for size in sizes:
        staged = engine.stage(shape, size)
        staged[:] = np.random.default_rng(0).integers(0, 256, staged.shape, np.uint8)
        rate = size / _time_engine(lambda: engine.collect(engine.submit(staged)), seconds)  # noqa: B023
        row = {
            "precision": precision,
            "side": shape[0],
            "padding": checkpoint.architecture.padding,
            "batch": size,
            "images_per_second": rate,
            "of_products": rate * work / products,
        }
        results.append(
            "rows",
            row,
            f"{precision} {shape[0]} batch {size}: {rate:.1f} images/s, "
            f"{row['of_products']:.3f} of products",
        )
    engine.close()


def _time_engine(call: Callable[[], object], seconds: float) -> float:
    """Return the median seconds of a call that returns when its result is there."""
    return measure_device_seconds(torch.device("cpu"), call, seconds)


def compare_masks(
    checkpoint: Checkpoint, images: list[Any], device: torch.device, results: Results
) -> None:
    """Measure the IoU of each precision's masks with those of fp32 without TF32.

    Args:
        images: decoded.
    """
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    exact = Predictor.of(checkpoint, device)
    expected = [to_mask(exact(image), checkpoint.preprocess) > 0 for image in images]
    torch.backends.cudnn.allow_tf32 = allowed
    for precision in ("fp32", "fp16", "bf16"):
        engine = create_engine(checkpoint, device, precision, 1)
        predict = engine_predictor(engine, checkpoint)
        found = [to_mask(predict(image), checkpoint.preprocess) > 0 for image in images]
        engine.close()
        scores = [_compute_iou(a, b) for a, b in zip(expected, found, strict=True)]
        row = {"precision": precision, "mean": float(np.mean(scores)), "least": min(scores)}
        results.append("mask_iou_with_fp32", row)


def _compute_iou(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    """Return the intersection over the union; 1 if both are empty."""
    union = int((first | second).sum())
    return float((first & second).sum() / union) if union else 1.0


def measure_service_engine(device: torch.device, results: Results, *, quick: bool) -> None:
    """Measure what the engine and the batcher leave of the bare network's rate, in bf16."""
    features, side = (8, 64) if quick else (64, 544)
    batch, seconds = (2, 0.1) if quick else (_SERVICE_BATCH, 2.0)
    checkpoint = draw_checkpoint((side, side), features)
    products = measure_products(device, "bf16", 256 if quick else 8192, seconds / 4)
    results.add("products_bf16", products, f"{products / 1e12:.2f} TFLOP/s")
    work = count_flops(checkpoint.architecture, side, side)
    bare = 0.0

    def add(name: str, rate: float) -> None:
        row = {"images_per_second": rate, "of_products": rate * work / products}
        row["of_bare_network"] = rate / bare
        results.add(name, row, f"{rate:.1f} images/s, {rate / bare:.3f} of the bare network")

    bare = _measure_bare_network(checkpoint, device, batch, seconds)
    add("bare_network", bare)
    engine = create_engine(checkpoint, device, "bf16", batch)
    engine.warm()
    buffers = [engine.stage((side, side), batch) for _ in range(2)]
    for staged in buffers:
        staged[:] = np.random.default_rng(0).integers(0, 256, staged.shape, np.uint8)
    add(
        "engine_one_batch",
        batch / _time_engine(lambda: engine.collect(engine.submit(buffers[0])), seconds),
    )
    add("engine_two_in_flight", _measure_two_in_flight(engine, buffers, seconds))
    engine.close()
    add("batcher", asyncio.run(_measure_batcher(checkpoint, device, batch, seconds)))
    add("bare_network_afterwards", _measure_bare_network(checkpoint, device, batch, seconds))


@torch.inference_mode()
def _measure_bare_network(
    checkpoint: Checkpoint, device: torch.device, batch: int, seconds: float
) -> float:
    """Return the images/s from bytes on the device to probabilities on it, in the fastest form."""
    (shape,) = checkpoint.preprocess.window
    network = WindowNetwork(checkpoint, device, torch.bfloat16)
    pixels = torch.randint(0, 256, (batch, *shape, 3), dtype=torch.uint8, device=device)
    plain: Any = network.unet
    forms = [plain]
    if device.type == "cuda":
        forms += [
            FusedUNet(plain, grow_by_product=grow, pool_by_maxima=pool)
            for grow, pool in ((False, False), (True, False), (True, True))
        ]
    rates = []
    for network.unet in forms:
        each = measure_device_seconds(device, Replay(network, pixels), seconds / len(forms))
        rates.append(batch / each)
    return max(rates)


def _measure_two_in_flight(engine: Engine, buffers: list[ByteArray], seconds: float) -> float:
    """Return the images/s when each batch is started before the one before it is collected."""
    before = engine.submit(buffers[0])
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        after = engine.submit(buffers[(count + 1) % 2])
        engine.collect(before)
        before = after
        count += 1
    engine.collect(before)
    return (count + 1) * len(buffers[0]) / (time.perf_counter() - start)


async def _measure_batcher(
    checkpoint: Checkpoint, device: torch.device, batch: int, seconds: float
) -> float:
    """Return the windows/s of the service's batcher, with full batches waiting all the time."""
    (shape,) = checkpoint.preprocess.window
    plan = plan_windows(*shape, checkpoint.architecture, checkpoint.preprocess)
    image = prepare(nuclei(*shape)[0], checkpoint.preprocess)
    image = np.ascontiguousarray(image)
    engine = create_engine(checkpoint, device, "bf16", batch)
    engines = DeviceEngines(str(device))
    engines.engines[checkpoint.name] = engine
    batcher: Batcher[WindowJob, Probabilities] = Batcher(
        [engines], max_batch=batch, capacity=4 * _REQUESTS * batch
    )
    await batcher.start()
    (worker,) = batcher.workers
    for step in engine.warm_steps():
        await worker.call(step)
    key = BatchKey(checkpoint.name, shape)
    jobs = [WindowJob(image, plan, plan.windows[0])] * batch
    count = 0

    async def request_windows(end: float) -> None:
        nonlocal count
        while time.perf_counter() < end:
            with batcher.admit([key] * batch) as reservation:
                await asyncio.gather(*reservation.submit(jobs))
            count += batch

    async def run_requests(seconds: float) -> float:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(request_windows(end) for _ in range(_REQUESTS)))
        return time.perf_counter() - end + seconds

    try:
        await run_requests(seconds / 4)
        count = 0
        elapsed = await run_requests(seconds)
    finally:
        await worker.call(engine.close)
        await batcher.close()
    return count / elapsed


def measure_http(device: torch.device, results: Results, *, quick: bool) -> None:
    """Measure the service over HTTP against the engine with two batches in flight, in bf16."""
    from app.cli.bench.load import closed_loop, format_statuses
    from app.cli.bench.serving import serving
    from app.cli.bench.stages import draw_image, encode_jpeg

    features, side = (8, 64) if quick else (64, 544)
    batch, seconds = (2, 0.5) if quick else (_SERVICE_BATCH, 5.0)
    precision = "bf16" if device.type == "cuda" else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.safetensors"
        draft = draw_checkpoint((side, side), features)
        checkpoint = save_checkpoint(path, attach_golden(draft, nuclei(side, side)[0]))
        engine = create_engine(checkpoint, device, precision, batch)
        engine.warm()
        buffers = [engine.stage((side, side), batch) for _ in range(2)]
        bare = _measure_two_in_flight(engine, buffers, seconds)
        engine.close()
        results.add("engine_images_per_second", bare)
        flags = [f"--device={device}", "--engine=torch", f"--precision={precision}"]
        with serving(path, *flags, f"--max-batch={batch}") as service:
            results.add("start_seconds", service.start_seconds)
            image = encode_jpeg(draw_image(side, side))
            for clients in (2, 4) if quick else (16, 32, 64):
                run = closed_loop(service.url, image, clients, seconds)
                if not run.statuses["200"]:
                    raise OSError(f"{clients} clients got {format_statuses(run.statuses)}")
                row = run.to_json() | {"clients": clients, "of_engine": run.throughput / bare}
                results.append(
                    "runs",
                    row,
                    f"{clients} clients: {run.throughput:.1f} images/s, "
                    f"{row['of_engine']:.3f} of the engine",
                )


if __name__ == "__main__":
    sys.exit(main())
