"""`unet bench`: measure one model on this machine.

Speed is reported as ratios within one run: the engine's FLOP/s over those of a matrix product at
the same precision, and images/s over HTTP over those of the bare engine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.cli.bench.engines import measure_bare_engine, measure_engine
from app.cli.bench.load import closed_loop, format_statuses
from app.cli.bench.machine import describe_machine, machine_summary
from app.cli.bench.serving import serving
from app.cli.bench.stages import (
    PHOTO_SHAPE,
    choose_window,
    draw_image,
    encode_jpeg,
    measure_stage_seconds,
)
from app.cli.errors import CommandError, check_parent_folder, writing
from app.cli.flags import add_flags, explicit_flags
from app.engine.selection import EngineChoice, choose_engines, resolve
from app.errors import EngineUnavailable
from app.settings import Settings, load_settings
from model.checkpoint import SUFFIX, Checkpoint, load_checkpoint, write_atomically

_PRECISIONS = ("fp32", "int8", "bf16", "fp16")
_MIN_IMAGES_PER_CLIENT = 4
"""The first and the last image of a client run beside fewer others; more images dilute that."""
_FLAGS = ("weights_dir", "device", "engine", "precision", "threads", "max_batch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="checkpoint file, or model name in --weights-dir (UNET_MODEL)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time to measure each figure for (2)"
    )
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[8, 16], help="concurrent HTTP clients (8 16)"
    )
    parser.add_argument("--no-http", action="store_true", help="skip the HTTP benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add_flags(parser, Settings, _FLAGS)


def main(args: argparse.Namespace) -> int:
    if not args.seconds > 0 or min(args.clients) < 1:
        raise CommandError("--seconds and --clients must be above 0")
    if args.json:
        check_parent_folder(args.json)
    given = explicit_flags(args, Settings)
    settings = load_settings(**given)
    path = _checkpoint_file(args.model, settings)
    checkpoint = load_checkpoint(path)
    choices = available_engines(checkpoint, settings)
    default = resolve(_choose(settings, settings.precision), checkpoint)
    report: dict[str, Any] = {
        "machine": describe_machine(default.device),
        "model": {"id": checkpoint.id, "architecture": checkpoint.architecture.to_json()},
        "default": dataclasses.asdict(default),
        "engines": [],
    }
    print(machine_summary(report["machine"]))
    print(f"{checkpoint.id}, {checkpoint.architecture}")
    print(f"default: {default.backend} {default.precision} on {default.device}; {default.reason}")
    for choice in choices:
        report["engines"].append(measure_engine(checkpoint, choice, args.seconds))
        _print_engine(report["engines"][-1])
    report["stages"] = measure_stages(checkpoint, args.seconds / 4)
    _print_stages(report["stages"])
    if not args.no_http:
        flags = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in given.items()
            if name != "weights_dir"
        ]
        report["service"] = measure_service(
            path, checkpoint, default, flags, args.clients, args.seconds
        )
        _print_service(report["service"])
    if args.json:
        with writing(args.json):
            write_atomically(args.json, (json.dumps(report, indent=2) + "\n").encode())
    return 0


# --- engines and files ---


def available_engines(checkpoint: Checkpoint, settings: Settings) -> list[EngineChoice]:
    """List an engine for each supported precision, or only for the one that is set.

    Raises:
        EngineUnavailable: none is supported.
    """
    precisions = _PRECISIONS if settings.precision == "auto" else (settings.precision,)
    choices, errors = [], []
    for precision in precisions:
        try:
            choices.append(resolve(_choose(settings, precision), checkpoint))
        except EngineUnavailable as error:
            errors.append(error)
    if not choices:
        raise errors[0]
    return choices


def _choose(settings: Settings, precision: str) -> EngineChoice:
    """Choose the engine for the first device in the settings.

    Raises:
        EngineUnavailable: this machine cannot fulfil the settings.
    """
    return choose_engines(
        device=settings.device,
        engine=settings.engine,
        precision=precision,
        threads=settings.threads,
        max_batch=settings.max_batch,
    )[0]


def _checkpoint_file(name: str | None, settings: Settings) -> Path:
    if name and (name.endswith(SUFFIX) or Path(name).is_file()):
        return Path(name)
    return settings.weights_dir / f"{name or settings.model}{SUFFIX}"


# --- measuring: each function returns a part of the report ---


def measure_stages(checkpoint: Checkpoint, seconds: float) -> dict[str, Any]:
    """Measure the cost of a photograph outside the engine.

    Args:
        seconds: to measure each stage for.
    """
    height, width = PHOTO_SHAPE
    stages = measure_stage_seconds(checkpoint, seconds, height, width)
    return {
        "image": {"width": width, "height": height, "format": "JPEG"},
        "milliseconds_of_one_core": {name: 1000 * value for name, value in stages.items()},
    }


def measure_service(
    path: Path,
    checkpoint: Checkpoint,
    choice: EngineChoice,
    flags: Sequence[str],
    clients: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """Measure the service over HTTP: throughput, latencies, start and memory.

    Every image becomes one window, so that images/s compare with windows/s of the bare engine,
    which is measured in this process before and after.

    Args:
        path: file of the checkpoint.
        choice: the engine that the service will use.
        flags: of `unet serve`.
        clients: numbers of concurrent clients, one run each.
        seconds: of each run, at least.
    """
    shape, (height, width) = choose_window(checkpoint)
    image = encode_jpeg(draw_image(height, width))
    engine = [measure_bare_engine(checkpoint, choice, shape, seconds)]
    with serving(path, *flags) as service:
        starts = [service.start_seconds]
    with serving(path, *flags) as service:
        starts.append(service.start_seconds)
        ready = service.memory()
        runs = [
            closed_loop(service.url, image, n, max(seconds, _MIN_IMAGES_PER_CLIENT * n / engine[0]))
            for n in clients
        ]
        loaded = service.memory()
    engine.append(measure_bare_engine(checkpoint, choice, shape, seconds))
    return {
        "start_seconds": starts,
        "resident_bytes": {"ready": ready.now, "loaded": loaded.now, "peak": loaded.peak}
        if ready and loaded
        else None,
        "image": {"width": width, "height": height, "format": "JPEG", "bytes": len(image)},
        "window": list(shape),
        "engine_images_per_second": engine,
        "runs": [
            run.to_json()
            | {"clients": n, "engine_fraction": run.throughput / statistics.fmean(engine)}
            for n, run in zip(clients, runs, strict=True)
        ],
    }


# --- printing ---


def _print_engine(engine: dict[str, Any]) -> None:
    peaks = " and ".join(f"{each / 1e9:.1f}" for each in engine["peak_flops_per_second"])
    print(f"\n{engine['backend']} {engine['precision']} on {engine['device']}")
    print(f"peak (matrix products) before and after: {peaks} GFLOP/s")
    print(f"{'window':>9} {'batch':>6} {'images/s':>9} {'GFLOP/s':>9} {'of peak':>8}")
    for run in engine["runs"]:
        window = "x".join(map(str, run["window"]))
        print(
            f"{window:>9} {run['batch']:6} {run['images_per_second']:9.2f} "
            f"{run['flops_per_second'] / 1e9:9.1f} {run['roofline_fraction']:8.3f}"
        )


def _print_stages(stages: dict[str, Any]) -> None:
    image, costs = stages["image"], stages["milliseconds_of_one_core"]
    print(f"\na {image['width']}x{image['height']} JPEG outside the engine, in ms of one core")
    for name, cost in (costs | {"total": sum(costs.values())}).items():
        print(f"{name:>9} {cost:6.1f}")


def _print_service(service: dict[str, Any]) -> None:
    engine = " and ".join(f"{each:.2f}" for each in service["engine_images_per_second"])
    print(
        f"\nover HTTP, a {service['image']['width']}x{service['image']['height']} JPEG = "
        f"one {'x'.join(map(str, service['window']))} window"
    )
    print(f"bare engine before and after: {engine} images/s")
    print(f"{'clients':>9} {'images/s':>9} {'of engine':>10} {'p50 s':>7} {'p99 s':>7}  responses")
    for run in service["runs"]:
        p50, p99 = (run[key] or math.nan for key in ("p50_seconds", "p99_seconds"))
        print(
            f"{run['clients']:9} {run['images_per_second']:9.2f} {run['engine_fraction']:10.3f} "
            f"{p50:7.2f} {p99:7.2f}  {format_statuses(run['statuses'])}"
        )
    first, second = service["start_seconds"]
    print(f"\nready after {first:.2f} s, and after {second:.2f} s at the second start")
    if resident := service["resident_bytes"]:
        sizes = {name: f"{size / 1e6:.0f}" for name, size in resident.items()}
        print(
            f"resident memory: {sizes['ready']} MB when ready, {sizes['loaded']} MB after the "
            f"load, {sizes['peak']} MB at the peak"
        )
