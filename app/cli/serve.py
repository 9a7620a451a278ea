"""`unet serve`: the service, until a signal."""

from __future__ import annotations

import argparse
import functools
import logging
import shlex
from pathlib import Path
from urllib.request import getproxies

import uvicorn

from app import logs
from app.api.protocol import Connection
from app.api.server import Server, listen
from app.inference.service import Service
from app.main import create_app
from app.settings import Settings, add_flags, given_flags, load_settings

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent.parent / "static/samples/fluorescence.png"
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag a setting."""
    add_flags(parser, Settings.model_fields)


def main(args: argparse.Namespace) -> int:
    """Serve until a signal: 130 after Ctrl-C; 1 when the default model could not be served."""
    settings = load_settings(**given_flags(args, Settings.model_fields))
    logs.set_up(settings.log_format, settings.log_level)
    listening = listen(settings.host, settings.port)  # first: it fails at once, if it does
    app = create_app(settings)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    on_ready = functools.partial(log_first_steps, keys=bool(settings.api_keys))
    server = Server(config, service, on_ready if settings.log_format == "text" else None)
    server.run([listening])
    if server.interrupted:
        return 130
    return 1 if service.failed.is_set() else 0


def log_first_steps(host: str, port: int, *, keys: bool) -> None:
    """Log where the page is and a request to try, for a person at a terminal of this machine.

    Args:
        host: the address that the server listens on.
        keys: whether requests need an API key.
    """
    host = _LOOPBACK.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
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
