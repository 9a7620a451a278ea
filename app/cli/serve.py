"""`unet serve`: run the service until a signal."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import shlex
from pathlib import Path
from typing import NoReturn
from urllib.request import getproxies

import uvicorn

from app import logs
from app.api.protocol import Connection
from app.api.server import Server, format_url, listen
from app.cli.flags import add_flags, explicit_flags
from app.inference.service import Service
from app.main import create_app
from app.settings import SECTIONS, Settings, load_settings, warn_about_unknown_variables

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent.parent / "static/samples/fluorescence.png"
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting."""
    parser.usage = "unet serve [--SETTING VALUE ...]"
    for title, names in SECTIONS.items():
        add_flags(parser.add_argument_group(title), Settings, names)


def main(args: argparse.Namespace) -> NoReturn:
    """Serve until a signal; exit with 130 after Ctrl-C, with 1 if the default model is unusable."""
    settings = load_settings(**explicit_flags(args, Settings))
    logs.set_up(settings.log_format, settings.log_level)
    warn_about_unknown_variables()
    listening = listen(settings.host, settings.port)  # first, because it fails fastest
    app = create_app(settings)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        http=Connection,
        timeout_keep_alive=settings.keep_alive_s,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    on_ready = functools.partial(log_first_steps, keys=bool(settings.api_keys))
    server = Server(config, service, on_ready if settings.log_format == "text" else None)
    with contextlib.suppress(KeyboardInterrupt):
        server.run([listening])
    status = 130 if server.interrupted else 1 if service.failed.is_set() else 0
    logging.shutdown()
    os._exit(status)  # finalizing Python would abort while a thread still compiles a model


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
