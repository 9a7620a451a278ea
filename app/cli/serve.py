"""`unet serve`: run the service until a signal."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import shlex
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn
from urllib.request import getproxies

import uvicorn

from app import logs
from app.api.protocol import Connection
from app.api.server import Server, format_url, listen
from app.cli.flags import add_flags, explicit_flags
from app.inference.allocator import use_one_arena
from app.inference.registry import WrapEngineFn, use_as_built
from app.inference.service import Service
from app.main import create_app
from app.settings import SECTIONS, Settings, load_settings, warn_about_unknown_variables

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent.parent / "static/samples/fluorescence.png"
_INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as shells report it."""
_STOP_S = 3.0
"""Time to close connections and free the engines, after accepted requests had UNET_DRAIN_S."""
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting."""
    parser.usage = "unet serve [--SETTING VALUE ...]"
    for title, names in SECTIONS.items():
        add_flags(parser.add_argument_group(title), Settings, names)


def main(args: argparse.Namespace, wrap_engine: WrapEngineFn = use_as_built) -> NoReturn:
    """Serve until a signal; exit with 130 after Ctrl-C, with 1 if the default model is unusable.

    Args:
        wrap_engine: see `app.inference.registry.Registry`.
    """
    use_one_arena()
    logs.skip_origins()
    settings = load_settings(**explicit_flags(args, Settings))
    with logs.logging_to_stderr(settings.log_format, settings.log_level):
        status = serve(settings, wrap_engine)
    os._exit(status)  # finalizing Python would abort while a thread still compiles a model


def serve(settings: Settings, wrap_engine: WrapEngineFn) -> int:
    """Run the server, and return the exit status of the process.

    The process ends 3 seconds after the time that requests have left, whatever its threads do.
    After a signal this does not return: the signal ends the process when the server has stopped.

    Raises:
        SettingsError, EngineUnavailable: the settings ask for what this machine does not have.
    """
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, _die)  # uvicorn raises the signal again when the server has stopped
    warn_about_unknown_variables()
    listening = listen(settings.host, settings.port)  # first, because it fails fastest
    app = create_app(settings, wrap_engine)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        loop="asyncio",  # uvloop would be used wherever another package has installed it
        http=Connection,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=1,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = Server(
        config,
        service,
        on_ready=(
            functools.partial(log_first_steps, keys=settings.requires_keys)
            if settings.log_format == "text"
            else None
        ),
        on_stop=lambda seconds, status: _exit_after(seconds + _STOP_S, status),
    )
    server.run([listening])
    return service.exit_status


def _die(sig: int, _: FrameType | None) -> None:
    """End the process by a signal, as its default handler does, when the log is written."""
    logs.flush()
    if sig == signal.SIGINT:
        os._exit(_INTERRUPTED)
    signal.signal(sig, signal.SIG_DFL)
    signal.raise_signal(sig)
    os._exit(0)  # process 1 of a container ignores signals that have no handler


def _exit_after(seconds: float, status: int) -> None:
    """Exit after this time, unless the process has ended. Hung threads cannot be joined."""

    def end() -> None:
        log.critical("exiting: the service did not stop within %g s", seconds)
        logs.flush()
        os._exit(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def log_first_steps(host: str, port: int, *, keys: bool) -> None:
    """Log where the page is and a request to try, for a person at a terminal of this machine.

    Args:
        host: the address that the server listens on.
        keys: whether requests need an API key.
    """
    host = _LOOPBACK.get(host, host)
    url = format_url(host, port)
    log.info("open %s in a browser, or run:", url)
    log.info("%s", example_request(url, keys=keys))


def example_request(url: str, *, keys: bool) -> str:
    """A curl command that segments a sample image of the package, from the current folder."""
    here = Path.cwd()
    sample = SAMPLE.relative_to(here) if SAMPLE.is_relative_to(here) else SAMPLE
    words = ["curl", "-F", f"file=@{sample}", f"{url}/segment", "-o", "mask.png"]
    if keys:
        words[1:1] = ["-H", "Authorization: Bearer YOUR_KEY"]
    if {"http", "all"} & getproxies().keys():
        words[1:1] = ["--noproxy", "*"]  # curl sends requests to this machine through a proxy too
    return shlex.join(words)
