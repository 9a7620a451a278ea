"""Run U-Net segmentation: serve it, segment files, train and convert models.

One module per command, of which only the chosen one is imported.

Exit status: 0; 1 for a bug, with its traceback, and where a command says so; 2 for a mistake of the
user, with one line on standard error; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from model.errors import UserError

COMMANDS = {
    "serve": ("app.cli.serve", "serve segmentation over HTTP"),
    "segment": (
        "app.cli.segment.command",
        "segment image files: here, through a running service, or on a Ray cluster",
    ),
    "models": ("app.cli.models", "list checkpoints"),
    "train": ("app.cli.train", "train a network from images and masks, or from a recipe"),
    "evaluate": ("app.cli.evaluate", "measure a checkpoint or a running service on a data set"),
    "export": (
        "app.cli.export.command",
        "calibrate a checkpoint for int8, change its width, or write it for other programs",
    ),
    "import": ("app.cli.importing.command", "convert weights or an ONNX graph to a checkpoint"),
    "bench": ("app.cli.bench.command", "measure this machine, the engine and the service"),
}
"""Command -> its module, with `add_arguments` and `main`, and its help."""

_OPTIONAL = {
    "torch": "torch torchvision",
    "torchvision": "torch torchvision",
    "yaml": "pyyaml",
    "onnxruntime": "'unet-server[export]'",
    "bioimageio": "'unet-server[export]'",
    "bioimageio.core": "'unet-server[export]'",
    "nncf": "'unet-server[quantize]'",
}
"""Packages that an installation for serving lacks -> what to give to `pip install`."""


class _CommandParser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _PrintVersion(argparse.Action):
    """Imports the metadata of packages only where it is needed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"unet-server {version('unet-server')}")
        except PackageNotFoundError:
            print("unet-server, not installed as a package")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. A bug is raised."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser, commands = _build_parsers()
    name = next((word for word in arguments if not word.startswith("-")), "")
    command = commands.get(name, parser)
    try:
        with _die_on_interrupt():
            module = importlib.import_module(COMMANDS[name][0]) if name in COMMANDS else None
        if module is not None:
            module.add_arguments(command)
        args, unknown = parser.parse_known_args(arguments)
        if module is None or unknown:
            command.error(f"unrecognized arguments: {' '.join(unknown)}")
        status = int(module.main(args))
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        if error.name not in _OPTIONAL:
            raise
        command.error(
            f"{name} needs {error.name}, which is not installed; install it with: "
            f"pip install {_OPTIONAL[error.name]}"
        )
    except UserError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"unet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        return 1


@contextlib.contextmanager
def _die_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once while the block imports modules.

    An extension module that is imported can turn a `KeyboardInterrupt` into another exception.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _build_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `unet`, and one per command, which has no arguments of its own yet."""
    parser = _CommandParser(prog="unet", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version")
    debug = "show the traceback of every error"
    parser.add_argument("--debug", action="store_true", help=debug)
    group = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}
    for name, (_, text) in COMMANDS.items():
        commands[name] = group.add_parser(name, help=text, description=text)
        commands[name].add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=debug
        )
    return parser, commands


def _is_stdout_closed() -> bool:
    """Whether the reader of standard output is gone, as in `unet models | head -1`.

    If so, standard output becomes the null device, so that flushing it at exit does not fail.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
