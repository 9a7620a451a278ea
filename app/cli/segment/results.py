"""Files of images and results: reading, what exists already, writing, the table of all images.

Knows neither engines nor HTTP.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TextIO

from app.cli.errors import CommandError, reading, writing
from app.cli.segment.sources import STANDARD, Target
from app.inference.outputs import FileFormat, Options, Output
from model.checkpoint import write_atomically
from model.files import MAX_IMAGE_BYTES, read_file, read_stream

TABLE_NAME = "measurements.csv"
"""The measurements of all images, in the folder of the results."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The work on each image.

    Attributes:
        options: for its only page, or for each.
        all_pages: segment every page of a file.
        skip_existing: leave out what already has its results.
    """

    options: Options
    all_pages: bool = False
    skip_existing: bool = False

    @cached_property
    def endings(self) -> dict[Output, str]:
        """How the names of an image's results end."""
        return self.options.file_endings()

    @property
    def stacked(self) -> list[Output]:
        """The outputs of which all pages of a file become one TIFF."""
        if not self.all_pages or self.options.format is not FileFormat.TIFF:
            return []
        return [output for output in self.options.outputs if output.is_picture]

    @property
    def by_page(self) -> list[Output]:
        """The outputs of which each page of a file with several has its own."""
        return [output for output in self.options.outputs if output not in self.stacked]


class ResultFiles:
    """The results of all images.

    Args:
        targets: where the results of each image go.
        table: receives the measurements of all images; None for none.

    Raises:
        CommandError: the table would replace a result.
    """

    def __init__(self, work: Work, targets: Sequence[Target], table: Path | None = None) -> None:
        self._work = work
        self._table = table
        self._images = {each.image.resolve() for each in targets if each.image != STANDARD}
        self._owners = {
            target.locate(ending): target for target in targets for ending in work.endings.values()
        }
        self._measured: dict[Target, dict[int | None, Path]] = {target: {} for target in targets}
        if table in self._owners:
            raise CommandError(
                f"{self._owners[table].image} and the table of all images would both become "
                f"{table}; use --keep-suffix to keep them apart"
            )

    def skip(self, target: Target, pages: int = 1) -> bool:
        """Whether an image is left out because it has all results, which the table includes."""
        loose = range(pages) if pages > 1 else [None]
        wanted: list[tuple[Output, int | None]] = [(output, None) for output in self._work.stacked]
        wanted += [(output, page) for page in loose for output in self._work.by_page]
        return self._skip(target, wanted)

    def skip_page(self, target: Target, page: int) -> bool:
        """Whether one page of several is left out in the same way, whatever stacks there are."""
        return self._skip(target, [(output, page) for output in self._work.by_page])

    def write(self, target: Target, page: int | None, outputs: Mapping[Output, bytes]) -> None:
        """Write outputs of an image.

        Args:
            page: of a file with several, from 0; None for the only one, and for stacks.

        Raises:
            CommandError: a file cannot be written, or is an image or the result of another.
        """
        for output, content in outputs.items():
            path = target.locate(self._work.endings[output], page)
            self._claim(path, target)
            _write(path, content)
            self._note(output, target, page, path)

    def write_table(self) -> None:
        """Join the measurements of all images. Columns that an image does not have are empty.

        Raises:
            CommandError: a file cannot be read or written.
        """
        if self._table is None or not any(self._measured.values()):
            return
        part = self._table.with_name(f".{self._table.name}.part")
        with writing(self._table):
            try:
                with part.open("w", encoding="utf-8", newline="") as file:
                    self._join_measurements(file)
                part.replace(self._table)
            finally:
                part.unlink(missing_ok=True)

    def _join_measurements(self, file: TextIO) -> None:
        """Write a line for each object of each image: the image, the page, and its measurements."""
        columns = ["image", *(["page"] if self._work.all_pages else [])]
        for path in self._list_measurements():
            with reading(path), path.open(encoding="utf-8", newline="") as part:
                columns += [name for name in next(csv.reader(part), []) if name not in columns]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for path, image in self._list_measurements().items():
            with reading(path), path.open(encoding="utf-8", newline="") as part:
                for row in csv.DictReader(part):
                    writer.writerow(row | image)

    def _list_measurements(self) -> dict[Path, dict[str, str | int]]:
        """The table of each image, and the columns that name the image, in the order of images."""
        found: dict[Path, dict[str, str | int]] = {}
        for target, pages in self._measured.items():
            for page, path in sorted(pages.items(), key=lambda item: item[0] or 0):
                number = {"page": page or 0} if self._work.all_pages else {}
                found[path] = {"image": target.name, **number}
        return found

    def _skip(self, target: Target, wanted: Sequence[tuple[Output, int | None]]) -> bool:
        if not self._work.skip_existing:
            return False
        endings = self._work.endings
        paths = [target.locate(endings[output], page) for output, page in wanted]
        if not all(path.is_file() for path in paths):
            return False
        for (output, page), path in zip(wanted, paths, strict=True):
            self._note(output, target, page, path)
        return True

    def _claim(self, path: Path, target: Target) -> None:
        """Check that no other image has this result: the pages of a file are known only now."""
        owner = self._owners.setdefault(path, target)
        if owner is not target:
            raise CommandError(f"{path} is already the result of {owner.image}")
        if path.resolve() in self._images:
            raise CommandError(f"its result would replace the image {path}; use another --out")

    def _note(self, output: Output, target: Target, page: int | None, path: Path) -> None:
        """Remember measurements for the table."""
        if output is Output.MEASUREMENTS:
            self._measured[target][page] = path


def read_image(image: Path) -> bytes:
    """Read an image file or standard input.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        if image == STANDARD:
            return read_stream(sys.stdin.buffer, MAX_IMAGE_BYTES)
        return read_file(image, MAX_IMAGE_BYTES)
    except OSError as error:
        raise CommandError(error.strerror or str(error)) from error


def _write(path: Path, content: bytes) -> None:
    """Write a result to a file or to standard output.

    Raises:
        CommandError: the file cannot be written.
    """
    with writing(path):
        if path == STANDARD:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
