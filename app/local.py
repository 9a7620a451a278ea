"""`unet segment`: files in, masks (or outlines) out, by the service's path, without a server."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
from pathlib import Path

from tqdm import tqdm

from app.errors import ServiceError
from app.outputs import Options, Output
from app.service import Service
from app.settings import add_flags, given_flags, load_settings
from model.checkpoint import write_atomically
from model.data import IMAGE_SUFFIXES

_IN_HAND = 3
"""Images at once: one is decoded and one encoded while the engine has the third."""
_FLAGS = ("model", "weights_dir", "device", "engine", "precision", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, help="files, or folders of images")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("masks"), help="folder for the masks (masks)"
    )
    parser.add_argument(
        "--output", choices=list(map(str, Output)), default="mask", metavar="KIND",
        help=f"one of {', '.join(Output)} (mask)",
    )  # fmt: skip
    parser.add_argument("--threshold", type=_fraction, help="0..1 (the model's own)")
    add_flags(parser, _FLAGS)


def main(args: argparse.Namespace) -> int:
    """0 when every image has its mask, 1 when some could not be segmented."""
    logging.basicConfig(level=logging.WARNING, format="unet: %(message)s")
    suffix = ".geojson" if args.output == Output.POLYGONS else ".png"
    sources = _sources(args.images, args.out, suffix)
    service = Service(load_settings(**given_flags(args, _FLAGS)))
    failures = asyncio.run(_segment_all(service, sources, args))
    for path, reason in failures:
        print(f"unet: {path}: {reason}", file=sys.stderr)
    return 1 if failures else 0


async def _segment_all(
    service: Service, sources: dict[Path, Path], args: argparse.Namespace
) -> list[tuple[Path, str]]:
    await service.start_alone()
    failures: list[tuple[Path, str]] = []
    slots = asyncio.Semaphore(_IN_HAND)
    args.out.mkdir(parents=True, exist_ok=True)

    async def one(target: Path, path: Path) -> None:
        async with slots:
            try:
                with service.registry.lease(None) as model:
                    data = await asyncio.to_thread(path.read_bytes)
                    options = Options(Output(args.output), args.threshold)
                    result = await service.segmenter.segment(model, data, options, math.inf)
            except (ServiceError, OSError) as error:
                failures.append((path, str(error)))
            else:
                content = result.png if result.polygons is None else result.polygons.encode()
                target.parent.mkdir(parents=True, exist_ok=True)
                await asyncio.to_thread(write_atomically, target, content)
            bar.update()

    try:
        with tqdm(total=len(sources), unit="image", disable=not sys.stderr.isatty()) as bar:
            await asyncio.gather(*(one(target, path) for target, path in sources.items()))
    finally:
        await service.stop()
    return failures


def _sources(paths: list[Path], out: Path, suffix: str) -> dict[Path, Path]:
    """Mask -> image. The masks of a folder lie in `out` as its images lie in it.

    Raises:
        ValueError: nothing there, two images whose masks would have the same name, or a mask that
            would take the place of an image.
    """
    sources: dict[Path, Path] = {}
    for path in paths:
        for name, file in _images(path, out):
            target = out / name.with_suffix(suffix)
            if (other := sources.setdefault(target, file)) != file:
                raise ValueError(f"{other} and {file} would both become {target}")
    if not sources:
        raise ValueError(f"no images in {', '.join(map(str, paths))}")
    images = {file.resolve() for file in sources.values()}
    for target, file in sources.items():
        if target.resolve() in images:
            raise ValueError(f"the mask of {file} would replace the image {target}; give an --out")
    return sources


def _images(path: Path, out: Path) -> list[tuple[Path, Path]]:
    """(name under `path`, file): the file itself, or the images of a folder and of those in it.

    Not what is hidden, and not what lies in `out`, where masks of an earlier run may be.
    """
    if not path.is_dir():
        return [(Path(path.name), path)]
    names = [file.relative_to(path) for file in sorted(path.rglob("*"))]
    inner = out.resolve() != path.resolve()
    return [
        (name, path / name)
        for name in names
        if name.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in name.parts)
        and not (inner and (path / name).resolve().is_relative_to(out.resolve()))
    ]


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value
