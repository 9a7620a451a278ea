"""`unet segment`: files in, masks (or outlines) out, by the service's path, without a server."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
from pathlib import Path

from tqdm import tqdm

from app.cli.sources import STANDARD, plan_outputs
from app.errors import ServiceError
from app.inference.outputs import Options, Output
from app.inference.service import Service
from app.settings import add_flags, given_flags, load_settings
from model.checkpoint import write_atomically

_IN_HAND = 3
"""Images at once: one is decoded and one encoded while the engine has the third."""
_FLAGS = ("model", "weights_dir", "device", "engine", "precision", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", type=Path, help="files, or folders of images; - is standard input"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("masks"),
        help="folder for the masks; of one image also its file, or - for standard output (masks)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-suffix", action="store_true", help="a.jpg becomes a.jpg.png, not a.png"
    )
    parser.add_argument(
        "--skip-existing", action="store_true", help="leave out images whose masks are there"
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
    suffixes = (".geojson", ".json") if args.output == Output.POLYGONS else (".png",)
    masks = plan_outputs(args.images, args.out, suffixes, keep_suffix=args.keep_suffix)
    wanted = {
        mask: image for mask, image in masks.items() if not (args.skip_existing and mask.is_file())
    }
    options = Options(Output(args.output), args.threshold)
    failed = 0
    if wanted:
        service = Service(load_settings(**given_flags(args, _FLAGS)))
        failed = asyncio.run(_segment_all(service, wanted, options))
    if args.out != STANDARD:
        made, there = len(wanted) - failed, len(masks) - len(wanted)
        place = args.out if args.out in masks else f"{args.out}/"
        parts = [f"{made} {'mask' if made == 1 else 'masks'} in {place}"]
        parts += [f"{there} there before"] if there else []
        parts += [f"{failed} failed"] if failed else []
        print(", ".join(parts), file=sys.stderr)
    return 1 if failed else 0


async def _segment_all(service: Service, images: dict[Path, Path], options: Options) -> int:
    """How many failed; each is told as it happens.

    Args:
        images: mask -> image.
    """
    await service.start_without_probes()
    failed = 0
    waiting = iter(images.items())

    async def work() -> None:
        nonlocal failed
        for mask, image in waiting:  # which all share
            try:
                with service.registry.lease(None) as model:
                    data = await asyncio.to_thread(_read, image)
                    result = await service.segmenter.segment(model, data, options, math.inf)
                content = result.png if result.polygons is None else result.polygons.encode()
                await asyncio.to_thread(_write, mask, content)
            except (ServiceError, OSError) as error:
                failed += 1
                reason = (isinstance(error, OSError) and error.strerror) or error
                tqdm.write(f"unet: {image}: {reason}", file=sys.stderr)
            bar.update()

    try:
        with tqdm(total=len(images), unit="image", disable=not sys.stderr.isatty()) as bar:
            async with asyncio.TaskGroup() as group:  # of which none is left behind by an error
                for _ in range(_IN_HAND):
                    group.create_task(work())
    finally:
        # A process that ends while its engine computes is aborted.
        while service.batcher.elapsed():  # noqa: ASYNC110 (there is no event for it)
            await asyncio.sleep(0.01)
        await service.stop()
    return failed


def _read(image: Path) -> bytes:
    return sys.stdin.buffer.read() if image == STANDARD else image.read_bytes()


def _write(mask: Path, content: bytes) -> None:
    """
    Raises:
        OSError: it cannot be written; the message names it.
    """
    try:
        if mask == STANDARD:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            mask.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(mask, content)
    except OSError as error:
        raise OSError(f"{mask} cannot be written: {error.strerror}") from error


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value
