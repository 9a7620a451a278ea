"""Files of images and results: reading, what exists already, writing, the table of all images.

Knows neither engines nor HTTP.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from app.cli.errors import CommandError, reading, writing
from app.cli.segment import storage
from app.cli.segment.sources import STANDARD, Target
from app.cli.segment.storage import AnyPath
from app.inference.outputs import FileFormat, Options, Output
from model.files import MAX_IMAGE_BYTES, read_stream

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


Measurements = Iterable[tuple[AnyPath, Mapping[str, str | int]]]
"""The table of each image, and the columns that name the image and its page."""


class ResultFiles:
    """The results of all images.

    Args:
        targets: where the results of each image go.
        table: receives the measurements of all images; None for none.
        exists: whether there is a file at a path.

    Raises:
        CommandError: the table would replace a result.
    """

    def __init__(
        self,
        work: Work,
        targets: Sequence[Target],
        table: Path | None = None,
        exists: Callable[[AnyPath], bool] = lambda path: path.is_file(),
    ) -> None:
        self._work = work
        self._targets = targets
        self._table = table
        self._exists = exists
        self._owners = {
            target.locate(ending): target for target in targets for ending in work.endings.values()
        }
        self._measured: dict[Target, dict[int | None, AnyPath]] = {target: {} for target in targets}
        if table is not None and table in self._owners:
            raise CommandError(
                f"{self._owners[table].image} and the table of all images would both become "
                f"{table}; use --keep-suffix to keep them apart"
            )

    @cached_property
    def _images(self) -> set[AnyPath]:
        return {each.image.resolve() for each in self._targets if each.image != STANDARD}

    def measured_pages(self, target: Target) -> list[int | None]:
        """The pages of an image whose measurements exist; None is its only page."""
        return list(self._measured[target])

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
        """Join the measurements of all images.

        Raises:
            CommandError: a file cannot be read or written.
        """
        if self._table is not None and any(self._measured.values()):
            write_table(self._table, self._list_measurements, self._work.all_pages)

    def _list_measurements(self) -> Measurements:
        """The table of each image, in the order of images."""
        for target, pages in self._measured.items():
            for page, path in sorted(pages.items(), key=lambda item: item[0] or 0):
                number = {"page": page or 0} if self._work.all_pages else {}
                yield path, {"image": target.name, **number}

    def _skip(self, target: Target, wanted: Sequence[tuple[Output, int | None]]) -> bool:
        if not self._work.skip_existing:
            return False
        endings = self._work.endings
        paths = [target.locate(endings[output], page) for output, page in wanted]
        if not all(map(self._exists, paths)):
            return False
        for (output, page), path in zip(wanted, paths, strict=True):
            self._note(output, target, page, path)
        return True

    def _claim(self, path: AnyPath, target: Target) -> None:
        """Check that no other image has this result: the pages of a file are known only now."""
        owner = self._owners.setdefault(path, target)
        if owner is not target:
            raise CommandError(f"{path} is already the result of {owner.image}")
        if path.resolve() in self._images:
            raise CommandError(f"its result would replace the image {path}; use another --out")

    def _note(self, output: Output, target: Target, page: int | None, path: AnyPath) -> None:
        """Remember measurements for the table."""
        if output is Output.MEASUREMENTS:
            self._measured[target][page] = path


def write_table(
    table: AnyPath, list_measurements: Callable[[], Measurements], all_pages: bool
) -> None:
    """Join the measurements of several images. Columns that an image does not have are empty.

    Args:
        list_measurements: called twice, because all columns must be known before the first line.
        all_pages: there is a column for the page.

    Raises:
        CommandError: a file cannot be read or written.
    """
    columns = ["image", *(["page"] if all_pages else [])]
    for path, _ in list_measurements():
        header = next(csv.reader(_read_text(path)), [])
        columns += [name for name in header if name not in columns]
    with storage.replacing(table) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for path, image in list_measurements():
            for row in csv.DictReader(_read_text(path)):
                writer.writerow({**row, **image})


def _read_text(path: AnyPath) -> io.StringIO:
    with reading(path):
        return io.StringIO(storage.read(path, MAX_IMAGE_BYTES).decode(), newline="")


def read_image(image: AnyPath) -> bytes:
    """Read an image file or standard input.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        if image == STANDARD:
            return read_stream(sys.stdin.buffer, MAX_IMAGE_BYTES)
        return storage.read(image, MAX_IMAGE_BYTES)
    except OSError as error:
        raise CommandError(error.strerror or str(error)) from error


def _write(path: AnyPath, content: bytes) -> None:
    """Write a result to a file or to standard output.

    Raises:
        CommandError: the file cannot be written.
    """
    if path != STANDARD:
        storage.write(path, content)
        return
    with writing(path):
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
