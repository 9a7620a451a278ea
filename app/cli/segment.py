"""`unet segment`: segment image files with the service's pipeline, without a server."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import math
import sys
from pathlib import Path

from tqdm import tqdm

from app.batching.deadline import Deadline
from app.cli.errors import CommandError, writing
from app.cli.flags import add_flags, explicit_flags
from app.cli.sources import STANDARD, plan_outputs
from app.errors import ServiceError
from app.inference.image_group import ImageGroup
from app.inference.outputs import Options, Output
from app.inference.registry import ServedModel
from app.inference.service import Service
from app.settings import Settings, load_settings, warn_about_unknown_variables
from model.checkpoint import write_atomically
from model.files import MAX_IMAGE_BYTES, read_file, read_stream

_SETTINGS = ("model", "weights_dir", "device", "engine", "precision", "threads")


_ALL_PAGES = "all"


@dataclasses.dataclass(frozen=True)
class _Work:
    """The work on each image.

    Attributes:
        options: for its only page, or for each.
        all_pages: each page has a result of its own.
        skip_existing: leave out pages that already have a result.
    """

    options: Options
    all_pages: bool = False
    skip_existing: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", type=Path, help="images or folders of images; -: standard input"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("masks"),
        help="folder of the results; for one image also a file, or - for standard output "
        "(default: masks)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-suffix", action="store_true", help="a.jpg becomes a.jpg.png, not a.png"
    )
    parser.add_argument(
        "--skip-existing", action="store_true", help="skip images that already have a result"
    )
    parser.add_argument(
        "--output", choices=list(map(str, Output)), default="mask", metavar="KIND",
        help=f"{', '.join(Output)} (default: mask)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold",
        type=_parse_fraction,
        metavar="X",
        help="probability from which a pixel is foreground, 0..1 (default: the model's)",
    )
    parser.add_argument(
        "--page",
        type=_parse_page,
        metavar="N",
        help="page of a TIFF, from 0, or all, each with a result of its own: a-page0.png "
        "(default: the only page)",
    )
    parser.add_argument(
        "--channel",
        type=_parse_index,
        metavar="N",
        help="channel of an image, from 0 (default: all colors of a usual image)",
    )
    add_flags(parser.add_argument_group("model and engine"), Settings, _SETTINGS)


def main(args: argparse.Namespace) -> int:
    """Segment the images. Returns 1 if some failed."""
    logging.basicConfig(level=logging.WARNING, format="unet: %(message)s")
    page = None if args.page == _ALL_PAGES else args.page
    output = Output(args.output)
    options = Options((output,), args.threshold, page=page, channel=args.channel)
    suffix = options.file_type(output)[1]
    suffixes = (suffix, ".json") if output is Output.POLYGONS else (suffix,)
    outputs = plan_outputs(args.images, args.out, suffixes, keep_suffix=args.keep_suffix)
    wanted = {
        output: image
        for output, image in outputs.items()
        if args.page == _ALL_PAGES or not (args.skip_existing and output.is_file())
    }
    failed = 0
    if wanted:
        warn_about_unknown_variables()
        service = Service(load_settings(**explicit_flags(args, Settings)))
        work = _Work(options, all_pages=args.page == _ALL_PAGES, skip_existing=args.skip_existing)
        failed = asyncio.run(_segment_all(service, wanted, work))
    if args.out != STANDARD:
        place = str(args.out) if args.out in outputs else f"{args.out}/"
        skipped = len(outputs) - len(wanted)
        print(_format_summary(len(wanted) - failed, place, skipped, failed), file=sys.stderr)
    return 1 if failed else 0


def _format_summary(written: int, place: str, skipped: int, failed: int) -> str:
    parts = [f"{written} written to {place}"]
    if skipped:
        parts.append(f"{skipped} skipped")
    if failed:
        parts.append(f"{failed} failed")
    return ", ".join(parts)


async def _segment_all(service: Service, images: dict[Path, Path], work: _Work) -> int:
    """Segment images and report each failure. Returns the number of failures.

    Args:
        images: output path -> image.
        work: what to do with each.

    Raises:
        UserError: the model or the engine cannot be used.
    """
    try:
        await _start(service)
        with (
            service.registry.lease(None) as model,
            tqdm(total=len(images), unit="image", disable=not sys.stderr.isatty()) as bar,
        ):
            group = service.segmenter.group(model)

            async def segment_file(paths: tuple[Path, Path]) -> bool:
                """Whether it succeeded."""
                output, image = paths
                try:
                    await _segment_file(service, model, group, image, output, work)
                except (ServiceError, CommandError) as error:
                    tqdm.write(f"unet: {image}: {error}", file=sys.stderr)
                    return False
                finally:
                    bar.update()
                return True

            succeeded = await group.run(list(images.items()), segment_file)
            return succeeded.count(False)
    finally:
        # Python aborts if it exits while the engine computes.
        while service.batcher.elapsed():  # noqa: ASYNC110 (the batcher has no event for it)
            await asyncio.sleep(0.01)
        await service.stop()


async def _start(service: Service) -> None:
    try:
        await service.start_without_probes()
    except ServiceError as error:
        raise CommandError(f"the model cannot be used: {error}") from error


async def _segment_file(
    service: Service, model: ServedModel, group: ImageGroup, image: Path, output: Path, work: _Work
) -> None:
    """Segment an image, or each page of it."""
    data = await asyncio.to_thread(_read, image)

    async def segment(output: Path, options: Options) -> None:
        result = await service.segmenter.segment(model, data, options, Deadline.never(), group)
        (rendered,) = result.rendered.values()
        await asyncio.to_thread(_write, output, rendered.content)

    if not work.all_pages:
        await segment(output, work.options)
        return
    pages = await service.segmenter.count_pages(data)
    if pages > 1 and output == STANDARD:
        raise CommandError(f"it has {pages} pages; their results need a folder, not --out -")
    for page in range(pages):
        target = output if pages == 1 else output.with_stem(f"{output.stem}-page{page}")
        if not (work.skip_existing and target.is_file()):
            options = dataclasses.replace(work.options, page=page)
            await segment(target, options)


def _read(image: Path) -> bytes:
    """The bytes of an image file or of standard input.

    Raises:
        CommandError: the file cannot be read.
    """
    try:
        if image == STANDARD:
            return read_stream(sys.stdin.buffer, MAX_IMAGE_BYTES)
        return read_file(image, MAX_IMAGE_BYTES)
    except OSError as error:
        raise CommandError(error.strerror or str(error)) from error


def _write(output: Path, content: bytes) -> None:
    """Write a result to a file or to standard output.

    Raises:
        CommandError: the file cannot be written.
    """
    with writing(output):
        if output == STANDARD:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(output, content)


def _parse_fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value


def _parse_index(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def _parse_page(text: str) -> int | str:
    return text if text == _ALL_PAGES else _parse_index(text)
