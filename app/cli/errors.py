"""Errors of the command line's arguments and files. Knows no command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from model.errors import UserError


class CommandError(UserError):
    """A command cannot do what its arguments ask for. The message is one line."""


def check_parent_folder(path: Path) -> None:
    """Check, before a long computation, that its result can have this path.

    Raises:
        CommandError: the folder of `path` does not exist.
    """
    with reading(path.parent):
        if not path.parent.is_dir():
            raise CommandError(f"{path}: {path.parent} is not a folder")


def check_destination(path: Path, force: bool) -> None:
    """Check, before a long computation, that a file can be written.

    Args:
        path: of the file. Its folders may be missing.
        force: whether a file may be replaced.

    Raises:
        CommandError: a file is there and may not be replaced, or none can be there.
    """
    with writing(path):
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir():
            raise CommandError(f"{path} cannot be written: {nearest} is not a folder")
        with contextlib.suppress(FileNotFoundError):
            (nearest / path.name).stat()  # fails if the name is too long
        if path.is_dir():
            raise CommandError(f"{path} is a folder; choose another name")
        if path.exists() and not force:
            raise CommandError(f"{path} exists; choose another name, or --force to replace it")


def reading(path: object) -> AbstractContextManager[None]:
    """Report a failure to read a file or a folder that the user named.

    Raises:
        CommandError: an `OSError` was raised inside; the message names the path and the reason.
    """
    return _report_os_errors(path, "read")


def writing(path: object) -> AbstractContextManager[None]:
    """Report a failure to write a file that the user named. See `reading`."""
    return _report_os_errors(path, "written")


@contextmanager
def _report_os_errors(path: object, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path} cannot be {action}: {error.strerror or error}") from error
