"""`unet serve`: run the service until a signal."""

from __future__ import annotations

import argparse

import uvicorn

from app import logs
from app.api.protocol import Connection
from app.api.server import Server, listen
from app.cli.flags import add_flags, explicit_flags
from app.inference.service import Service
from app.main import create_app
from app.settings import SECTIONS, Settings, load_settings, warn_about_unknown_variables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting."""
    parser.usage = "unet serve [--SETTING VALUE ...]"
    for title, names in SECTIONS.items():
        add_flags(parser.add_argument_group(title), Settings, names)


def main(args: argparse.Namespace) -> int:
    """Serve until a signal. Returns 130 after Ctrl-C, 1 if the default model cannot be served."""
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
    server = Server(config, service)
    server.run([listening])
    if server.interrupted:
        return 130
    return 1 if service.failed.is_set() else 0
