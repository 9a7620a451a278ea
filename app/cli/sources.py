"""Which images are segmented, and where each mask goes. Knows paths; opens none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from model.pixels import IMAGE_SUFFIXES

STANDARD = Path("-")
"""Standard input as an image, standard output as its mask."""

_FILES = (*IMAGE_SUFFIXES, ".json", ".geojson")
"""Suffixes nobody gives to a new folder."""


class _Source(NamedTuple):
    """An image; `name` is its path below `folder`, which is "" for a file given by itself."""

    file: Path
    name: Path
    folder: str = ""


def plan_outputs(
    paths: Sequence[Path], out: Path, suffixes: Sequence[str], *, keep_suffix: bool = False
) -> dict[Path, Path]:
    """Mask -> image.

    The masks of a folder lie in `out` as its images lie in it. Where those of several folders would
    have the same name, each folder's lie below its own name.

    Args:
        out: a folder; of one image also the mask itself, or `STANDARD`.
        suffixes: of a mask that `out` may be; the first is that of masks in a folder.
        keep_suffix: a.jpg becomes a.jpg.png, not a.png.

    Raises:
        ValueError: nothing there, two images whose masks would have the same name, a mask that
            would take the place of an image, or no folder to write to.
    """
    sources = _find(paths, out)
    if not sources:
        raise ValueError(f"no images in {', '.join(map(str, paths))}")
    is_mask = out == STANDARD or (out.suffix.lower() in _FILES and not out.is_dir())
    if is_mask and out.suffix and out.suffix.lower() not in suffixes:
        raise ValueError(f"--out {out}: what is written is a {suffixes[0]} file")
    if is_mask and len(sources) > 1:
        raise ValueError(f"--out {out} is one file; {len(sources)} images need a folder")
    if out != STANDARD:
        _check_folder(out.parent if is_mask else out)
    names = [_mask_name(source.name, suffixes[0], keep_suffix) for source in sources]
    masks = [out] if is_mask else [out / name for name in names]
    _spare_images(masks, sources)
    if len(set(masks)) < len(masks):
        masks = [out / source.folder / name for source, name in zip(sources, names, strict=True)]
        _spare_images(masks, sources)
    placed: dict[Path, Path] = {}
    for mask, source in zip(masks, sources, strict=True):
        if (other := placed.setdefault(mask, source.file)) != source.file:
            alike = keep_suffix or other.suffix == source.file.suffix
            way = "give each an --out of its own" if alike else "--keep-suffix tells them apart"
            raise ValueError(f"{other} and {source.file} would both become {mask}; {way}")
    return placed


def _find(paths: Sequence[Path], out: Path) -> list[_Source]:
    """Each image once, however often and by whatever path it was given.

    Raises:
        ValueError: a path that is not there.
    """
    found: dict[Path, _Source] = {}
    for path in paths:
        if path == STANDARD:
            found[path] = _Source(path, Path("stdin"))
        elif path.is_dir():
            for source in _images(path, out):
                # A link keeps its name, by which it may have a mask of its own.
                found.setdefault(source.file.parent.resolve() / source.file.name, source)
        elif path.exists():
            found.setdefault(path.parent.resolve() / path.name, _Source(path, Path(path.name)))
        else:
            raise ValueError(f"{path} does not exist")
    return list(found.values())


def _images(folder: Path, out: Path) -> Iterator[_Source]:
    """The images of a folder and of those in it.

    Not what is hidden, and not what lies in `out`, where masks of an earlier run may be.
    """
    inner = out.resolve() != folder.resolve()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if (
            name.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in name.parts)
            and not (inner and file.resolve().is_relative_to(out.resolve()))
            and not file.is_dir()
        ):
            yield _Source(file, name, folder.resolve().name)


def _mask_name(name: Path, suffix: str, keep_suffix: bool) -> Path:
    """scan.001 becomes scan.001.png: .001 is no suffix of an image, but a part of the name."""
    is_suffix = name.suffix.lower() in IMAGE_SUFFIXES and not keep_suffix
    return name.with_name((name.stem if is_suffix else name.name) + suffix)


def _spare_images(masks: Sequence[Path], sources: Sequence[_Source]) -> None:
    """
    Raises:
        ValueError: a mask would take the place of an image.
    """
    images = {source.file.resolve() for source in sources if source.file != STANDARD}
    for mask, source in zip(masks, sources, strict=True):
        if mask.resolve() in images:
            raise ValueError(
                f"the mask of {source.file} would replace the image {mask}; give another --out"
            )


def _check_folder(folder: Path) -> None:
    """
    Raises:
        ValueError: it is none, or cannot be made or written to.
    """
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out {folder}: {nearest} is a file, and masks need a folder")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {folder}: {nearest} cannot be written to")
