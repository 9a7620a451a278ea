"""Errors that a user can fix. Everything else that is raised is a bug.

The tree, each branch with the arrow of the data flow that raises it::

    UserError
    ├── ConfigError          recipe or checkpoint header -> configuration
    ├── CheckpointError      file -> checkpoint
    ├── DataError            files -> images and labels
    ├── TrainingDiverged     step -> weights: the loss, its gradient or the weights are not finite
    ├── TrainingOutOfMemory  batch -> step: a batch, or what it needs, does not fit into memory
    ├── ExportError          checkpoint -> file of another program: it cannot be written, or differs
    └── WriteError           results -> files: a file or folder of a run cannot be written

`app/errors.py` adds the service's own. The command line prints a `UserError` as one line and exits
with status 2; any other exception is a traceback and status 1.
"""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters; its class if empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


class UserError(Exception):
    """A mistake that a user can fix. Its text is one line that says what is wrong and what is
    allowed."""


class ConfigError(UserError):
    """A value in a recipe or a checkpoint's header is wrong; the message names it."""


class CheckpointError(UserError):
    """A file is not a checkpoint, or is damaged; the message names the file."""


class DataError(UserError):
    """A data set is incomplete or inconsistent; the message names the file and what is expected."""


class TrainingDiverged(UserError):
    """The loss, its gradient or the weights are not finite."""


class TrainingOutOfMemory(UserError):
    """A batch, or what it needs beside it, does not fit into memory."""


class ExportError(UserError):
    """A checkpoint cannot be exported, or what was exported computes something else."""


class WriteError(UserError):
    """A file or folder of a training run cannot be written; the message names it and the reason."""
