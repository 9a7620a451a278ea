"""Files at paths, and at addresses of fsspec such as s3://bucket/images. Knows no images."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO, TypeAlias, cast

from app.cli.errors import CommandError, reading, writing
from model.checkpoint import write_atomically
from model.files import read_file

if TYPE_CHECKING:
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"
"""A path of this machine, or an address. A `Path` is never an address."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_LOCAL = ("file", "local")
_OBJECT_STORES = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "obs", "memory"}
)
"""Protocols that replace a whole object in one step, and have no folders to create."""


class Entry(NamedTuple):
    """A file or a folder in a folder."""

    name: str
    is_folder: bool


def parse_location(text: str) -> AnyPath:
    """Read a path or an address.

    Raises:
        CommandError: the package for its protocol is not installed, or it is not an address.
    """
    if not _ADDRESS.match(text):
        return Path(text)
    try:
        from upath import UPath
    except ImportError:
        raise CommandError(f"{text}: an address needs pip install 'unet-server[ray]'") from None
    try:
        location = UPath(text)
        _ = location.fs  # imports the plugin
    except (ImportError, ValueError) as error:
        raise CommandError(f"{text}: {error}") from error
    return location


def locate_inside(inner: AnyPath, outer: AnyPath) -> str | None:
    """The path of a folder relative to another one that holds it, "" if it is the same; None if it
    lies elsewhere."""
    first, second = _identify(inner), _identify(outer)
    if first == second:
        return ""
    prefix = second.rstrip("/") + "/"
    return first.removeprefix(prefix) if first.startswith(prefix) else None


def list_folder(folder: AnyPath) -> list[Entry]:
    """The entries of a folder. A link to a folder is none: it may lead back.

    Raises:
        CommandError: it does not exist, or cannot be read.
    """
    if isinstance(folder, Path):
        with reading(folder), os.scandir(folder) as entries:
            return [
                Entry(entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if not (entry.is_symlink() and entry.is_dir())
            ]
    with _remote(folder, "read"):
        found = folder.fs.ls(folder.path, detail=True)
        folder.fs.invalidate_cache()  # it would keep the entries of all folders in memory
    return [
        Entry(info["name"].rstrip("/").rpartition("/")[2], info["type"] == "directory")
        for info in found
        if not (info.get("islink") and info["type"] == "directory")
        and info["name"].strip("/") != folder.path.strip("/")
    ]


def list_names(folder: AnyPath) -> set[str]:
    """The names in a folder; none if it does not exist.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        return {entry.name for entry in list_folder(folder)}
    except CommandError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return set()
        raise


def read(file: AnyPath, max_bytes: int) -> bytes:
    """Read a file.

    Raises:
        OSError: it is at a path and cannot be read.
        CommandError: it is at an address and cannot be read.
    """
    if isinstance(file, Path):
        return read_file(file, max_bytes)
    with _remote(file, "read"):
        content: bytes = file.fs.cat_file(file.path, start=0, end=max_bytes + 1)
    if len(content) > max_bytes:
        raise CommandError(f"it has more than {max_bytes:,} bytes")
    return content


def write(file: AnyPath, content: bytes) -> None:
    """Replace a file in one step, and create its folder: a file that exists is complete.

    Raises:
        CommandError: it cannot be written.
    """
    if isinstance(file, Path):
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content)
        return
    with _remote(file, "written"):
        if file.protocol in _OBJECT_STORES:
            file.fs.pipe_file(file.path, content)
            return
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        file.fs.makedirs(file.parent.path, exist_ok=True)
        file.fs.pipe_file(part.path, content)
        file.fs.mv(part.path, file.path)


def remove(file: AnyPath) -> None:
    """Remove a file, if it exists.

    Raises:
        CommandError: it cannot be removed.
    """
    if isinstance(file, Path):
        with writing(file):
            file.unlink(missing_ok=True)
        return
    with _remote(file, "removed"), contextlib.suppress(FileNotFoundError):
        file.fs.rm_file(file.path)


@contextlib.contextmanager
def replacing(file: AnyPath) -> Iterator[TextIO]:
    """Open a text file that replaces `file` in one step when the block ends.

    Raises:
        CommandError: it cannot be written.
    """
    if isinstance(file, Path):
        part = file.with_name(f".{file.name}.part")
        with writing(file):
            try:
                with part.open("w", encoding="utf-8", newline="") as text:
                    yield text
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
        return
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="") as text:
        yield cast(TextIO, text)
        text.flush()
        with _remote(file, "written"):
            file.fs.put_file(text.name, file.path)


def _identify(location: AnyPath) -> str:
    if isinstance(location, Path):
        return str(location.resolve())
    if location.protocol in _LOCAL:
        return str(Path(location.path).resolve())
    return f"{location.protocol}://{location.path.strip('/')}"


@contextlib.contextmanager
def _remote(location: UPath, action: str) -> Iterator[None]:
    """Report a failure of a file system, each of which has exceptions of its own."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"{location} cannot be {action}: {error}") from error
