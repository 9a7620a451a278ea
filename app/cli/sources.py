"""Which images a command segments, and where each result goes. Knows paths; opens no file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from app.cli.errors import CommandError, reading, writing
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


def plan_outputs(
    paths: Sequence[Path], out: Path, suffixes: Sequence[str], *, keep_suffix: bool = False
) -> dict[Path, Path]:
    """Output path -> image.

    Outputs keep the folder structure of their images. Where images of several folders would have
    the same output, the outputs of each folder go to a subfolder with its name.

    Args:
        paths: images, folders of images, or `STANDARD`.
        out: a folder; for one image also the output itself, or `STANDARD`.
        suffixes: allowed for an `out` that is a file; outputs in a folder have the first.
        keep_suffix: a.jpg becomes a.jpg.png, not a.png.

    Raises:
        CommandError: no image, two images with the same output, an output that would replace an
            image, or an `out` that cannot be written.
    """
    images = _find_images(paths, out)
    if not images:
        raise CommandError(f"no images in {', '.join(map(str, paths))}")
    if out == STANDARD or (out.suffix.lower() in _FILE_SUFFIXES and not out.is_dir()):
        _check_file(out, suffixes, len(images))
        outputs = [out]
    else:
        _check_folder(out, out)
        outputs = _name_outputs(images, out, suffixes[0], keep_suffix)
    _check_no_overwrite(outputs, images)
    return _pair(outputs, images, keep_suffix)


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


def _list_folder(folder: Path, out: Path) -> Iterator[_InputImage]:
    """The images in a folder and its subfolders, without hidden files, and without those in `out`,
    which may be outputs of an earlier run."""
    out_is_inside = out.resolve() != folder.resolve()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        is_output = out_is_inside and file.resolve().is_relative_to(out.resolve())
        is_image = name.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir()
        if is_image and not is_hidden and not is_output:
            yield _InputImage(file, name, folder.resolve().name)


def _name_outputs(
    images: Sequence[_InputImage], out: Path, suffix: str, keep_suffix: bool
) -> list[Path]:
    """One output per image, in `out`, or in a subfolder per input folder if names collide."""
    names = [_output_name(image.name, suffix, keep_suffix) for image in images]
    outputs = [out / name for name in names]
    if len(set(outputs)) == len(outputs):
        return outputs
    _check_no_overwrite(outputs, images)
    return [out / image.folder / name for image, name in zip(images, names, strict=True)]


def _output_name(name: Path, suffix: str, keep_suffix: bool) -> Path:
    """scan.001 becomes scan.001.png, because .001 is not the suffix of an image format."""
    replace = name.suffix.lower() in IMAGE_SUFFIXES and not keep_suffix
    return name.with_name((name.stem if replace else name.name) + suffix)


def _pair(
    outputs: Sequence[Path], images: Sequence[_InputImage], keep_suffix: bool
) -> dict[Path, Path]:
    """Pair each output with its image.

    Raises:
        CommandError: two images have the same output.
    """
    planned: dict[Path, Path] = {}
    for output, image in zip(outputs, images, strict=True):
        other = planned.setdefault(output, image.file)
        if other != image.file:
            same_suffix = other.suffix == image.file.suffix
            hint = (
                "give each its own --out"
                if keep_suffix or same_suffix
                else "use --keep-suffix to keep them apart"
            )
            raise CommandError(f"{other} and {image.file} would both become {output}; {hint}")
    return planned


def _check_no_overwrite(outputs: Sequence[Path], images: Sequence[_InputImage]) -> None:
    """Check that no output is also an input.

    Raises:
        CommandError: an output would replace an image.
    """
    files = {image.file.resolve() for image in images if image.file != STANDARD}
    for output, image in zip(outputs, images, strict=True):
        if output.resolve() in files:
            raise CommandError(
                f"the result of {image.file} would replace the image {output}; use another --out"
            )


def _check_file(out: Path, suffixes: Sequence[str], images: int) -> None:
    """Check an `out` that is a file.

    Raises:
        CommandError: its suffix is of another format, there are several images, or it cannot be
            written.
    """
    if out.suffix and out.suffix.lower() not in suffixes:
        raise CommandError(f"--out {out}: the output is a {suffixes[0]} file")
    if images > 1:
        raise CommandError(f"--out {out} is one file; {images} images need a folder")
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
