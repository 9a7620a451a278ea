"""Errors of the command line's arguments and files. Knows no command."""

from __future__ import annotations

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
