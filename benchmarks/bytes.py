"""Measure what an image costs outside the network: `python -m benchmarks.bytes`.

Decoding, preparing, stitching, mask and PNG, in milliseconds of one core (CPU time, so that other
programs count for little), the best of several runs, for a photograph and for a microscope image of
1918×1280. Then the ways to write a PNG, side by side.

Prints tables, and JSON with --json.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from zlib_ng import zlib_ng

from app.imaging import decode, png, render
from model.config import PreprocessConfig, UNetConfig
from model.transforms import mask_and_confidence, prepare
from model.windows import Stitcher, plan_windows

HEIGHT, WIDTH = 1280, 1918
NATIVE = PreprocessConfig(intensity="percentile")
RESIZE = PreprocessConfig(mode="resize", window=((512, 512),))


@dataclasses.dataclass(frozen=True)
class CostRow:
    """One measured step, with the bytes that it produced if it encodes."""

    name: str
    milliseconds: float
    bytes_out: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs", type=int, default=7, help="runs of each step; the best counts (7)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    tables: dict[str, list[CostRow]] = {}
    for name, image, field in (
        ("photograph", *draw_photograph()),
        ("microscope", *draw_micrograph()),
    ):
        for config in (RESIZE, NATIVE):
            tables[f"{name}, {config.mode}"] = measure_request(image, field, config, args.runs)
        tables[f"{name}, ways to write the PNG"] = measure_writers(image, field, args.runs)
    for title, rows in tables.items():
        print(f"\n{title}")
        for row in rows:
            size = "" if row.bytes_out is None else f"{row.bytes_out:>10} bytes"
            print(f"  {row.name:<34}{row.milliseconds:8.2f} ms {size}")
    if args.json:
        result = {
            title: [dataclasses.asdict(row) for row in rows] for title, rows in tables.items()
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def draw_photograph() -> tuple[np.ndarray, np.ndarray]:
    """Draw (H, W, 3) uint8 with detail at every scale, and (H, W) probabilities of one object."""
    rng = np.random.default_rng(0)
    image = np.zeros((HEIGHT, WIDTH, 3))
    for scale, weight in ((200, 3000), (50, 600), (10, 80), (2, 10)):
        noise = rng.normal(size=(HEIGHT // scale + 2, WIDTH // scale + 2, 3))
        smooth = ndimage.zoom(noise, (scale, scale, 1), order=1)[:HEIGHT, :WIDTH]
        image += smooth * (weight / scale)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    inside = ((y - 640) / 400) ** 2 + ((x - 960) / 700) ** 2 < 1 + 0.05 * np.sin(x / 15)
    return (image + 128).clip(0, 255).astype(np.uint8), soften(inside)


def draw_micrograph() -> tuple[np.ndarray, np.ndarray]:
    """Draw (H, W) uint8 bright ellipses on a dark, noisy background, and their probabilities."""
    rng = np.random.default_rng(0)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    for _ in range(600):
        y, x = rng.integers(20, HEIGHT - 20), rng.integers(20, WIDTH - 20)
        a, b = rng.integers(8, 19, 2)
        rows, columns = np.ogrid[-a : a + 1, -b : b + 1]
        inside[y - a : y + a + 1, x - b : x + b + 1][(rows / a) ** 2 + (columns / b) ** 2 < 1] = (
            True
        )
    field = soften(inside)
    image = 20 + 120 * field + rng.normal(0, 4, field.shape)
    return image.clip(0, 255).astype(np.uint8), field


def soften(inside: np.ndarray) -> np.ndarray:
    """Turn a mask into probabilities as a network returns them, less certain at edges."""
    noise = np.random.default_rng(1).normal(0, 0.002, inside.shape)
    return (
        (ndimage.gaussian_filter(inside.astype(float), 1.5) + noise).clip(0, 1).astype(np.float32)
    )


def measure_request(
    image: np.ndarray, field: np.ndarray, config: PreprocessConfig, runs: int
) -> list[CostRow]:
    """Measure the steps of one request, from a JPEG to a mask, and their sum."""
    rows: list[CostRow] = []

    def step(name: str, function: Callable[[], Any]) -> Any:
        seconds, result = measure_cost(function, runs)
        size = len(result) if isinstance(result, bytes) else None
        rows.append(CostRow(name, seconds * 1e3, size))
        return result

    data = save(image, "JPEG", quality=90)
    header = step("header", lambda: decode.inspect(data, max_pixels=100_000_000))
    enough = config.resized if config.mode == "resize" else None
    decoded = step("decode", lambda: decode.decode(data, header, at_least=enough))
    pixels = step("prepare", lambda: prepare(decoded, config))
    plan = plan_windows(*pixels.shape[:2], UNetConfig(), config)
    cuts = [np.empty((*window.shape, 3), np.uint8) for window in plan.windows]

    def cut() -> None:
        for window, out in zip(plan.windows, cuts, strict=True):
            plan.cut(pixels, window, out)

    step(f"cut ({plan.count} windows)", cut)
    small = np.asarray(Image.fromarray(field).resize(pixels.shape[1::-1]))
    parts = []
    for window in plan.windows:
        top, left = plan.rows.starts[window.row], plan.columns.starts[window.column]
        part = np.zeros((1, *window.shape), np.float32)
        seen = small[top : top + window.shape[0], left : left + window.shape[1]]
        part[0, : seen.shape[0], : seen.shape[1]] = seen
        parts.append(part)

    def stitch() -> np.ndarray:
        stitcher = Stitcher(plan, 1)
        for window, part in zip(plan.windows, parts, strict=True):
            stitcher.add(window, part)
        return stitcher.result()

    stitched = step("stitch", stitch)
    mask, _ = step(
        "mask and confidence", lambda: mask_and_confidence(stitched, HEIGHT, WIDTH, config)
    )
    step("coverage", lambda: np.count_nonzero(mask) / mask.size)
    step("encode the mask", lambda: png.encode_mask(mask))
    total = sum(row.milliseconds for row in rows)
    both = sum(row.milliseconds for row in rows if row.name in ("decode", "encode the mask"))
    return [*rows, CostRow("decode + encode", both), CostRow("total", total)]


def measure_writers(image: np.ndarray, field: np.ndarray, runs: int) -> list[CostRow]:
    """Measure `app.imaging.png` and Pillow for each output, and other ways to compress masks."""
    mask = np.where(field >= 0.5, np.uint8(255), np.uint8(0))
    wide = np.rint(field * 65535).astype(np.uint16)
    labels = ndimage.label(mask)[0].astype(np.uint16)
    color = render.overlay(image, mask)
    cut = render.cutout(image, render.soften_edge(mask, field - np.float32(0.5)))
    ways: list[tuple[str, Callable[[], bytes]]] = [
        ("mask, app.imaging.png", lambda: png.encode_mask(mask)),
        ("mask, Pillow, level 1", lambda: save(mask, "PNG", compress_level=1)),
        ("mask, Pillow, level 6", lambda: save(mask, "PNG", compress_level=6)),
        ("mask of 1 bit, Pillow, level 1", lambda: save(mask > 0, "PNG", compress_level=1)),
        ("probability, app.imaging.png", lambda: png.encode_grey16(wide)),
        ("probability, Pillow, level 1", lambda: save(wide, "PNG", compress_level=1)),
        ("instances, app.imaging.png", lambda: png.encode_grey16(labels)),
        ("instances, Pillow, level 1", lambda: save(labels, "PNG", compress_level=1)),
        ("overlay, app.imaging.png", lambda: png.encode_picture(color)),
        ("overlay, Pillow, level 1", lambda: save(color, "PNG", compress_level=1)),
        ("cutout, app.imaging.png", lambda: png.encode_picture(cut)),
        ("cutout, Pillow, level 1", lambda: save(cut, "PNG", compress_level=1)),
    ]
    strategies = {"default": 0, "filtered": 1, "Huffman only": 2, "runs": 3, "fixed": 4}
    up = np.diff(mask, axis=0, prepend=np.uint8(0))
    for name, lines in (("no filter", mask), ("Up", up)):
        for library, level, (strategy, number) in itertools.product(
            (zlib, zlib_ng), (1, 6), strategies.items()
        ):
            title = f"{library.__name__.split('.')[0]}, {name}, {level}, {strategy}"
            ways.append((title, partial(deflate, library, lines, level, number)))
    rows = []
    for name, function in ways:
        seconds, data = measure_cost(function, runs)
        rows.append(CostRow(name, seconds * 1e3, len(data)))
    return rows


def deflate(library: Any, rows: np.ndarray, level: int, strategy: int) -> bytes:
    compressor = library.compressobj(level, strategy=strategy)
    return bytes(compressor.compress(rows) + compressor.flush())


def save(image: np.ndarray, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, **options)
    return buffer.getvalue()


def measure_cost(function: Callable[[], Any], runs: int) -> tuple[float, Any]:
    """Return the least CPU seconds of `runs` calls, and the result of the last."""
    function()
    least = float("inf")
    for _ in range(runs):
        start = time.process_time()
        result = function()
        least = min(least, time.process_time() - start)
    return least, result


if __name__ == "__main__":
    main()
