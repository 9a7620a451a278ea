"""`unet segment`: segment image files, in this process or through a running service."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.errors import CommandError
from app.cli.flags import add_flags, explicit_flags
from app.cli.segment.results import TABLE_NAME, ResultFiles, Work
from app.cli.segment.run import Report
from app.cli.segment.sources import STANDARD, Target, is_file, plan_targets
from app.cli.segment.storage import parse_location
from app.cli.segment.wording import describe_error
from app.errors import InvalidRequest
from app.inference.outputs import FileFormat, Options, Output
from app.settings import KEY_VARIABLE, Settings, load_settings, warn_about_unknown_variables

if TYPE_CHECKING:
    # argparse does not export the type of a group.
    from argparse import _ArgumentGroup as Group

_ENGINE_SETTINGS = ("weights_dir", "device", "engine", "precision", "threads")
_ALL_PAGES = "all"
_OTHER_SUFFIXES = {Output.POLYGONS: (".json",)}
"""Suffixes that --out may have for an output, besides that of its files."""
_TIFF_SUFFIXES = (".tif",)
_EXAMPLES = """\
examples:
  unet segment images/ -o masks/                          a folder, and the folders in it
  unet segment cells.png -o mask.png                      one file
  cat cells.png | unet segment - -o - > mask.png          a pipe
  unet segment images/ -o results/ --output mask --output measurements
                                                          several outputs, and one table of all
  unet segment stack.tif --page all --format tiff         one TIFF with the masks of all pages
  unet segment images/ -o masks/ --skip-existing          resume, or add new images
  unet segment images/ -o masks/ --server http://gpu:8000 through a running service
  unet segment s3://bucket/images -o s3://bucket/masks --ray auto --skip-existing
                                                          on a Ray cluster
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "images",
        nargs="+",
        type=parse_location,
        help="images or folders of images; -: standard input; with --ray one folder, also an "
        "address such as s3://bucket/images",
    )
    _add_result_arguments(parser.add_argument_group("results"))
    _add_image_arguments(parser.add_argument_group("images"))
    engine = parser.add_argument_group("model and engine")
    add_flags(engine, Settings, ("model", *_ENGINE_SETTINGS))
    _add_server_arguments(parser.add_argument_group("running service"))
    _add_ray_arguments(parser.add_argument_group("Ray cluster"))


def _add_result_arguments(group: Group) -> None:
    group.add_argument(
        "-o", "--out", type=parse_location, default=Path("masks"),
        help="folder of the results; for one result of one image also a file, or - for standard "
        "output (default: masks)",
    )  # fmt: skip
    group.add_argument(
        "--keep-suffix", action="store_true", help="a.jpg becomes a.jpg.png, not a.png"
    )
    group.add_argument(
        "--skip-existing", action="store_true", help="skip images that already have all results"
    )
    group.add_argument(
        "--output", choices=list(map(str, Output)), action="append", metavar="KIND",
        help=f"{', '.join(Output)}; repeat it for several: a-mask.png, a-overlay.png (default: "
        f"mask). Measurements of all images are also joined in {TABLE_NAME}",
    )  # fmt: skip
    group.add_argument(
        "--format", type=FileFormat, choices=list(FileFormat), default=FileFormat.PNG,
        metavar="FORMAT",
        help="of pictures: png, tiff, or webp for cutout, overlay and preview (default: png)",
    )  # fmt: skip
    group.add_argument(
        "--min-area", type=_parse_index, default=0, metavar="N",
        help="remove objects of fewer pixels (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--exclude-edges", action="store_true", help="remove objects that touch the image's edge"
    )
    group.add_argument(
        "--background", type=_parse_color, metavar="RRGGBB",
        help="color behind a cutout (default: transparent)",
    )  # fmt: skip


def _add_image_arguments(group: Group) -> None:
    group.add_argument(
        "--threshold", type=_parse_fraction, metavar="X",
        help="probability from which a pixel is foreground, 0..1 (default: the model's)",
    )  # fmt: skip
    group.add_argument(
        "--page", type=_parse_page, metavar="N",
        help="page of a TIFF, from 0, or all: a-page0.png, a-page1.png; with --format tiff one "
        "stack (default: the only page)",
    )  # fmt: skip
    group.add_argument(
        "--channel", type=_parse_index, metavar="N",
        help="channel of an image, from 0 (default: all colors of a usual image)",
    )  # fmt: skip
    group.add_argument(
        "--percentiles", type=_parse_percentiles, metavar="LOW,HIGH",
        help="percentiles of the image's values that become black and white, 0..100 (default: the "
        "model's)",
    )  # fmt: skip
    group.add_argument(
        "--pixel-size", type=_parse_positive, metavar="X",
        help="in micrometres, for measurements (default: what the file says)",
    )  # fmt: skip


def _add_server_arguments(group: Group) -> None:
    group.add_argument(
        "--server", metavar="URL",
        help="segment by the service at this URL, for example http://localhost:8000",
    )  # fmt: skip
    group.add_argument(
        "--key", metavar="KEY", help=f"API key of the service (variable: {KEY_VARIABLE})"
    )
    group.add_argument(
        "--timeout", type=_parse_positive, default=600.0, metavar="S",
        help="seconds for one image, including the time to wait while the service is busy or "
        "restarts (default: 600)",
    )  # fmt: skip
    group.add_argument(
        "--concurrency", type=_parse_count, default=4, metavar="N",
        help="images in flight (default: 4)",
    )  # fmt: skip


def _add_ray_arguments(group: Group) -> None:
    group.add_argument(
        "--ray", metavar="ADDRESS",
        help="segment a folder on this Ray cluster: HOST:PORT, auto (one of this machine) or local "
        "(a temporary one)",
    )  # fmt: skip
    group.add_argument(
        "--actors", type=_parse_count, metavar="N",
        help="engines on the cluster, each with --threads CPUs (default: as many as have room)",
    )  # fmt: skip
    group.add_argument(
        "--actor-gpus", type=_parse_positive, metavar="X",
        help="GPUs of an engine, also a fraction (default: 1 with --device cuda, otherwise none)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Segment the images. Returns 1 if some failed."""
    logging.basicConfig(level=logging.WARNING, format="unet: %(message)s")
    work = _read_work(args)
    _check_place(args)
    if args.ray:
        return _segment_on_ray(args, work)
    output = work.options.outputs[0]
    suffixes = _TIFF_SUFFIXES if work.options.format is FileFormat.TIFF else ()
    targets = plan_targets(
        args.images,
        args.out,
        list(work.endings.values()),
        suffixes=_OTHER_SUFFIXES.get(output, suffixes),
        keep_suffix=args.keep_suffix,
    )
    has_table = Output.MEASUREMENTS in work.options.outputs and not is_file(args.out)
    files = ResultFiles(work, targets, args.out / TABLE_NAME if has_table else None)
    # The number of pages is known only after reading a file.
    wanted = [target for target in targets if work.all_pages or not files.skip(target)]
    report = Report(skipped=len(targets) - len(wanted))
    try:
        if wanted and args.server:
            _segment_remotely(args, wanted, work, files, report)
        elif wanted:
            _segment_locally(args, wanted, work, files, report)
        files.write_table()
    finally:
        for image, reason in report.failures:
            print(f"unet: {image}: {reason}", file=sys.stderr)
    if args.out != STANDARD:
        place = str(args.out) if is_file(args.out) else f"{args.out}/"
        print(report.summarize(place), file=sys.stderr)
    return 1 if report.failed else 0


def _check_place(args: argparse.Namespace) -> None:
    """Check that the images and the results are where the way of segmenting them can reach them.

    Raises:
        CommandError: they are not.
    """
    if not args.ray:
        for flag, value in (("--actors", args.actors), ("--actor-gpus", args.actor_gpus)):
            if value is not None:
                raise CommandError(f"{flag} needs --ray")
        for location in (*args.images, args.out):
            if not isinstance(location, Path):
                raise CommandError(f"{location} is an address, which needs --ray")
        return
    if args.server:
        raise CommandError("--ray and --server are two ways to segment; leave one out")
    (source, *others) = args.images
    if others or source == STANDARD or (isinstance(source, Path) and not source.is_dir()):
        raise CommandError("--ray segments one folder")
    if isinstance(args.out, Path) and is_file(args.out):
        raise CommandError(f"--out {args.out} is one file; --ray needs a folder")


def _segment_locally(
    args: argparse.Namespace,
    targets: list[Target],
    work: Work,
    files: ResultFiles,
    report: Report,
) -> None:
    from app.cli.segment.local import segment_locally

    warn_about_unknown_variables()
    settings = load_settings(**explicit_flags(args, Settings))
    asyncio.run(segment_locally(settings, targets, work, files, report))


def _segment_remotely(
    args: argparse.Namespace,
    targets: list[Target],
    work: Work,
    files: ResultFiles,
    report: Report,
) -> None:
    from app.cli.segment.remote import Connection, segment_remotely

    settings = explicit_flags(args, Settings)
    model = settings.pop("model", None)
    if settings:
        flag = "--" + next(iter(settings)).replace("_", "-")
        raise CommandError(f"{flag} does not apply to a running service; leave it out")
    key = args.key or os.environ.get(KEY_VARIABLE)
    connection = Connection(args.server, key, model, args.timeout, args.concurrency)
    asyncio.run(segment_remotely(connection, targets, work, files, report))


def _segment_on_ray(args: argparse.Namespace, work: Work) -> int:
    """Segment a folder on a cluster. Returns 1 if images failed."""
    try:
        from app.cli.segment.ray_driver import FAILURES_NAME, ClusterOptions, segment_on_ray
    except ImportError as error:
        raise CommandError(f"--ray needs pip install 'unet-server[ray]' ({error})") from None

    from app.cli.segment.folder import Folder

    warn_about_unknown_variables()
    settings = load_settings(**explicit_flags(args, Settings))
    options = ClusterOptions(args.ray, args.actors, args.actor_gpus)
    report = Report()
    segment_on_ray(
        options, settings, Folder(args.images[0], args.out, args.keep_suffix), work, report
    )
    for image, reason in report.failures:
        print(f"unet: {image}: {reason}", file=sys.stderr)
    if report.failed:
        print(f"unet: all failures are in {args.out / FAILURES_NAME}", file=sys.stderr)
    print(report.summarize(f"{args.out}/"), file=sys.stderr)
    return 1 if report.failed else 0


def _read_work(args: argparse.Namespace) -> Work:
    """The work from the flags.

    Raises:
        CommandError: they do not fit together.
    """
    outputs = tuple(map(Output, args.output or ["mask"]))
    for output in outputs:
        if outputs.count(output) > 1:
            raise CommandError(f"--output {output} is given twice")
    options = Options(
        outputs,
        args.threshold,
        page=None if args.page == _ALL_PAGES else args.page,
        channel=args.channel,
        percentiles=args.percentiles,
        min_area=args.min_area,
        exclude_edges=args.exclude_edges,
        pixel_size=args.pixel_size,
        background=args.background,
        format=args.format,
    )
    try:
        options.check_values()
    except InvalidRequest as error:
        raise CommandError(describe_error(error)) from error
    return Work(options, all_pages=args.page == _ALL_PAGES, skip_existing=args.skip_existing)


def _parse_fraction(text: str) -> float:
    value = _parse_number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value


def _parse_positive(text: str) -> float:
    value = _parse_number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _parse_percentiles(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    values = _parse_number(low), _parse_number(high)
    if not 0 <= values[0] < values[1] <= 100:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not LOW,HIGH with 0 <= LOW < HIGH <= 100, for example 1,99.8"
        )
    return values


def _parse_color(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"#?[0-9a-fA-F]{6}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not RRGGBB, for example ffffff")
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue


def _parse_index(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def _parse_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _parse_page(text: str) -> int | str:
    return text if text == _ALL_PAGES else _parse_index(text)
