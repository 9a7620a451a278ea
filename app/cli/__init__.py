"""`unet`: one command a verb. Only the chosen command's module is imported."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from app.errors import ServiceError
from model.errors import UserError

COMMANDS = {
    "serve": ("app.cli.serve", "serve masks over HTTP"),
    "segment": ("app.cli.segment", "segment files here, without a server"),
    "models": ("app.cli.models", "list the checkpoints of a folder, or one"),
    "train": ("app.cli.train", "train a network from a configuration"),
    "evaluate": ("app.cli.evaluate", "measure a checkpoint, or a running service, on a data set"),
    "export": (
        "app.cli.export",
        "calibrate a checkpoint for int8, change its width, or write its graph",
    ),
    "import": ("app.cli.import_weights", "turn a foreign state dict into a checkpoint"),
    "bench": ("app.cli.bench.command", "measure this machine, the engine on it, and the service"),
}
"""Verb -> the module with its `add_arguments` and `main`, and what it does."""


class _Parser(argparse.ArgumentParser):
    """A mistake is told in one line, not under a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 and one line on standard error for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="unet", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for verb, (module, text) in COMMANDS.items():
        command = commands.add_parser(verb, help=text, description=text)
        if verb == chosen:
            try:
                importlib.import_module(module).add_arguments(command)
            except ModuleNotFoundError as error:
                parser.error(_missing(verb, error))
    args = parser.parse_args(arguments)
    try:
        return int(importlib.import_module(COMMANDS[args.command][0]).main(args))
    except ModuleNotFoundError as error:
        parser.error(_missing(args.command, error))
    except KeyboardInterrupt:
        return 130
    except (
        UserError,
        ValueError,
        OSError,
        ServiceError,
    ) as error:  # every error of ours that a user can mend is one of them
        print(f"unet: error: {error}", file=sys.stderr)
        return 2


def _missing(verb: str, error: ModuleNotFoundError) -> str:
    """The image for CPUs has no torch; what needs none works there."""
    return f"{verb} needs {error.name}, which is not installed here"
