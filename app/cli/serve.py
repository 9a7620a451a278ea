"""`unet serve`: the service, until a signal."""

from __future__ import annotations

import argparse

import uvicorn

from app import logs
from app.api.protocol import Connection
from app.api.server import Server, listen
from app.inference.service import Service
from app.main import create_app
from app.settings import Settings, add_flags, given_flags, load_settings


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
    server = Server(config, service)
    server.run([listening])
    if server.interrupted:
        return 130
    return 1 if service.failed.is_set() else 0
