"""Plans a folder of any number of images, one subfolder at a time. Opens no image.

`sources.py` plans a few arguments at once and holds a target for each image. Here the plan of an
image is its name, from which the target follows, so that millions of them fit into memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.cli.errors import CommandError
from app.cli.segment.results import ResultFiles, Work
from app.cli.segment.sources import Target, check_distinct, is_image, name_result
from app.cli.segment.storage import AnyPath, list_folder, list_names, locate_inside
from model.pixels import IMAGE_SUFFIXES

_PAGE = re.compile(r"(.+)-page\d+")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of images, and where their results go.

    Attributes:
        source: the images, in subfolders too.
        out: the results, in the same subfolders.
        keep_suffix: a.jpg becomes a.jpg.png, not a.png.
    """

    source: AnyPath
    out: AnyPath
    keep_suffix: bool = False

    def target(self, name: str) -> Target:
        """Where the results of an image go.

        Args:
            name: of the image, relative to the folder.
        """
        stem = str(name_result(Path(name), self.keep_suffix))
        return Target(self.source / name, name, self.out / stem)


@dataclasses.dataclass(frozen=True)
class PlannedImage:
    """An image of a folder.

    Attributes:
        name: relative to the folder.
        done: it has all its results, and need not be segmented.
    """

    name: str
    done: bool


def plan_folder(folder: Folder, work: Work, table: str | None) -> Iterator[PlannedImage]:
    """Find the images of a folder and its subfolders, without hidden files and earlier results.

    Args:
        work: says which results there are, and whether images that have them are done.
        table: name of the table of all images; None for none.

    Raises:
        CommandError: two images have the same result, a result would replace an image or the
            table, or a folder cannot be read.
    """
    inside = locate_inside(folder.out, folder.source)
    waiting = [""]
    while waiting:
        path = waiting.pop()
        names = []
        for entry in sorted(list_folder(folder.source / path)):
            name = f"{path}/{entry.name}" if path else entry.name
            if entry.is_folder:
                if not entry.name.startswith(".") and name != inside:
                    waiting.append(name)
            elif is_image(entry.name):
                names.append(name)
        if names:
            yield from _plan_names(folder, path, names, work, None if path else table)


def _plan_names(
    folder: Folder, path: str, names: Sequence[str], work: Work, table: str | None
) -> Iterator[PlannedImage]:
    """Plan the images of one subfolder. Only these can have the same results."""
    # Relative targets: two absolute paths for each image would take most of the time.
    relative = Folder(Path(), Path(), folder.keep_suffix)
    targets = [relative.target(name) for name in names]
    endings = list(work.endings.values())
    check_distinct(targets, endings, folder.keep_suffix)
    if work.all_pages:
        _check_pages(targets)
    results = folder.out / path
    # An `out` inside the folder is left out of it: what it holds are results.
    overlaps = not locate_inside(folder.out, folder.source) and (
        locate_inside(results, folder.source) is not None
    )
    existing = list_names(results) if work.skip_existing or overlaps else set()
    for target in targets if overlaps else ():
        _check_no_overwrite(target, endings, existing)
    files = ResultFiles(
        work, targets, Path(table) if table else None, exists=lambda file: file.name in existing
    )
    for name, target in zip(names, targets, strict=True):
        # The number of pages is known only after reading a file.
        yield PlannedImage(name, not work.all_pages and files.skip(target))


def _check_pages(targets: Sequence[Target]) -> None:
    """Check that no image is named like a page of another.

    Raises:
        CommandError: one is.
    """
    images = {target.stem.name: target.image for target in targets}
    for name, image in images.items():
        match = _PAGE.fullmatch(name)
        if match and match[1] in images:
            raise CommandError(
                f"the results of {image} may be those of a page of {images[match[1]]}; "
                "rename one of them"
            )


def _check_no_overwrite(target: Target, endings: Sequence[str], existing: set[str]) -> None:
    """Check that no result is an image of the same folder.

    Raises:
        CommandError: one is.
    """
    for result in map(target.locate, endings):
        if result.name in existing and result.suffix.lower() in IMAGE_SUFFIXES:
            raise CommandError(
                f"the result of {target.image} would replace the image {result}; use another --out"
            )
