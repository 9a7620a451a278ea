"""`unet bench`: how fast one model is on this machine, and what of the machine that is.

Speed as ratios of one run: the engine's operations a second over those of a plain matrix product at
the same precision, and the images a second over HTTP over those of the bare engine.
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

from app.cli.bench.engines import bare_engine, measure_engine
from app.cli.bench.load import answers, closed_loop
from app.cli.bench.machine import in_words, machine
from app.cli.bench.serving import serving
from app.cli.bench.stages import PHOTO, drawn, encoded, one_window, stage_seconds
from app.cli.errors import CommandError, check_parent_folder, writing
from app.cli.flags import add_flags, explicit_flags
from app.engine.selection import EngineChoice, choose_engines, resolve
from app.errors import EngineUnavailable
from app.settings import Settings, load_settings
from model.checkpoint import SUFFIX, Checkpoint, load_checkpoint, write_atomically

_PRECISIONS = ("fp32", "int8", "bf16", "fp16")
_TURNS = 4
"""Images that each client sends over HTTP at least: the first and the last meet less company."""
_FLAGS = ("weights_dir", "device", "engine", "precision", "threads", "max_batch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="a checkpoint's file, or a name in --weights-dir (UNET_MODEL)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of measuring for each figure (2)"
    )
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[8, 16], help="over HTTP at once (8 16)"
    )
    parser.add_argument("--no-http", action="store_true", help="leave the service out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
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
    choices = choices_of(checkpoint, settings)
    default = resolve(choose(settings, settings.precision), checkpoint)
    report: dict[str, Any] = {
        "machine": machine(default.device),
        "model": {"id": checkpoint.id, "architecture": checkpoint.architecture.to_json()},
        "default": dataclasses.asdict(default),
        "engines": [],
    }
    print(in_words(report["machine"]))
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


# --- which engines ---


def choose(settings: Settings, precision: str) -> EngineChoice:
    """The engine of the first device that the settings name, at a precision.

    Raises:
        EngineUnavailable: there is none.
    """
    return choose_engines(
        device=settings.device,
        engine=settings.engine,
        precision=precision,
        threads=settings.threads,
        max_batch=settings.max_batch,
    )[0]


def choices_of(checkpoint: Checkpoint, settings: Settings) -> list[EngineChoice]:
    """An engine for each precision to be had; of the one asked for alone, if one is.

    Raises:
        EngineUnavailable: there is none.
    """
    wanted = _PRECISIONS if settings.precision == "auto" else (settings.precision,)
    found, refusals = [], []
    for precision in wanted:
        try:
            found.append(resolve(choose(settings, precision), checkpoint))
        except EngineUnavailable as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    return found


def _checkpoint_file(name: str | None, settings: Settings) -> Path:
    if name and (name.endswith(SUFFIX) or Path(name).is_file()):
        return Path(name)
    return settings.weights_dir / f"{name or settings.model}{SUFFIX}"


# --- measuring: each gives what stands in the JSON ---


def measure_stages(checkpoint: Checkpoint, seconds: float) -> dict[str, Any]:
    """What the image by which services like this are compared costs outside the engine."""
    height, width = PHOTO
    stages = stage_seconds(checkpoint, seconds, height, width)
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
    """What the service makes of the engine, how soon it is ready, and what it holds.

    Every image becomes one window, so that windows of the bare engine are what masks are held
    against; the engine is measured in this process, before and after.
    """
    shape, (height, width) = one_window(checkpoint)
    image = encoded(drawn(height, width))
    engine = [bare_engine(checkpoint, choice, shape, seconds)]
    with serving(path, *flags) as service:
        starts = [service.start_seconds]
    with serving(path, *flags) as service:
        starts.append(service.start_seconds)
        ready = service.memory()
        runs = [
            closed_loop(service.url, image, n, max(seconds, _TURNS * n / engine[0]))
            for n in clients
        ]
        loaded = service.memory()
    engine.append(bare_engine(checkpoint, choice, shape, seconds))
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
            | {"clients": n, "of_the_engine": run.throughput / statistics.fmean(engine)}
            for n, run in zip(clients, runs, strict=True)
        ],
    }


# --- showing ---


def _print_engine(engine: dict[str, Any]) -> None:
    roofs = " and ".join(f"{each / 1e9:.1f}" for each in engine["roof_flops_per_second"])
    print(f"\n{engine['backend']} {engine['precision']} on {engine['device']}")
    print(f"a matrix product before and after: {roofs} GFLOP/s")
    print(f"{'window':>9} {'batch':>6} {'images/s':>9} {'GFLOP/s':>9} {'of the roof':>12}")
    for run in engine["runs"]:
        window = "x".join(map(str, run["window"]))
        print(
            f"{window:>9} {run['batch']:6} {run['images_per_second']:9.2f} "
            f"{run['flops_per_second'] / 1e9:9.1f} {run['of_the_roof']:12.3f}"
        )


def _print_stages(stages: dict[str, Any]) -> None:
    image, costs = stages["image"], stages["milliseconds_of_one_core"]
    print(f"\na {image['width']}x{image['height']} JPEG outside the engine, in ms of one core")
    for name, cost in (costs | {"together": sum(costs.values())}).items():
        print(f"{name:>9} {cost:6.1f}")


def _print_service(service: dict[str, Any]) -> None:
    engine = " and ".join(f"{each:.2f}" for each in service["engine_images_per_second"])
    print(
        f"\nover HTTP, a {service['image']['width']}x{service['image']['height']} JPEG = "
        f"one {'x'.join(map(str, service['window']))} window"
    )
    print(f"the bare engine before and after: {engine} images/s")
    print(f"{'clients':>9} {'images/s':>9} {'of engine':>10} {'p50 s':>7} {'p99 s':>7}  answers")
    for run in service["runs"]:
        p50, p99 = (run[key] or math.nan for key in ("p50_seconds", "p99_seconds"))
        print(
            f"{run['clients']:9} {run['images_per_second']:9.2f} {run['of_the_engine']:10.3f} "
            f"{p50:7.2f} {p99:7.2f}  {answers(run['statuses'])}"
        )
    first, second = service["start_seconds"]
    print(f"\nready after {first:.2f} s, the second time {second:.2f} s")
    if resident := service["resident_bytes"]:
        sizes = {name: f"{size / 1e6:.0f}" for name, size in resident.items()}
        print(
            f"resident: {sizes['ready']} MB when ready, {sizes['loaded']} MB after the load, "
            f"{sizes['peak']} MB at most"
        )
