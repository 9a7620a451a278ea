"""Which images are segmented, and where the results of each go. Knows paths; opens no file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from app.api.body.names import strip_image_suffix
from app.cli.errors import CommandError, reading, writing
from app.cli.segment.storage import AnyPath
from model.pixels import IMAGE_SUFFIXES

STANDARD = Path("-")
"""Standard input as an image, standard output as its result."""

_FILE_SUFFIXES = (*IMAGE_SUFFIXES, ".json", ".geojson", ".csv", ".zip")
"""An `out` with one of these suffixes is a file, unless a folder of that name exists."""


class _InputImage(NamedTuple):
    """An image to segment.

    Attributes:
        file: its path.
        name: its path relative to `folder`, or its file name.
        folder: name of the folder argument it was found in; "" if it was given itself.
    """

    file: Path
    name: Path
    folder: str = ""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the results of an image go.

    Attributes:
        image: its file, or `STANDARD`.
        name: of the image within the results, for tables.
        stem: path of its results without their endings.
        file: the result itself, if there is only one and the user named it.
    """

    image: AnyPath
    name: str
    stem: AnyPath
    file: Path | None = None

    def locate(self, ending: str, page: int | None = None) -> AnyPath:
        """Return the path of a result: `a.png`, or `a-page0.png`.

        Args:
            ending: of its name, for example ".png" or "-mask.png".
            page: of a file with several, from 0.
        """
        number = "" if page is None else f"-page{page}"
        if self.file is None:
            return self.stem.with_name(f"{self.stem.name}{number}{ending}")
        return self.file if page is None else self.file.with_stem(self.file.stem + number)


def plan_targets(
    paths: Sequence[Path],
    out: Path,
    endings: Sequence[str],
    *,
    suffixes: Sequence[str] = (),
    keep_suffix: bool = False,
) -> list[Target]:
    """Find the images, and decide where the results of each go.

    Results keep the folder structure of their images. Where images of several folders would have
    the same result, the results of each folder go to a subfolder with its name.

    Args:
        paths: images, folders of images, or `STANDARD`.
        out: a folder; for one result of one image also the result itself, or `STANDARD`.
        endings: of the names of an image's results, one per output.
        suffixes: that an `out` may have if it is a file, besides the ending.
        keep_suffix: a.jpg becomes a.jpg.png, not a.png.

    Raises:
        CommandError: no image, two images with the same result, a result that would replace an
            image, or an `out` that cannot be written.
    """
    images = _find_images(paths, out)
    if not images:
        raise CommandError(f"no images in {', '.join(map(str, paths))}")
    if is_file(out):
        _check_file(out, endings, suffixes, len(images))
        targets = [Target(images[0].file, images[0].name.name, out.with_suffix(""), out)]
    else:
        _check_folder(out, out)
        targets = _name_targets(images, out, endings, keep_suffix)
    _check_no_overwrite(targets, endings)
    check_distinct(targets, endings, keep_suffix)
    return targets


def is_file(out: Path) -> bool:
    """Whether `out` is a result itself, or standard output, and not a folder of results."""
    return out == STANDARD or (out.suffix.lower() in _FILE_SUFFIXES and not out.is_dir())


def _find_images(paths: Sequence[Path], out: Path) -> list[_InputImage]:
    """Each image once, even if several paths lead to it.

    Raises:
        CommandError: a path does not exist, or cannot be read.
    """
    found: dict[Path, _InputImage] = {}
    for path in paths:
        with reading(path):
            for image in _expand(path, out):
                # A symbolic link is an image of its own, so its last part is not resolved.
                found.setdefault(image.file.parent.resolve() / image.file.name, image)
    return list(found.values())


def _expand(path: Path, out: Path) -> Iterator[_InputImage]:
    """The image at a path, or those in a folder.

    Raises:
        CommandError: the path does not exist.
    """
    if path == STANDARD:
        yield _InputImage(path, Path("stdin"))
    elif path.is_dir():
        yield from _list_folder(path, out)
    elif path.exists():
        yield _InputImage(path, Path(path.name))
    else:
        raise CommandError(f"{path} does not exist")


def is_image(name: str) -> bool:
    """Whether a file in a folder is one of its images, by its name."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _list_folder(folder: Path, out: Path) -> Iterator[_InputImage]:
    """The images in a folder and its subfolders, without hidden files, and without those in `out`,
    which may be outputs of an earlier run."""
    out_is_inside = folder.resolve() in out.resolve().parents
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        is_output = out_is_inside and file.resolve().is_relative_to(out.resolve())
        is_image = name.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir()
        if is_image and not is_hidden and not is_output:
            yield _InputImage(file, name, folder.resolve().name)


def _name_targets(
    images: Sequence[_InputImage], out: Path, endings: Sequence[str], keep_suffix: bool
) -> list[Target]:
    """One target per image, in `out`, or in a subfolder per input folder if names collide."""
    names = [name_result(image.name, keep_suffix) for image in images]
    targets = [
        Target(image.file, str(image.name), out / name)
        for image, name in zip(images, names, strict=True)
    ]
    if len(set(names)) == len(names):
        return targets
    _check_no_overwrite(targets, endings)
    return [
        Target(image.file, str(image.folder / image.name), out / image.folder / name)
        for image, name in zip(images, names, strict=True)
    ]


def name_result(name: Path, keep_suffix: bool) -> Path:
    """a.ome.tif becomes a; scan.001 stays, because .001 is not the suffix of an image format."""
    return name if keep_suffix else name.with_name(strip_image_suffix(name.name) or name.name)


def check_distinct(targets: Sequence[Target], endings: Sequence[str], keep_suffix: bool) -> None:
    """Check that each image has results of its own.

    Raises:
        CommandError: two images would have the same.
    """
    planned: dict[AnyPath, Target] = {}
    for target in targets:
        other = planned.setdefault(target.stem, target)
        if other is not target:
            same_suffix = other.image.suffix == target.image.suffix
            hint = (
                "give each its own --out"
                if keep_suffix or same_suffix
                else "use --keep-suffix to keep them apart"
            )
            raise CommandError(
                f"{other.image} and {target.image} would both become "
                f"{target.locate(endings[0])}; {hint}"
            )


def _check_no_overwrite(targets: Sequence[Target], endings: Sequence[str]) -> None:
    """Check that no result is also an input.

    Raises:
        CommandError: a result would replace an image.
    """
    files = {target.image.resolve() for target in targets if target.image != STANDARD}
    for target in targets:
        for result in map(target.locate, endings):
            if result.resolve() in files:
                raise CommandError(
                    f"the result of {target.image} would replace the image {result}; use another "
                    "--out"
                )


def _check_file(out: Path, endings: Sequence[str], suffixes: Sequence[str], images: int) -> None:
    """Check an `out` that is a file.

    Raises:
        CommandError: its suffix is of another format, there are several images or outputs, or it
            cannot be written.
    """
    if images > 1:
        raise CommandError(f"--out {out} is one file; {images} images need a folder")
    if len(endings) > 1:
        raise CommandError(f"--out {out} is one file; {len(endings)} outputs need a folder")
    if out.suffix and out.suffix.lower() not in (*endings, *suffixes):
        raise CommandError(f"--out {out}: the output is a {endings[0]} file")
    if out != STANDARD:
        _check_folder(out.parent, out)


def _check_folder(folder: Path, out: Path) -> None:
    """Check that outputs can be written to a folder, which need not exist yet.

    Raises:
        CommandError: the folder cannot be created or written to.
    """
    with writing(out):
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise CommandError(f"--out {out}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK):
        raise CommandError(f"--out {out}: {nearest} is not writable")
